"""How this installation was built, for bug reports."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from dtruntime_torch import _C
from dtruntime_torch._version import __version__


def build_info() -> dict[str, object]:
    """Says what this installation is made of.

    Returns:
        Versions of this package, Python and torch, the compiler of the native module, the CUDA version that it
        was built with (False for a CPU build), and the digest kernels that it has.

    Example:
        >>> build_info()["cuda"] in (False, "13.0") or isinstance(build_info()["cuda"], str)
        True
    """
    return {
        "dtruntime_torch": __version__,
        "python": platform.python_version(),
        "torch": _installed("torch"),
        **_C.build_info(),
    }


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
