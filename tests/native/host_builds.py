"""What the tests compile for themselves: the CUDA kernels as host code, and their bindings over something else.

What is built stays in build/cuda_on_host, and is built again when a source, the compiler or torch is another.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
STAND_IN = ROOT / "tests" / "native" / "cuda_on_host"
FOLDER = ROOT / "build" / "cuda_on_host"
BINDINGS = [CSRC / "bindings" / "arguments.cpp", CSRC / "bindings" / "cuda.cpp"]


def compiler() -> list[str]:
    """Returns the command of the C++ compiler; skips where there is none."""
    command = (os.environ.get("CXX") or "c++").split()
    if shutil.which(command[0]) is None:
        pytest.skip("there is no C++ compiler to build with")
    return command


def build(name: str, sources: Iterable[Path], words: Iterable[str], make: Callable[[Path], object]) -> Path:
    """Has `make` write a library, unless there is one of the same sources and words."""
    digest = hashlib.sha256("\n".join([*compiler(), *words]).encode())
    for path in sorted(sources):
        digest.update(path.read_bytes())
    library = FOLDER / f"{name}-{digest.hexdigest()[:16]}.so"
    if not library.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        unfinished = FOLDER / f"unfinished-{name}-{os.getpid()}.so"
        make(unfinished)
        unfinished.rename(library)
    return library


def kernels() -> Path:
    """Returns the library that tests/native/cuda_on_host/build.sh makes of the kernels."""

    def make(library: Path) -> None:
        subprocess.run([STAND_IN / "build.sh", "library", library], check=True, timeout=600)

    return build("libcuda_on_host", [*STAND_IN.iterdir(), *CSRC.glob("c*/*")], [], make)


def bindings(source: Path, *libraries: Path) -> ModuleType:
    """Returns a module that binds the functions `cuda_*`.

    Args:
        source: C++ that defines a module named after the file or, if that is module.cpp, after its folder.
        libraries: where the functions are that are bound, if not in `source`.
    """
    name = source.parent.name if source.stem == "module" else source.stem
    includes = [*cpp_extension.include_paths(), sysconfig.get_path("include")]
    flags = ["-std=c++20", "-O0", "-shared", "-fPIC", "-fvisibility=hidden"]
    linked = ["-xnone", *map(str, libraries)]  # by its path, for it has no other name
    words = [*flags, *includes, *linked, torch.__version__, str(sysconfig.get_config_var("SOABI"))]

    def make(library: Path) -> None:
        command = [*compiler(), *flags, *(f"-I{path}" for path in includes), "-xc++", "-", *linked]
        # At once: pybind11 is slow to read.
        program = "".join(f'#include "{path}"\n' for path in [*BINDINGS, source])
        subprocess.run([*command, "-o", str(library)], input=program, text=True, check=True, timeout=300)

    path = build(name, [source, *BINDINGS, *CSRC.glob("*/*.h"), *CSRC.glob("cuda/*.cpp")], words, make)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
