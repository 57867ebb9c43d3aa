"""Whether bytes on storage are those that were committed, and if not, exactly which are not.

Two requests are under way at a time, so that one is digested while the next arrives, and checking a checkpoint
of any size takes the memory of two.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TypeVar

from typing_extensions import Buffer

from dtruntime_torch import _C
from dtruntime_torch.checkpoint.format.records import FileRef, Part, TensorEntry
from dtruntime_torch.checkpoint.loading.chunk_needs import Run
from dtruntime_torch.checkpoint.loading.read_requests import (
    Piece,
    ReadRequest,
    pieces_by_file,
    requests_for,
    split_at,
)
from dtruntime_torch.checkpoint.specs import DIGEST_BYTES, digest_length
from dtruntime_torch.errors import Damage, NotFound, StorageError
from dtruntime_torch.storage.backend import StorageBackend
from dtruntime_torch.storage.rereads import UNREADABLE, is_unreadable, reread
from dtruntime_torch.storage.sync import in_thread

REQUESTS_AT_A_TIME = 2
MISSING = "missing"

R = TypeVar("R")


async def check_entries(
    backend: StorageBackend,
    name: str,
    part: Part,
    wanted: Iterable[int],
    on_bytes: Callable[[int], object] | None = None,
) -> list[Damage]:
    """Checks every chunk of tensors of a part, and the header of every file that they are in.

    Args:
        backend: where the checkpoint lies.
        name: of the checkpoint.
        part: describes the tensors.
        wanted: positions among the part's tensors.
        on_bytes: called with the number of bytes of tensors that were just checked.

    Returns:
        All damage, by file and position; a file that is missing or has another length is damage too, and so is what
        the device cannot read.

    Raises:
        StorageError: the storage failed otherwise; nothing is known of the bytes.
    """
    pieces = pieces_by_file(part, wanted)
    return await _Reader(backend, name, part, on_bytes).read_files(pieces)


async def check_part(
    backend: StorageBackend, name: str, part: Part, on_bytes: Callable[[int], object] | None = None
) -> list[Damage]:
    """Checks every tensor of a part, and every file that it names, be there tensors in it or not.

    The arguments, the result and the errors are those of `check_entries`.
    """
    pieces = pieces_by_file(part, range(len(part.tensors)))
    of_files = {file: pieces.get(file, []) for file in range(len(part.files))}
    return await _Reader(backend, name, part, on_bytes).read_files(of_files)


async def check_files(backend: StorageBackend, name: str, part: Part, paths: Collection[str]) -> list[Damage]:
    """Checks length and header of files that a part names, and none of its tensors.

    The result and the errors are those of `check_entries`.

    Args:
        backend: where the checkpoint lies.
        name: of the checkpoint.
        part: names the files.
        paths: of the files; those that the part does not name are left out.
    """
    chosen: dict[int, list[Piece]] = {n: [] for n, file in enumerate(part.files) if file.path in paths}
    return await _Reader(backend, name, part, None).read_files(chosen)


def changed_chunks(
    path: str, entry: TensorEntry, chunk_bytes: int, place: Piece | Run, found: bytes
) -> Iterator[Damage]:
    """Compares the digests of whole chunks with those that were committed.

    Args:
        path: of the file, from the root of the storage.
        entry: the stored tensor that they are of.
        chunk_bytes: size of a chunk.
        place: where they lie in the tensor and in the file.
        found: their digests, as they were read.
    """
    first = place.start // chunk_bytes * DIGEST_BYTES
    expected = entry.digests[first : first + len(found)]
    if expected == found:
        return
    for number, at in enumerate(range(0, len(found), DIGEST_BYTES)):
        here, there = expected[at : at + DIGEST_BYTES], found[at : at + DIGEST_BYTES]
        if here != there:
            start = place.offset + number * chunk_bytes
            stop = min(start + chunk_bytes, place.offset + place.length)
            yield Damage(path, entry.fqn, start, stop, here.hex(), there.hex())


class _Reader:
    """One call of `check_entries` or `check_part`."""

    def __init__(
        self,
        backend: StorageBackend,
        name: str,
        part: Part,
        on_bytes: Callable[[int], object] | None,
    ) -> None:
        self._backend = backend
        self._name = name
        self._part = part
        self._on_bytes = on_bytes or (lambda _: None)
        self._gate = asyncio.Semaphore(REQUESTS_AT_A_TIME)
        self._unreadable: set[str] = set()  # files on which patience was spent already

    async def read_files(self, pieces: Mapping[int, Sequence[Piece]]) -> list[Damage]:
        damage: list[Damage] = []
        for file in sorted(pieces):
            damage += await self._read_file(file, pieces[file])
        return damage

    async def _read_file(self, file: int, pieces: Sequence[Piece]) -> list[Damage]:
        known = self._part.files[file]
        size = await self._size(known)
        if isinstance(size, str):
            self._on_bytes(sum(piece.length for piece in pieces))
            return [Damage(self._path(known), None, 0, known.length, f"{known.length} bytes", size)]
        there, lost = split_at(pieces, size, self._part.chunk_bytes)
        damage = self._check_length(known, size) + self._lose(known, lost)
        if known.header_length <= size:
            damage += await self._check_header(known)
        for found in await _all([self._serve(request) for request in requests_for(file, there)]):
            damage += found
        return sorted(damage, key=lambda found: (found.start, found.stop))

    async def _serve(self, request: ReadRequest) -> list[Damage]:
        damage = await self._check_request(request)
        if damage is None:
            return [found for chunk in self._chunks(request) for found in await self._serve_chunk(chunk)]
        return damage

    async def _serve_chunk(self, chunk: ReadRequest) -> list[Damage]:
        """Of what cannot be read together, each chunk that cannot be read alone is damaged."""
        damage = await self._check_request(chunk)
        if damage is not None:
            return damage
        self._on_bytes(chunk.length)
        (piece,) = chunk.pieces
        tensor = self._part.tensors[piece.entry]
        first = piece.start // self._part.chunk_bytes * DIGEST_BYTES
        expected = tensor.digests[first : first + DIGEST_BYTES].hex()
        path, stop = self._path(self._part.files[chunk.file]), chunk.offset + chunk.length
        return [Damage(path, tensor.fqn, chunk.offset, stop, expected, UNREADABLE)]

    def _chunks(self, request: ReadRequest) -> Iterator[ReadRequest]:
        chunk_bytes = self._part.chunk_bytes
        for piece in request.pieces:
            for at in range(0, piece.length, chunk_bytes):
                length = min(chunk_bytes, piece.length - at)
                chunk = Piece(piece.entry, piece.offset + at, length, piece.start + at)
                yield ReadRequest(request.file, chunk.offset, length, (chunk,))

    async def _check_request(self, request: ReadRequest) -> list[Damage] | None:
        """Its damage; None if the device cannot read it."""
        known = self._part.files[request.file]
        async with self._gate:
            data = await self._read_range(known, request.offset, request.length)
            if isinstance(data, str):
                return None if data == UNREADABLE else self._lose(known, request.pieces)
            damage = await in_thread(partial(self._check, request, memoryview(data).cast("B")))
        self._on_bytes(sum(piece.length for piece in request.pieces))
        return damage

    def _check(self, request: ReadRequest, data: memoryview) -> list[Damage]:
        pieces, chunk_bytes = request.pieces, self._part.chunk_bytes
        places = [piece.offset - request.offset for piece in pieces]
        found = _C.digest_ranges(data, places, [piece.length for piece in pieces], chunk_bytes)
        damage: list[Damage] = []
        done = 0
        for piece in pieces:
            size = digest_length(piece.length, chunk_bytes)
            path, entry = self._path(self._part.files[request.file]), self._part.tensors[piece.entry]
            damage += changed_chunks(path, entry, chunk_bytes, piece, found[done : done + size])
            done += size
        return damage

    def _check_length(self, known: FileRef, size: int) -> list[Damage]:
        if size == known.length:
            return []
        start, stop = sorted((size, known.length))
        return [Damage(self._path(known), None, start, stop, f"{known.length} bytes", f"{size} bytes")]

    async def _check_header(self, known: FileRef) -> list[Damage]:
        header = await self._read_range(known, 0, known.header_length)
        found = header if isinstance(header, str) else _C.digest(header, known.header_length).hex()
        if found == known.header_digest.hex():
            return []
        return [Damage(self._path(known), None, 0, known.header_length, known.header_digest.hex(), found)]

    def _lose(self, known: FileRef, pieces: Sequence[Piece]) -> list[Damage]:
        """What to say of pieces that the file no longer has."""
        self._on_bytes(sum(piece.length for piece in pieces))
        return [
            Damage(
                self._path(known),
                self._part.tensors[piece.entry].fqn,
                piece.offset,
                piece.offset + piece.length,
                f"{piece.length} bytes",
                MISSING,
            )
            for piece in pieces
        ]

    async def _read_range(self, known: FileRef, offset: int, length: int) -> Buffer | str:
        """The bytes, or why there are none: the file lost them since its length was looked at, or is unreadable."""
        try:
            data = await self._patiently(
                known, lambda: self._backend.read_range(self._path(known), offset, length)
            )
            return data if memoryview(data).nbytes == length else MISSING
        except NotFound:
            return MISSING
        except StorageError as error:
            if is_unreadable(self._backend, error):
                return UNREADABLE
            size = await self._size(known)
            if isinstance(size, str) or size < offset + length:
                return MISSING
            raise

    async def _size(self, known: FileRef) -> int | str:
        """The length of a file, or why it has none."""
        try:
            return await self._patiently(known, lambda: self._backend.size(self._path(known)))
        except NotFound:
            return MISSING
        except StorageError as error:
            if is_unreadable(self._backend, error):
                return UNREADABLE
            raise

    async def _patiently(self, known: FileRef, read: Callable[[], Awaitable[R]]) -> R:
        """Reads; on each file patience is spent once, for a device that has died would ask for it at every read."""
        if known.path in self._unreadable:
            return await read()
        try:
            return await reread(read)
        except StorageError as error:
            if is_unreadable(self._backend, error):
                self._unreadable.add(known.path)
            raise

    def _path(self, known: FileRef) -> str:
        return f"{self._name}/{known.path}"


async def _all(calls: Sequence[Coroutine[None, None, list[Damage]]]) -> list[list[Damage]]:
    """Runs the calls together; when one fails, none is left running."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
