"""What the figures were measured on."""

from __future__ import annotations

import os
import platform
import re
from datetime import datetime, timezone
from pathlib import Path

from dtruntime_torch.build import build_info


def describe_machine() -> dict[str, object]:
    """Says what there is beside a GPU.

    Returns:
        "cpu", "cores" (that this process may use), "memory" (bytes), "kernel", "date" (UTC), and all of `build_info()`.

    Example:
        >>> describe_machine()["cores"] >= 1
        True
    """
    return {
        "cpu": _found(Path("/proc/cpuinfo"), r"model name\s*: (.+)") or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        # What follows the first dash is the name that a builder gave it.
        "kernel": f"{platform.system()} {platform.release().partition('-')[0]}",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        **build_info(),
    }


def nvidia_driver() -> str | None:
    """The version of the driver, or None where it does not say."""
    return _found(Path("/proc/driver/nvidia/version"), r"Kernel Module.*?(\d+(?:\.\d+)+)")


def _found(file: Path, pattern: str) -> str | None:
    """The first group of what a pattern finds in a file, if there is both."""
    if not file.exists():
        return None
    found = re.search(pattern, file.read_text(encoding="utf-8", errors="replace"))
    return found.group(1).strip() if found else None
