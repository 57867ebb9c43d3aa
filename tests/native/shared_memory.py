"""Where the system keeps shared memory."""

from __future__ import annotations

from pathlib import Path


def file_of(name: str) -> Path:
    return Path("/dev/shm") / name
