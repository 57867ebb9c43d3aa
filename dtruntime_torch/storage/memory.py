"""A storage in memory: for tests, and the shortest statement of what a backend does."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from typing_extensions import Buffer

from dtruntime_torch.errors import AlreadyExists, NotFound, StorageError
from dtruntime_torch.storage.arguments import as_views, check_path, check_prefix, check_range, check_target
from dtruntime_torch.storage.backend import Data, Entry, Listing


@dataclass(frozen=True, slots=True)
class _File:
    data: bytes
    modified: float


class MemoryBackend:
    """Files that live as long as this object. Its clock is a count: each write is one second after the last.

    Example:
        >>> from dtruntime_torch.storage import run_sync
        >>> backend = MemoryBackend()
        >>> run_sync(backend.write("model/part", [b"head", b"tail"]))
        >>> run_sync(backend.read_range("model/part", 4, 4))
        b'tail'
    """

    settle_seconds = 0.0

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._files: dict[str, _File] = {}
        self._clock = 0.0

    async def write(self, path: str, data: Data) -> None:
        check_path(path)
        self._put(path, b"".join(as_views(data)), may_replace=True)

    async def create(self, path: str, data: Data) -> None:
        check_path(path)
        self._put(path, b"".join(as_views(data)), may_replace=False)

    async def read(self, path: str) -> Buffer:
        return self._get(path)

    async def read_range(
        self, path: str, offset: int, length: int, *, into: memoryview | None = None
    ) -> Buffer:
        check_range(path, offset, length)
        check_target(path, length, into)
        data = self._get(path)
        if offset + length > len(data):
            raise StorageError(
                f"could not read bytes [{offset}, {offset + length}) of {path}: it has only {len(data)}"
            )
        if into is None:
            return data[offset : offset + length]
        into.cast("B")[:] = memoryview(data)[offset : offset + length]
        return into

    async def size(self, path: str) -> int:
        return len(self._get(path))

    async def list(self, prefix: str, delimiter: str | None = None) -> list[Entry]:
        check_prefix(prefix, delimiter)
        with self._lock:
            files = [(path, file) for path, file in self._files.items() if path.startswith(prefix)]
        entries: dict[str, Entry] = {}
        for path, file in files:
            name, slash, _ = path[len(prefix) :].partition("/")
            if delimiter and slash:
                folder = f"{prefix}{name}/"
                entries[folder] = Entry(folder, 0, 0.0)
            else:
                entries[path] = Entry(path, len(file.data), file.modified)
        return [entries[path] for path in sorted(entries)]

    async def delete(self, path: str) -> None:
        check_path(path)
        with self._lock:
            self._files.pop(path, None)

    async def unfinished(self, prefix: str) -> Listing:
        check_prefix(prefix, None)
        return []  # a write is done at once

    async def discard_unfinished(self, prefix: str) -> int:
        check_prefix(prefix, None)
        return 0

    def _put(self, path: str, data: bytes, *, may_replace: bool) -> None:
        with self._lock:
            if not may_replace and path in self._files:
                raise AlreadyExists(f"could not create {path}: it exists already")
            self._clock += 1.0
            self._files[path] = _File(data, self._clock)

    def _get(self, path: str) -> bytes:
        check_path(path)
        with self._lock:
            file = self._files.get(path)
        if file is None:
            raise NotFound(f"could not read {path}: nothing is there")
        return file.data
