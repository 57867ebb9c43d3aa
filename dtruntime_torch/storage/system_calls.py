"""The calls through which `LocalBackend` touches file contents and changes folders, named in one place.

Tests hand in a subclass: one that refuses links, one that fails a sync, one that remembers what was synced.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from typing_extensions import Buffer

from dtruntime_torch import _C


class SystemCalls:
    """The operating system as it is. Every method raises `OSError` as the system does."""

    def write_file(self, path: str, data: Sequence[memoryview]) -> None:
        """Makes a new file of `data`, synced; a file that is there already is an error."""
        _C.write_file(path, data)

    def read_file(self, path: str, offset: int, length: int) -> Buffer:
        """Returns exactly `length` bytes; `EOFError` if the file ends before, and nothing was allocated."""
        return _C.read_file(path, offset, length)

    def read_into(self, path: str, offset: int, target: memoryview, direct: bool) -> None:
        """Fills `target`, past the page cache if `direct`; `EOFError` if the file ends before."""
        _C.read_extents(path, target, [(0, offset, target.nbytes)], direct=direct)

    def read_and_digest(
        self, path: str, offsets: Sequence[int], into: Sequence[memoryview], chunk_bytes: int
    ) -> bytes:
        """Fills the targets and returns the digests of their chunks; `EOFError` if the file ends before."""
        return _C.read_and_digest(path, into, offsets, chunk_bytes)

    def link(self, source: str, target: str) -> None:
        """Gives a file a second name; never replaces one."""
        os.link(source, target)

    def rename(self, source: str, target: str) -> None:
        """Renames a file in place of what `target` was."""
        os.replace(source, target)

    def rename_noreplace(self, source: str, target: str) -> None:
        """Renames a file; never replaces one."""
        _C.rename_noreplace(source, target)

    def unlink(self, path: str) -> None:
        """Removes a file's name."""
        os.unlink(path)

    def mkdir(self, path: str) -> None:
        """Makes one folder in a folder that is there."""
        os.mkdir(path)

    def rmdir(self, path: str) -> None:
        """Removes an empty folder."""
        os.rmdir(path)

    def sync_folder(self, path: str) -> None:
        """Makes the names in a folder durable as they are now; the folder's own name lies in its parent."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
