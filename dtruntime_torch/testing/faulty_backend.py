"""A storage that fails as scripted. Faults come in where storage does, so the code under test is the real one.

A rule says which call (its operation, a pattern of its path, the how many-th such call) meets which fault. A
fault is an async function around the call: it may refuse it, lose its answer, damage what passes, stop for
ever or kill the process.
"""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Literal, cast

from typing_extensions import Buffer

from dtruntime_torch import _C
from dtruntime_torch.errors import InvalidArgument, NotFound, StorageError
from dtruntime_torch.storage.arguments import as_views
from dtruntime_torch.storage.backend import Data, Entry, Listing, ReadsChunks, StorageBackend, reads_chunks

Operation = Literal[
    "write",
    "create",
    "read",
    "read_range",
    "read_chunks",
    "size",
    "list",
    "delete",
    "unfinished",
    "discard_unfinished",
]
ReadChunksMethod = Callable[[str, Sequence[int], Sequence[memoryview], int], Awaitable[bytes]]


@dataclass(frozen=True, slots=True)
class Pieces:
    """Where a `read_chunks` puts what it reads.

    Attributes:
        into: the pieces of memory.
        chunk_bytes: size of a chunk; chunks are counted from the start of their piece.
    """

    into: Sequence[memoryview]
    chunk_bytes: int

    def joined(self) -> bytes:
        """What is there, one piece after the other."""
        return b"".join(self.into)

    def land(self, data: bytes) -> bytes:
        """Puts other bytes there; returns the digests of the chunks that these fill."""
        digests, rest = b"", memoryview(data)
        for piece in self.into:
            whole = _land(rest[: piece.nbytes], piece)
            rest = rest[piece.nbytes :]
            if whole.nbytes < piece.nbytes:
                whole = whole[: whole.nbytes // self.chunk_bytes * self.chunk_bytes]
            digests += _C.digest(whole, self.chunk_bytes)
        return digests


@dataclass
class Call:
    """One call on its way to the inner backend.

    Attributes:
        operation: the method's name.
        path: its path; a listing's prefix.
        data: what a write or create stores; a fault may replace it. None for the others.
        within: the bytes of the file that a `read_range` or `read_chunks` reads, each piece from and up to; None for
            the others.
        pieces: where a `read_chunks` puts them; None for the others.
        run: does the call with `data` as it is then.
    """

    operation: Operation
    path: str
    data: Data | None
    run: Callable[[Data | None], Awaitable[object]]
    within: Sequence[tuple[int, int]] | None = None
    pieces: Pieces | None = None

    async def proceed(self) -> object:
        """Does the call on the inner backend and returns its result."""
        return await self.run(self.data)

    def error(self, what: str) -> StorageError:
        """Describes what a fault did to this call."""
        return StorageError(f"scripted fault: {self.operation} of {self.path} {what}")


Fault = Callable[[Call], Awaitable[object]]


def not_done(error: Exception | None = None) -> Fault:
    """The call has no effect and raises."""

    async def fault(call: Call) -> object:
        raise error if error is not None else call.error("was not done")

    return fault


def lost_answer(error: Exception | None = None) -> Fault:
    """The call takes effect, and raises nevertheless."""

    async def fault(call: Call) -> object:
        await call.proceed()
        raise error if error is not None else call.error("was done, but its answer is lost")

    return fault


def damaged(change: Callable[[bytes], bytes]) -> Fault:
    """The bytes on their way, in or out, are replaced by `change` of them."""

    async def fault(call: Call) -> object:
        if call.data is not None:
            call.data = change(b"".join(as_views(call.data)))
            return await call.proceed()
        if call.pieces is not None:
            await call.proceed()
            return call.pieces.land(change(call.pieces.joined()))
        if call.operation not in ("read", "read_range"):
            raise InvalidArgument(f"a {call.operation} carries no bytes that could be damaged")
        return change(bytes(cast(Buffer, await call.proceed())))

    return fault


def unreadable(start: int = 0, stop: int | None = None) -> Fault:
    """A read that touches these bytes of the file, all without `stop`, ends in EIO, as where a sector is bad."""

    async def fault(call: Call) -> object:
        if call.operation not in ("read", "read_range", "read_chunks"):
            return await call.proceed()
        if call.within is not None and not any(
            last > start and (stop is None or first < stop) for first, last in call.within
        ):
            return await call.proceed()
        error = call.error("met a bad sector")
        error.errno = errno.EIO
        raise error

    return fault


def flipped(position: int) -> Fault:
    """One bit of the byte at `position` is flipped; negative ones count from the end."""

    def change(data: bytes) -> bytes:
        changed = bytearray(data)
        changed[position] ^= 1
        return bytes(changed)

    return damaged(change)


def truncated(length: int) -> Fault:
    """Only the first `length` bytes pass."""
    return damaged(lambda data: data[:length])


def hidden() -> Fault:
    """What is written or deleted silently is not; what is read or listed is not there."""

    async def fault(call: Call) -> object:
        if call.operation in ("read", "read_range", "read_chunks", "size"):
            raise NotFound(f"scripted fault: {call.path} is hidden")
        return {"list": [], "unfinished": [], "discard_unfinished": 0}.get(call.operation)

    return fault


def killed(by: BaseException | None = None) -> Fault:
    """The process ends before the call, without any clean-up; or `by` is raised in its stead."""

    async def fault(call: Call) -> object:
        if by is not None:
            raise by
        os._exit(137)  # the status of a SIGKILL

    return fault


class Stopped:
    """A fault that stops its calls before they take effect, for ever or until `release`.

    Attributes:
        reached: set once a call has come here.
    """

    def __init__(self) -> None:
        self.reached = threading.Event()
        self._lock = threading.Lock()
        self._released = False
        self._waiting: list[Future[None]] = []

    def release(self) -> None:
        """Lets the calls that wait here, and those to come, go on."""
        with self._lock:
            self._released = True
            waiting_now, self._waiting = self._waiting, []
            for waiting in waiting_now:
                if waiting.set_running_or_notify_cancel():
                    waiting.set_result(None)

    async def __call__(self, call: Call) -> object:
        with self._lock:
            # One for each call: a caller that gives up cancels its own and no other's.
            waiting: Future[None] = Future()
            if self._released:
                waiting.set_result(None)
            else:
                self._waiting.append(waiting)
        self.reached.set()
        await asyncio.wrap_future(waiting)
        return await call.proceed()


@dataclass
class _Rule:
    operation: str
    pattern: str
    fault: Fault
    nth: int | None
    seen: int = 0

    def strikes(self, operation: str, path: str) -> bool:
        if not (fnmatchcase(operation, self.operation) and fnmatchcase(path, self.pattern)):
            return False
        self.seen += 1
        return self.nth is None or self.seen == self.nth


class FaultyBackend:
    """A backend around another one that fails as told.

    Args:
        inner: where calls go that no rule stops.

    Attributes:
        calls: (operation, path) of each call so far, in the order in which they came.
        settle_seconds: that of `inner`, unless something else is set.

    Example:
        >>> from dtruntime_torch.storage import MemoryBackend, run_sync
        >>> backend = FaultyBackend(MemoryBackend())
        >>> backend.when("write", "model/*", lost_answer())
        >>> run_sync(backend.write("model/part", b"bytes"))
        Traceback (most recent call last):
        dtruntime_torch.errors.StorageError: scripted fault: write of model/part was done, but its answer is lost
        >>> run_sync(backend.read("model/part"))
        b'bytes'
        >>> backend.calls
        [('write', 'model/part'), ('read', 'model/part')]
    """

    def __init__(self, inner: StorageBackend) -> None:
        self._inner = inner
        self._reader = reads_chunks(inner)
        self.settle_seconds = inner.settle_seconds
        self._lock = threading.Lock()
        self._rules: list[_Rule] = []
        self.calls: list[tuple[str, str]] = []

    def when(self, operation: str, pattern: str, fault: Fault, nth: int | None = 1) -> None:
        """Adds a rule. Where several strike at once, the one that was added first does.

        Args:
            operation: a method's name, or a pattern of them: "*", "read*".
            pattern: of the path, as `fnmatch` reads it; its "*" also stands for "/".
            fault: what happens to the call.
            nth: which of the calls that match, from 1 and from now on; None: each of them.
        """
        with self._lock:
            self._rules.append(_Rule(operation, pattern, fault, nth))

    async def write(self, path: str, data: Data) -> None:
        await self._run("write", path, lambda sent: self._inner.write(path, cast(Data, sent)), data)

    async def create(self, path: str, data: Data) -> None:
        await self._run("create", path, lambda sent: self._inner.create(path, cast(Data, sent)), data)

    async def read(self, path: str) -> Buffer:
        return cast(Buffer, await self._run("read", path, lambda _: self._inner.read(path)))

    async def read_range(
        self, path: str, offset: int, length: int, *, into: memoryview | None = None
    ) -> Buffer:
        def run(_: Data | None) -> Awaitable[object]:
            return self._inner.read_range(path, offset, length, into=into)

        within = [(offset, offset + length)]
        result = cast(Buffer, await self._run("read_range", path, run, within=within))
        return result if into is None else _land(result, into)

    @property
    def read_chunks(self) -> ReadChunksMethod | None:
        """As the inner backend has it; None where that has none."""
        return None if self._reader is None else partial(self._read_chunks, self._reader)

    async def _read_chunks(
        self,
        reader: ReadsChunks,
        path: str,
        offsets: Sequence[int],
        into: Sequence[memoryview],
        chunk_bytes: int,
    ) -> bytes:
        def run(_: Data | None) -> Awaitable[object]:
            return reader.read_chunks(path, offsets, into, chunk_bytes)

        within = [(at, at + piece.nbytes) for at, piece in zip(offsets, into, strict=True)]
        pieces = Pieces(into, chunk_bytes)
        return cast(bytes, await self._run("read_chunks", path, run, within=within, pieces=pieces))

    async def size(self, path: str) -> int:
        return cast(int, await self._run("size", path, lambda _: self._inner.size(path)))

    async def list(self, prefix: str, delimiter: str | None = None) -> list[Entry]:
        result = await self._run("list", prefix, lambda _: self._inner.list(prefix, delimiter))
        return cast("list[Entry]", result)

    async def delete(self, path: str) -> None:
        await self._run("delete", path, lambda _: self._inner.delete(path))

    async def unfinished(self, prefix: str) -> Listing:
        result = await self._run("unfinished", prefix, lambda _: self._inner.unfinished(prefix))
        return cast(Listing, result)

    async def discard_unfinished(self, prefix: str) -> int:
        inner = self._inner
        return cast(
            int, await self._run("discard_unfinished", prefix, lambda _: inner.discard_unfinished(prefix))
        )

    async def _run(
        self,
        operation: Operation,
        path: str,
        run: Callable[[Data | None], Awaitable[object]],
        data: Data | None = None,
        within: Sequence[tuple[int, int]] | None = None,
        pieces: Pieces | None = None,
    ) -> object:
        with self._lock:
            self.calls.append((operation, path))
            striking = [rule.fault for rule in self._rules if rule.strikes(operation, path)]
        call = Call(operation, path, data, run, within, pieces)
        return await (striking[0](call) if striking else call.proceed())


def _land(data: Buffer, into: memoryview) -> memoryview:
    """Puts what a fault made of the bytes where they were to go; of too few, only those are returned."""
    landed, arrived = into.cast("B"), memoryview(data).cast("B")
    count = min(arrived.nbytes, landed.nbytes)
    landed[:count] = arrived[:count]
    return into if arrived.nbytes == landed.nbytes else landed[:count]
