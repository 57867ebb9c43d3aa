"""Tensors out of the memory that stored chunks were read into.

A shard that was stored as it is wanted is no copy: its tensor is that memory.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from dtruntime_torch import _C
from dtruntime_torch.checkpoint.format.records import Part, TensorEntry
from dtruntime_torch.checkpoint.loading.chunk_needs import Run, span_of
from dtruntime_torch.checkpoint.specs import LoadPlan, ReadItem, Shape, TensorSpec

# From here on memory of its own in huge pages is had sooner than from the heap.
OWN_PAGES_FROM = 4 << 20


class _Piece(NamedTuple):
    """Bytes of a stored shard from `start` on, at a place in memory."""

    start: int
    stop: int
    memory: memoryview
    at: int

    def slice(self, start: int, stop: int) -> memoryview:
        return self.memory[self.at + start - self.start : self.at + stop - self.start]


class Staged:
    """Chunks in memory, by the stored shard that they are of."""

    def __init__(self) -> None:
        self._pieces: dict[tuple[int, int], list[_Piece]] = {}

    def add(self, runs: Iterable[tuple[Run, int]], memory: memoryview) -> None:
        """Adds runs that were read into this memory, each at its place; those of a shard in any order."""
        for run, at in runs:
            pieces = self._pieces.setdefault((run.part, run.entry), [])
            insort(
                pieces, _Piece(run.start, run.start + run.length, memory, at), key=lambda piece: piece.start
            )

    def range(self, part: int, entry: int, start: int, stop: int, size: int) -> memoryview:
        """The bytes [start, stop) of a stored shard, aligned to `size`; undefined where they were not added."""
        pieces = self._pieces[part, entry]
        first = bisect_right(pieces, start, key=lambda piece: piece.start) - 1
        if first >= 0:
            found = _row_from(pieces, first, stop)
            if stop <= found.stop and _address(found.slice(start, stop)) % size == 0:
                return found.slice(start, stop)
        whole = _new_bytes(stop - start)
        for piece in pieces[max(first, 0) :]:
            begin, end = max(piece.start, start), min(piece.stop, stop)
            if begin < end:
                whole[begin - start : end - start] = piece.slice(begin, end)
        return whole


def _row_from(pieces: Sequence[_Piece], first: int, stop: int) -> _Piece:
    """A piece and those after it that lie behind each other in memory as in the shard, until `stop`."""
    found = pieces[first]
    for piece in pieces[first + 1 :]:
        follows = piece.start == found.stop and piece.at == found.at + found.stop - found.start
        if found.stop >= stop or not follows or piece.memory is not found.memory:
            break
        found = found._replace(stop=piece.stop)
    return found


class Assembled(Mapping[str, torch.Tensor]):
    """The wanted shards: fqn -> tensor on the host, contiguous.

    Put together when it is asked for, and not kept, so that there is never more than one beside what was staged. Who
    wants to keep them makes a dict of it.

    Args:
        plan: the boxes of which they consist.
        specs: the wanted shards.
        parts: rank that saved -> its part.
        staged: holds all chunks that the plan needs, but for those of shards in `homes`.
        homes: fqn -> a wanted shard that is there already.
    """

    def __init__(
        self,
        plan: LoadPlan,
        specs: Sequence[TensorSpec],
        parts: Mapping[int, Part],
        staged: Staged,
        homes: Mapping[str, torch.Tensor],
    ) -> None:
        self._specs = {spec.fqn: spec for spec in specs}
        self._boxes: dict[str, list[ReadItem]] = {fqn: [] for fqn in self._specs}
        for item in plan.items:
            self._boxes[item.wanted.fqn].append(item)
        self._parts = parts
        self._staged = staged
        self._homes = homes

    def __getitem__(self, fqn: str) -> torch.Tensor:
        if fqn in self._homes:
            return self._homes[fqn]
        return _assemble(self._specs[fqn], self._boxes[fqn], self._parts, self._staged)

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)


def _assemble(
    spec: TensorSpec, items: Sequence[ReadItem], parts: Mapping[int, Part], staged: Staged
) -> torch.Tensor:
    if len(items) == 1 and items[0].shape == spec.shape:
        return _stored_box(parts[items[0].rank].tensors[items[0].entry], items[0], staged).contiguous()
    dtype = getattr(torch, spec.dtype)
    count = torch.Size(spec.shape).numel()
    tensor = _tensor_on(_new_bytes(count * dtype.itemsize), dtype).view(spec.shape)
    scatter(tensor, items, parts, staged)
    return tensor


def scatter(
    tensor: torch.Tensor, items: Sequence[ReadItem], parts: Mapping[int, Part], staged: Staged
) -> None:
    """Copies the boxes of a wanted shard to their places in it."""
    with torch.no_grad():
        for item in items:
            box = _stored_box(parts[item.rank].tensors[item.entry], item, staged)
            tensor.detach()[_slices(item.target, item.shape)] = box


def _stored_box(entry: TensorEntry, item: ReadItem, staged: Staged) -> torch.Tensor:
    """A box of a stored shard, on the memory where that lies."""
    start, stop = span_of(entry, item)
    dtype = getattr(torch, entry.dtype)
    flat = _tensor_on(staged.range(item.rank, item.entry, start, stop, dtype.itemsize), dtype)
    strides = [torch.Size(entry.shape[axis + 1 :]).numel() for axis in range(len(entry.shape))]
    return flat.as_strided(item.shape, strides)


def _tensor_on(data: memoryview, dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(data, dtype=dtype) if data.nbytes else torch.empty(0, dtype=dtype)


def _new_bytes(nbytes: int) -> memoryview:
    return memoryview(_C.Arena(nbytes) if nbytes >= OWN_PAGES_FROM else bytearray(nbytes))


def _address(data: memoryview) -> int:
    return torch.frombuffer(data, dtype=torch.uint8).data_ptr()


def _slices(offsets: Shape, shape: Shape) -> tuple[slice, ...]:
    return tuple(slice(start, start + size) for start, size in zip(offsets, shape, strict=True))
