"""Stored chunks straight into the tensors that they are for, each digested as soon as it is there.

Where something is wrong with a file, `chunk_reader` goes over it once more and says exactly what.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch

from dtruntime_torch import _C
from dtruntime_torch.checkpoint.format.records import Part
from dtruntime_torch.checkpoint.loading.assembly import Staged, scatter
from dtruntime_torch.checkpoint.loading.chunk_needs import Needs, Run, needs_of, runs_of, span_of
from dtruntime_torch.checkpoint.loading.landings import Landing, Landings, from_turn
from dtruntime_torch.checkpoint.loading.share_reader import Suspects, damage_of, explain
from dtruntime_torch.checkpoint.specs import LoadPlan, ReadItem, digest_length
from dtruntime_torch.errors import Damage, StorageError
from dtruntime_torch.storage.backend import ReadsChunks, StorageBackend
from dtruntime_torch.storage.rereads import reread

T = TypeVar("T")

# Bytes of a call: enough to keep all threads busy, and soon over when a load is given up.
CALL_BYTES = 256 << 20
# Bytes of edges that are held at a time.
EDGE_BYTES = 64 << 20
# What is read beside a shard at a time: it stays in the caches until it is copied.
BLOCK_BYTES = 8 << 20
BLOCK_CHUNKS = 8
# As far apart lie the runs that one memory holds, so that the elements of each are aligned.
_ALIGNMENT = 64


async def read_home(
    backend: StorageBackend,
    reader: ReadsChunks,
    name: str,
    parts: Mapping[int, Part],
    landings: Landings,
    homes: Mapping[str, torch.Tensor],
    turn: tuple[int, int] = (0, 1),
) -> list[Damage]:
    """Fills tensors from a checkpoint. The headers of its files are not looked at.

    Args:
        backend: where the checkpoint lies.
        reader: the same, as what reads chunks.
        name: of the checkpoint.
        parts: rank that saved -> its part.
        landings: what to read.
        homes: fqn -> the memory of the shard: on the host, contiguous, of the stored dtype. Undefined where damage is
            returned or an error raised.
        turn: which of how many ranks of the host this is; each begins elsewhere.

    Returns:
        All damage, as `chunk_reader.check_entries` gives it.

    Raises:
        StorageError: the storage failed otherwise; nothing is known of the bytes.
    """
    home = _HomeReader(backend, reader, name, parts, homes)
    await home.read_straight(from_turn(landings.straight, *turn))
    await home.read_edges(landings.edges)
    for fqn, items in landings.scattered.items():
        await home.read_scattered(fqn, items)
    return home.damage + await explain(backend, name, parts, home.runs, home.suspects)


class _HomeReader:
    """One call of `read_home`."""

    def __init__(
        self,
        backend: StorageBackend,
        reader: ReadsChunks,
        name: str,
        parts: Mapping[int, Part],
        homes: Mapping[str, torch.Tensor],
    ) -> None:
        self._backend = backend
        self._reader = reader
        self._name = name
        self._parts = parts
        self._homes = homes
        self._memory: dict[str, memoryview] = {}
        self._scratch = memoryview(bytearray())
        self.runs: list[Run] = []
        self.damage: list[Damage] = []
        self.suspects: Suspects = {}

    async def read_straight(self, landings: Sequence[Landing]) -> None:
        for some in _together(landings, _nbytes_of, CALL_BYTES):
            await self._read([(one.run, self._place(one)) for one in some])

    async def read_edges(self, landings: Sequence[Landing]) -> None:
        """Reads chunks of which a part is wanted beside the tensors, and copies that part."""
        for some in _together(landings, _nbytes_of, EDGE_BYTES):
            placed = self._beside([one.run for one in some])
            await self._read(placed)
            for landing, (_, memory) in zip(some, placed, strict=True):
                wanted = memory[landing.skip : landing.skip + landing.length]
                self._place(landing)[:] = wanted

    async def read_scattered(self, fqn: str, items: Sequence[ReadItem]) -> None:
        """Reads the chunks of a shard beside it, some rows at a time, and copies its boxes."""
        limit = max(BLOCK_BYTES, BLOCK_CHUNKS * max(self._parts[item.rank].chunk_bytes for item in items))
        pieces = (piece for item in items for piece in self._rows_of(item, limit))
        for some in _together(pieces, self._stored_span, limit):
            placed = self._beside(runs_of(self._parts, self._needs(some)))
            await self._read(placed)
            staged = Staged()
            for run, memory in placed:
                staged.add([(run, 0)], memory)
            scatter(self._homes[fqn], some, self._parts, staged)

    def _rows_of(self, item: ReadItem, limit: int) -> Iterator[ReadItem]:
        """Cuts a box into some rows each, for which about that many stored bytes are read.

        A chunk in which one ends and the next begins is read twice; they are some chunks long, so that this is little.
        """
        step = max(1, item.shape[0] * limit // self._stored_span(item))
        for row in range(0, item.shape[0], step):
            yield replace(
                item,
                source=(item.source[0] + row, *item.source[1:]),
                target=(item.target[0] + row, *item.target[1:]),
                shape=(min(step, item.shape[0] - row), *item.shape[1:]),
            )

    def _stored_span(self, item: ReadItem) -> int:
        start, stop = span_of(self._parts[item.rank].tensors[item.entry], item)
        return stop - start

    def _needs(self, items: Sequence[ReadItem]) -> Needs:
        return needs_of(LoadPlan(tuple(items)), self._parts)

    def _place(self, landing: Landing) -> memoryview:
        """The memory of what is wanted of a landing."""
        if landing.fqn not in self._memory:
            home = self._homes[landing.fqn].detach()
            self._memory[landing.fqn] = home.reshape(-1).view(torch.uint8).numpy().data
        return self._memory[landing.fqn][landing.at : landing.at + landing.length]

    def _beside(self, runs: Sequence[Run]) -> list[tuple[Run, memoryview]]:
        """Memory for runs that is used again for the next ones."""
        starts = list(
            itertools.accumulate((run.length + -run.length % _ALIGNMENT for run in runs), initial=0)
        )
        if self._scratch.nbytes < starts[-1]:
            # A new one: views of the old one may be alive still.
            self._scratch = memoryview(_C.Arena(starts[-1]))
        return [(run, self._scratch[at : at + run.length]) for run, at in zip(runs, starts, strict=False)]

    async def _read(self, placed: Sequence[tuple[Run, memoryview]]) -> None:
        """Reads runs to their places and compares the digests of what arrived."""
        self.runs += [run for run, _ in placed]
        for (path, chunk_bytes), alike in itertools.groupby(placed, key=self._file_of):
            pairs = list(alike)
            if path in self.suspects:
                continue  # it will be gone over once more
            offsets, targets = [run.offset for run, _ in pairs], [memory for _, memory in pairs]
            try:
                read = partial(
                    self._reader.read_chunks, f"{self._name}/{path}", offsets, targets, chunk_bytes
                )
                found = await reread(read)
                needed = sum(digest_length(run.length, chunk_bytes) for run, _ in pairs)
                if len(found) != needed:
                    raise StorageError(
                        f"{self._name}/{path} gave {len(found)} bytes of digests, not {needed}"
                    )
            except StorageError as error:
                self.suspects.setdefault(path, error)
                continue
            self.damage += damage_of(self._name, self._parts, (run for run, _ in pairs), chunk_bytes, found)

    def _file_of(self, pair: tuple[Run, memoryview]) -> tuple[str, int]:
        run, _ = pair
        return run.path, self._parts[run.part].chunk_bytes


def _nbytes_of(landing: Landing) -> int:
    return landing.run.length


def _together(things: Iterable[T], size_of: Callable[[T], int], limit: int) -> Iterator[list[T]]:
    """Takes things in turn, about that many bytes at a time."""
    some: list[T] = []
    total = 0
    for thing in things:
        some.append(thing)
        total += size_of(thing)
        if total >= limit:
            yield some
            some, total = [], 0
    if some:
        yield some
