"""A disk that knows what was synced, and what would be left of it after a power cut.

It stands where `LocalBackend` calls the system: every call is done for real and recorded in two trees, the
disk as it is and the disk as it is known to be durable. A file that `write_file` made has synced bytes; a name
is durable once its folder was synced.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from dtruntime_torch.storage.system_calls import SystemCalls


class PowerCut(BaseException):
    """The call did not happen, and no later one will."""


@dataclass
class _Folder:
    names: dict[str, bytes | _Folder] = field(default_factory=dict)
    durable: dict[str, bytes | _Folder] = field(default_factory=dict)


def nothing_kept(path: str) -> bool:
    """The harshest cut: no change reached the disk unless it was synced."""
    return False


class UnsyncedDisk(SystemCalls):
    """Gives `LocalBackend(top / ..., calls=disk)` a disk that can lose its power.

    Args:
        top: an empty folder; the root of the storage is it or lies below it.

    Attributes:
        calls: name and path of each changing call so far.
        cut_at: number of the call, from 0, at which the power goes; None for never.
    """

    def __init__(self, top: Path) -> None:
        self._top = os.path.realpath(top)
        self._tree = _Folder()
        self._lock = threading.RLock()
        self.calls: list[tuple[str, str]] = []
        self.cut_at: int | None = None

    def write_file(self, path: str, data: Sequence[memoryview]) -> None:
        with self._call("write_file", path) as (folder, name):
            super().write_file(path, data)
            folder.names[name] = b"".join(data)

    def link(self, source: str, target: str) -> None:
        with self._call("link", target) as (folder, name):
            super().link(source, target)
            folder.names[name] = self._folder_of(source).names[os.path.basename(source)]

    def rename(self, source: str, target: str) -> None:
        with self._call("rename", target) as (folder, name):
            super().rename(source, target)
            folder.names[name] = self._folder_of(source).names.pop(os.path.basename(source))

    def rename_noreplace(self, source: str, target: str) -> None:
        with self._call("rename_noreplace", target) as (folder, name):
            super().rename_noreplace(source, target)
            folder.names[name] = self._folder_of(source).names.pop(os.path.basename(source))

    def unlink(self, path: str) -> None:
        with self._call("unlink", path) as (folder, name):
            super().unlink(path)
            del folder.names[name]

    def mkdir(self, path: str) -> None:
        with self._call("mkdir", path) as (folder, name):
            super().mkdir(path)
            folder.names[name] = _Folder()

    def rmdir(self, path: str) -> None:
        with self._call("rmdir", path) as (folder, name):
            super().rmdir(path)
            del folder.names[name]

    def sync_folder(self, path: str) -> None:
        with self._call("sync_folder", path):
            super().sync_folder(path)
            if os.path.commonpath([self._top, path]) == self._top:
                folder = self._folder_at(path)
                folder.durable = dict(folder.names)

    def after_power_cut(self, target: Path, kept: Callable[[str], bool] = nothing_kept) -> Path:
        """Writes `top` as it would be found after a power cut now.

        Args:
            target: a folder to be made for it.
            kept: tells, by path relative to `top`, whether an unsynced change of that name reached the disk.

        Returns:
            `target`.
        """
        with self._lock:
            _restore(self._tree, target, "", kept)
        return target

    @contextmanager
    def _call(self, call: str, path: str) -> Iterator[tuple[_Folder, str]]:
        with self._lock:
            if self.cut_at is not None and len(self.calls) >= self.cut_at:
                raise PowerCut(f"before {call} of {path}")
            self.calls.append((call, path))
            yield self._folder_of(path), os.path.basename(path)

    def _folder_of(self, path: str) -> _Folder:
        return self._folder_at(os.path.dirname(path))

    def _folder_at(self, path: str) -> _Folder:
        folder = self._tree
        for part in Path(os.path.relpath(path, self._top)).parts:
            # A folder that is not there: the system is about to say so, or ".." leads above `top`.
            below = folder.names.get(part)
            folder = below if isinstance(below, _Folder) else _Folder()
        return folder


def _restore(folder: _Folder, target: Path, path: str, kept: Callable[[str], bool]) -> None:
    target.mkdir()
    for name in sorted(folder.names.keys() | folder.durable.keys()):
        below = f"{path}/{name}" if path else name
        found = (folder.names if kept(below) else folder.durable).get(name)
        if isinstance(found, _Folder):
            _restore(found, target / name, below, kept)
        elif found is not None:
            (target / name).write_bytes(found)
