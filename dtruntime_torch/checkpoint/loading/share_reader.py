"""A share of a checkpoint straight into memory, each chunk digested as soon as it is there.

The quick way through sound files. Where something is wrong with a file, `chunk_reader` goes over it once more and says
exactly what.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from functools import partial

from dtruntime_torch import _C
from dtruntime_torch.checkpoint.format.records import FileRef, Part
from dtruntime_torch.checkpoint.loading.chunk_needs import Run
from dtruntime_torch.checkpoint.loading.chunk_reader import changed_chunks, check_entries, check_files
from dtruntime_torch.checkpoint.loading.placement import Fetch, Placement
from dtruntime_torch.checkpoint.specs import digest_length
from dtruntime_torch.errors import Damage, StorageError
from dtruntime_torch.storage.backend import StorageBackend
from dtruntime_torch.storage.rereads import reread

FETCHES_AT_A_TIME = 4
FILES_AT_A_TIME = 16

Files = Mapping[str, FileRef]
Suspects = dict[str, StorageError]


async def read_share(
    backend: StorageBackend,
    name: str,
    parts: Mapping[int, Part],
    placement: Placement,
    memory: memoryview,
    headers: Iterable[str] = (),
) -> list[Damage]:
    """Reads what was placed, each byte once, and checks every chunk of it.

    Args:
        backend: where the checkpoint lies.
        name: of the checkpoint.
        parts: rank that saved -> its part.
        placement: what to read.
        memory: at least `placement.nbytes` long. Undefined where damage is returned.
        headers: paths of files whose headers to check too.

    Returns:
        All damage, as `chunk_reader.check_entries` gives it.

    Raises:
        StorageError: the storage failed otherwise; nothing is known of the bytes.
    """
    reader = _ShareReader(backend, name, parts, memory)
    reader.suspects |= await check_headers(backend, name, parts, headers)
    await reader.read(placement)
    runs = [run for run, _ in placement.runs]
    return reader.damage + await explain(backend, name, parts, runs, reader.suspects)


async def check_sizes(
    backend: StorageBackend, name: str, parts: Mapping[int, Part], runs: Sequence[Run]
) -> list[Damage]:
    """Compares the files of runs with the lengths that were committed, before memory is taken for what they hold.

    The arguments, the result and the errors are those of `read_share`.
    """
    files = files_of(parts)

    async def check(path: str) -> None:
        size = await backend.size(f"{name}/{path}")
        if size != files[path].length:
            raise StorageError(f"{name}/{path} has {size} bytes, not {files[path].length}")

    suspects = await _suspects(check, dict.fromkeys(run.path for run in runs))
    return await explain(backend, name, parts, runs, suspects)


async def check_headers(
    backend: StorageBackend, name: str, parts: Mapping[int, Part], paths: Iterable[str]
) -> Suspects:
    """Compares the headers of files with the digests that were committed.

    Args:
        backend: as for `read_share`.
        name: as for `read_share`.
        parts: as for `read_share`.
        paths: of the files.

    Returns:
        Those with which something is wrong.
    """
    files = files_of(parts)

    async def check(path: str) -> None:
        known = files[path]
        header = memoryview(bytearray(known.header_length))
        await read_into(backend, f"{name}/{path}", 0, header)
        if _C.digest(header, known.header_length) != known.header_digest:
            raise StorageError(f"the header of {name}/{path} changed")

    return await _suspects(check, paths)


async def _suspects(check: Callable[[str], Awaitable[None]], paths: Iterable[str]) -> Suspects:
    """Checks many files at a time, since an unreadable one is tried for a while. Returns those that failed, and why."""
    room = asyncio.Semaphore(FILES_AT_A_TIME)

    async def look(path: str) -> tuple[str, StorageError | None]:
        try:
            async with room:
                await check(path)
        except StorageError as error:
            return path, error
        return path, None

    found = await asyncio.gather(*map(look, paths))
    return {path: error for path, error in found if error is not None}


async def read_into(backend: StorageBackend, place: str, offset: int, into: memoryview) -> None:
    """Fills memory from a file.

    Raises:
        StorageError: it could not be read, or gave too little.
    """
    read = partial(backend.read_range, place, offset, into.nbytes, into=into)
    got = memoryview(await reread(read)).nbytes
    if got != into.nbytes:
        raise StorageError(f"{place} gave {got} of {into.nbytes} bytes at {offset}")


def damage_of(
    name: str, parts: Mapping[int, Part], runs: Iterable[Run], chunk_bytes: int, found: bytes
) -> Iterator[Damage]:
    """Compares the digests of runs with those that were committed.

    Args:
        name: of the checkpoint.
        parts: rank that saved -> its part.
        runs: whole chunks.
        chunk_bytes: the size of all of them.
        found: the digests of their chunks, in turn, as they were read.
    """
    done = 0
    for run in runs:
        size = digest_length(run.length, chunk_bytes)
        entry, actual = parts[run.part].tensors[run.entry], found[done : done + size]
        yield from changed_chunks(f"{name}/{run.path}", entry, chunk_bytes, run, actual)
        done += size


async def explain(
    backend: StorageBackend,
    name: str,
    parts: Mapping[int, Part],
    runs: Sequence[Run],
    suspects: Suspects,
) -> list[Damage]:
    """Says exactly what is wrong with files that something is wrong with.

    Args:
        backend: as for `read_share`.
        name: as for `read_share`.
        parts: as for `read_share`.
        runs: what was to be read.
        suspects: path of a file -> what its reading ended with.

    Raises:
        StorageError: that, where the file seems sound now.
    """
    damage: list[Damage] = []
    for rank in sorted({run.part for run in runs if run.path in suspects}):
        entries = sorted({run.entry for run in runs if run.part == rank and run.path in suspects})
        damage += await check_entries(backend, name, parts[rank], entries)
    damage += await _explain_unread(backend, name, parts, suspects.keys() - {run.path for run in runs})
    for path, error in suspects.items():
        if not any(found.file == f"{name}/{path}" for found in damage):
            raise error
    return damage


async def _explain_unread(
    backend: StorageBackend, name: str, parts: Mapping[int, Part], paths: Set[str]
) -> list[Damage]:
    """Checks files of which only the header was to be read here, as their tensors are another share's."""
    damage: list[Damage] = []
    left = set(paths)
    for part in parts.values():
        named = left & {file.path for file in part.files}
        damage += await check_files(backend, name, part, named)
        left -= named
    return damage


