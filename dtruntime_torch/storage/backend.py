"""The one seam between checkpoints and where they lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from typing_extensions import Buffer

Data = Buffer | Sequence[Buffer]


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a listing.

    Attributes:
        path: relative to the root; a folder ends with the delimiter.
        size: bytes; 0 for a folder.
        modified: seconds since 1970 by the storage's clock; 0.0 for a folder.
    """

    path: str
    size: int
    modified: float


# In a class that has a method `list`, the type of that name is out of reach.
Listing = list[Entry]


@runtime_checkable
class StorageBackend(Protocol):
    """Durable named byte strings.

    Paths are relative, "/"-separated and never leave the root: one that would is an `InvalidArgument`, and a
    symbolic link that leads out of it is a `StorageError`. Where a file is, no files may lie below its path.
    Buffers that are handed over may not change until the call returns, also if it is cancelled; buffers that
    come back belong to the caller. Every method may be awaited from any thread and any event loop. An error
    other than those named says nothing about whether the call took effect.
    """

    @property
    def settle_seconds(self) -> float:
        """For how long a listing on another host may not show a change that was made; 0.0 where each shows all."""

    async def write(self, path: str, data: Data) -> None:
        """Stores `data`, one buffer or several in sequence, in place of what was there.

        All or nothing: a reader sees the old bytes or all of the new. Durable when it returns, with every
        folder that it made.
        """

    async def create(self, path: str, data: Data) -> None:
        """Stores `data` where nothing is, atomically: of many creators at most one succeeds.

        Raises:
            AlreadyExists: something is there, and it is durable.
            UnsuitableStorage: nothing can be created here, now or later.
        """

    async def read(self, path: str) -> Buffer:
        """Returns all bytes.

        Raises:
            NotFound: nothing is there.
        """

    async def read_range(
        self, path: str, offset: int, length: int, *, into: memoryview | None = None
    ) -> Buffer:
        """Returns exactly `length` bytes from `offset`.

        Args:
            path: of the file.
            offset: of the first byte.
            length: how many.
            into: writable bytes, contiguous and `length` long, where they go; it is what is returned. It is the
                call's own until that ends, also if it is cancelled; after a failure its contents are undefined.

        Raises:
            InvalidArgument: `into` is of another length, or cannot be written.
            NotFound: nothing is there.
            StorageError: the file ends before that; nothing was allocated for it.
        """

    async def size(self, path: str) -> int:
        """Returns the number of bytes.

        Raises:
            NotFound: nothing is there.
        """

    async def list(self, prefix: str, delimiter: str | None = None) -> list[Entry]:
        """Returns the entries whose path starts with `prefix`, in the order of their paths.

        With `delimiter="/"`, what lies below a further "/" after the prefix comes as one entry, its folder.
        A write that returned before the call is seen. `delimiter` is "/" or None.
        """

    async def delete(self, path: str) -> None:
        """Removes a file, durably when it returns; an absent one is no error, and then its absence is durable."""

    async def unfinished(self, prefix: str) -> Listing:
        """Returns what writes and creates left behind that never ended, in the order of their paths.

        No other method shows it, and its paths are for people: none of them takes one. What is still being
        written is among it.

        Args:
            prefix: as for `list`; of the path that such a file has.
        """

    async def discard_unfinished(self, prefix: str) -> int:
        """Removes what `unfinished` lists, durably, and returns how many bytes that were.

        Only for a prefix where nobody writes any more, or where whoever does may fail.
        """


def reads_chunks(backend: StorageBackend) -> ReadsChunks | None:
    """The backend as what reads chunks, if it does.

    One that inherits that, but reads in a way of its own, as one that decrypts must, is asked for what it says itself.
    A wrapper whose inner backend does not read chunks has None for the method.
    """
    if not isinstance(backend, ReadsChunks) or getattr(backend, "read_chunks", None) is None:
        return None
    kinds = type(backend).__mro__
    depth = {name: i for i, kind in reversed([*enumerate(kinds)]) for name in vars(kind)}
    return backend if depth.get("read_chunks", 0) <= depth.get("read_range", 0) else None


@runtime_checkable
class ReadsChunks(Protocol):
    """What a backend may have besides: reads straight to where the bytes belong, digested on the way.

    For one whose processes on a host get the bytes that another has read without asking the storage again, as through
    the page cache of a file system.
    """

    async def read_chunks(
        self, path: str, offsets: Sequence[int], into: Sequence[memoryview], chunk_bytes: int
    ) -> bytes:
        """Fills pieces of memory from a file, and digests what arrived.

        Args:
            path: of the file.
            offsets: where each piece begins in it.
            into: the pieces, as for `read_range`; none shares a byte with another.
            chunk_bytes: size of a chunk; chunks are counted from the start of their piece.

        Returns:
            The XXH3-128 digests of all chunks, 16 bytes each, in the order of the pieces.

        Raises:
            NotFound: nothing is there.
            StorageError: the file ends before that, or could not be read.
        """
