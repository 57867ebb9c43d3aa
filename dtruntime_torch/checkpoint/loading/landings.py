"""Which of the wanted bytes can be read straight to where they belong, chunk by chunk, and which cannot. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from dtruntime_torch.checkpoint.dtypes import itemsize
from dtruntime_torch.checkpoint.format.records import Part
from dtruntime_torch.checkpoint.loading.chunk_needs import Run, needs_of, offset_of, runs_of, span_of
from dtruntime_torch.checkpoint.specs import LoadPlan, ReadItem, Shape

PIECE_BYTES = 32 << 20
"""A longer run is read in several pieces, so that ranks that begin at different pieces share the work of a big tensor."""


class Landing(NamedTuple):
    """Chunks that lie in a row in a file, and where they belong.

    Attributes:
        run: the chunks.
        fqn: of the wanted shard.
        at: the first byte in its memory.
        skip: bytes of the run that come before what is wanted.
        length: bytes that are wanted.
    """

    run: Run
    fqn: str
    at: int
    skip: int
    length: int


@dataclass(slots=True)
class Landings:
    """How the shards of a rank are read into memory that is theirs.

    Attributes:
        straight: wanted whole, in the order of files.
        edges: of which only some bytes are wanted; one chunk each.
        scattered: fqn -> the boxes of a shard whose bytes do not lie in it as they were stored.
    """

    straight: list[Landing] = field(default_factory=list)
    edges: list[Landing] = field(default_factory=list)
    scattered: dict[str, list[ReadItem]] = field(default_factory=dict)

    def runs(self, parts: Mapping[int, Part]) -> list[Run]:
        """All chunks that are read."""
        items = tuple(item for boxes in self.scattered.values() for item in boxes)
        runs = [landing.run for landing in itertools.chain(self.straight, self.edges)]
        return runs + runs_of(parts, needs_of(LoadPlan(items), parts))


def find_landings(plan: LoadPlan, fqns: Collection[str], parts: Mapping[int, Part]) -> Landings:
    """Says how the boxes of these shards are read.

    Args:
        plan: what a rank reads; what serves other shards is left out.
        fqns: the shards that have memory of their own: contiguous, on the host.
        parts: rank that saved -> its part.
    """
    landings = Landings()
    boxes: dict[str, list[ReadItem]] = {}
    for item in plan.items:
        if item.wanted.fqn in fqns:
            boxes.setdefault(item.wanted.fqn, []).append(item)
    for fqn, items in boxes.items():
        if not all(_is_in_a_row(item, parts) for item in items):
            landings.scattered[fqn] = items
            continue
        for landing in (one for item in items for one in _land(item, parts[item.rank])):
            whole = landing.length == landing.run.length
            (landings.straight if whole else landings.edges).append(landing)
    landings.straight = sorted(landings.straight, key=lambda one: (one.run.path, one.run.offset))
    return landings


def from_turn(landings: list[Landing], turn: int, turns: int) -> list[Landing]:
    """The same in an order of which each of several readers begins elsewhere.

    What one has read by then lies in the page cache for the others, so that the storage is asked once.

    Args:
        landings: in the order of files.
        turn: which of the readers.
        turns: how many there are.
    """
    before = sum(one.length for one in landings) * turn // turns
    for first, landing in enumerate(landings):
        if before <= 0:
            return landings[first:] + landings[:first]
        before -= landing.length
    return landings


def _land(item: ReadItem, part: Part) -> Iterator[Landing]:
    entry, chunk_bytes = part.tensors[item.entry], part.chunk_bytes
    start, stop = span_of(entry, item)
    at = offset_of(item.target, item.wanted.shape, itemsize(entry.dtype))
    chunks = ((start // chunk_bytes, -(-stop // chunk_bytes)),)
    for run in runs_of({item.rank: part}, {(item.rank, item.entry): chunks}):
        for piece in _cut(run, start, stop, chunk_bytes):
            first, last = max(piece.start, start), min(piece.start + piece.length, stop)
            yield Landing(piece, item.wanted.fqn, at + first - start, first - piece.start, last - first)


def _cut(run: Run, start: int, stop: int, chunk_bytes: int) -> list[Run]:
    """Takes the chunks off a run that begin before `start` or end after `stop`, and cuts what is long."""
    if start <= run.start and run.start + run.length <= stop and run.length <= PIECE_BYTES:
        return [run]
    borders = {run.start, run.start + run.length}
    for edge in (start, stop):
        if run.start < edge < run.start + run.length and edge % chunk_bytes:
            first = edge // chunk_bytes * chunk_bytes
            borders |= {first, min(first + chunk_bytes, run.start + run.length)}
    step = max(1, PIECE_BYTES // chunk_bytes) * chunk_bytes
    borders |= set(range(run.start, run.start + run.length, step))
    return [
        replace(run, start=begin, length=end - begin, offset=run.offset + begin - run.start)
        for begin, end in itertools.pairwise(sorted(borders))
    ]


def _is_in_a_row(item: ReadItem, parts: Mapping[int, Part]) -> bool:
    stored = parts[item.rank].tensors[item.entry].shape
    return _is_contiguous(item.shape, stored) and _is_contiguous(item.shape, item.wanted.shape)


def _is_contiguous(box: Shape, shape: Shape) -> bool:
    """Whether the elements of a box are neighbours: whole inner axes, then part of one axis, then single steps."""
    axis = len(shape) - 1
    while axis > 0 and box[axis] == shape[axis]:
        axis -= 1
    return all(size == 1 for size in box[:axis])
