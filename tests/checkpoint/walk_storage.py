"""The storage of a walk: calls that wait to be answered, and a disk that is a value."""

from __future__ import annotations

from collections.abc import Coroutine, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dtruntime_torch.errors import AlreadyExists, NotFound, StorageError
from dtruntime_torch.storage import MemoryBackend
from dtruntime_torch.storage.arguments import as_views
from dtruntime_torch.storage.backend import Data, Entry

Answer = Any  # what a call returned, or the class of what it raised


@dataclass(frozen=True, slots=True)
class Call:
    operation: str
    path: str
    data: bytes = b""

    def __await__(self) -> Generator[Call, Answer, Answer]:
        return (yield self)


class Scheduled:
    """A storage each of whose calls suspends its process until the walk answers it."""

    settle_seconds = 0.0

    async def write(self, path: str, data: Data) -> None:
        await Call("write", path, b"".join(as_views(data)))

    async def create(self, path: str, data: Data) -> None:
        await Call("create", path, b"".join(as_views(data)))

    async def read(self, path: str) -> bytes:
        return await Call("read", path)

    async def size(self, path: str) -> int:
        return await Call("size", path)

    async def list(self, prefix: str, delimiter: str | None = None) -> list[Entry]:
        return list(await Call("list", prefix, (delimiter or "").encode()))

    async def delete(self, path: str) -> None:
        await Call("delete", path)

    async def unfinished(self, prefix: str) -> Sequence[Entry]:
        return []

    async def discard_unfinished(self, prefix: str) -> int:
        return 0


Files = frozenset[tuple[str, bytes]]


@dataclass(frozen=True, slots=True)
class Disk:
    """What lies on storage, and creates that were given up and may still be done."""

    files: Files = frozenset()
    late: frozenset[Call] = frozenset()


def ways(disk: Disk, call: Call, may_lose: bool) -> Iterator[tuple[Disk, Answer, int]]:
    """How a call may end: the disk then, the answer, and how many answers were lost."""
    files, answer = do(disk.files, call)
    yield Disk(files, disk.late), answer, 0
    if call.operation == "create" and may_lose:
        yield disk, StorageError, 1
        yield Disk(disk.files, disk.late | {call}), StorageError, 1
        if files != disk.files:
            yield Disk(files, disk.late), StorageError, 1


def come_late(disk: Disk) -> list[Disk]:
    """What creates that were given up lead to if they are done after all, one of them each time."""
    return [Disk(do(disk.files, call)[0], disk.late - {call}) for call in disk.late]


def do(files: Files, call: Call) -> tuple[Files, Answer]:
    """Does a call on a storage that holds these files."""
    backend = MemoryBackend()
    for path, data in sorted(files):
        at_once(backend.write(path, data))
    try:
        answer = at_once(_perform(backend, call))
    except (AlreadyExists, NotFound) as error:
        return files, type(error)
    if call.operation in ("read", "list", "size"):
        return files, answer
    listed = at_once(backend.list(""))
    return frozenset((entry.path, bytes(at_once(backend.read(entry.path)))) for entry in listed), None


async def _perform(backend: MemoryBackend, call: Call) -> Answer:
    if call.operation == "list":
        found = await backend.list(call.path, call.data.decode() or None)
        return tuple(Entry(entry.path, entry.size, 0.0) for entry in found)
    if call.operation == "read":
        return bytes(await backend.read(call.path))
    if call.operation == "size":
        return await backend.size(call.path)
    if call.operation == "delete":
        return await backend.delete(call.path)
    return await getattr(backend, call.operation)(call.path, call.data)


def at_once(coroutine: Coroutine[object, object, Any]) -> Any:
    """Runs a coroutine that never has to wait."""
    try:
        coroutine.send(None)
    except StopIteration as stopped:
        return stopped.value
    raise AssertionError("it waits")