def files_of(parts: Mapping[int, Part]) -> Files:
    """The files that parts name, by their paths."""
    return {file.path: file for part in parts.values() for file in part.files}


class _ShareReader:
    """One call of `read_share`."""

    def __init__(
        self, backend: StorageBackend, name: str, parts: Mapping[int, Part], memory: memoryview
    ) -> None:
        self._backend = backend
        self._name = name
        self._parts = parts
        self._memory = memory
        self.damage: list[Damage] = []
        self.suspects: Suspects = {}

    async def read(self, placement: Placement) -> None:
        waiting = deque(placement.runs)
        calls = (self._start(fetch) for fetch in placement.fetches)
        async for fetch in _in_turn(calls, FETCHES_AT_A_TIME):
            self._check(list(_arrived(waiting, fetch.at + fetch.length, self._parts)))

    def _start(self, fetch: Fetch) -> Callable[[], Awaitable[Fetch]]:
        async def run() -> Fetch:
            await self._fetch(fetch.path, fetch.offset, self._memory[fetch.at : fetch.at + fetch.length])
            return fetch

        return run

    async def _fetch(self, path: str, offset: int, into: memoryview) -> None:
        if path in self.suspects:
            return  # it will be gone over once more
        try:
            await read_into(self._backend, f"{self._name}/{path}", offset, into)
        except StorageError as error:
            self.suspects.setdefault(path, error)

    def _check(self, runs: Sequence[tuple[Run, int]]) -> None:
        """Digests runs that are there."""
        for chunk_bytes, alike in itertools.groupby(runs, lambda pair: self._parts[pair[0].part].chunk_bytes):
            pairs = [pair for pair in alike if pair[0].path not in self.suspects]
            found = _C.digest_ranges(
                self._memory, [at for _, at in pairs], [run.length for run, _ in pairs], chunk_bytes
            )
            self.damage += damage_of(self._name, self._parts, (run for run, _ in pairs), chunk_bytes, found)


def _arrived(
    waiting: deque[tuple[Run, int]], frontier: int, parts: Mapping[int, Part]
) -> Iterator[tuple[Run, int]]:
    """Takes off what lies before the frontier; of a run that crosses it, the whole chunks before it."""
    while waiting:
        run, at = waiting[0]
        if at + run.length <= frontier:
            yield waiting.popleft()
            continue
        chunk_bytes = parts[run.part].chunk_bytes
        kept = max(0, frontier - at) // chunk_bytes * chunk_bytes
        if kept:
            yield replace(run, length=kept), at
            rest = replace(run, start=run.start + kept, offset=run.offset + kept, length=run.length - kept)
            waiting[0] = rest, at + kept
        return


async def _in_turn(calls: Iterator[Callable[[], Awaitable[Fetch]]], at_a_time: int) -> AsyncIterator[Fetch]:
    """The results of calls in their order, of which a few are always under way; at the end none is."""
    under_way: deque[asyncio.Future[Fetch]] = deque()
    try:
        for call in itertools.chain(calls, itertools.repeat(None)):
            if call is not None:
                under_way.append(asyncio.ensure_future(call()))
            if not under_way:
                return
            if call is None or len(under_way) >= at_a_time:
                yield await under_way.popleft()
    finally:
        for left in under_way:
            left.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)
