"""Which stored chunks a load needs, and where in which files they lie. Pure.

A chunk is the least that can be checked, so it is the least that is read: of a shard of which only some rows or columns
are wanted, the chunks that those touch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from dtruntime_torch.checkpoint.dtypes import itemsize
from dtruntime_torch.checkpoint.format.records import Part, TensorEntry
from dtruntime_torch.checkpoint.specs import LoadPlan, ReadItem, Shape

Range = tuple[int, int]
Needs = Mapping[tuple[int, int], tuple[Range, ...]]
"""(rank of a part, position among its tensors) -> ranges [first, stop) of chunks, ascending, none touching another."""


@dataclass(frozen=True, slots=True)
class Run:
    """Whole chunks of one stored tensor that lie in a row in one file.

    Attributes:
        part: rank of the part that describes the tensor.
        entry: position among that part's tensors.
        start: first byte within the tensor, at the border of a chunk.
        length: bytes, at least one.
        path: of the file, relative to the checkpoint's folder.
        offset: first byte in the file.
    """

    part: int
    entry: int
    start: int
    length: int
    path: str
    offset: int


def needs_of(plan: LoadPlan, parts: Mapping[int, Part]) -> Needs:
    """Finds the chunks that the boxes of a plan touch.

    Args:
        plan: what a rank reads.
        parts: rank that saved -> its part.
    """
    ranges: dict[tuple[int, int], list[Range]] = {}
    for item in plan.items:
        part = parts[item.rank]
        touched = _chunks_of(part.tensors[item.entry], item, part.chunk_bytes)
        ranges.setdefault((item.rank, item.entry), []).extend(touched)
    return {key: merge(ranges[key]) for key in sorted(ranges)}


def merge(ranges: Sequence[Range]) -> tuple[Range, ...]:
    """Puts ranges in order and joins those that touch or overlap.

    Example:
        >>> merge([(5, 6), (0, 2), (1, 3), (3, 4)])
        ((0, 4), (5, 6))
    """
    merged: list[Range] = []
    for first, stop in sorted(ranges):
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((first, stop))
    return tuple(merged)


def span_of(entry: TensorEntry, item: ReadItem) -> Range:
    """The first byte of a box within the stored shard, and one past its last."""
    strides = _strides(entry.shape, itemsize(entry.dtype))
    first = offset_of(item.source, entry.shape, itemsize(entry.dtype))
    reach = sum((size - 1) * stride for size, stride in zip(item.shape, strides, strict=True))
    return first, first + reach + itemsize(entry.dtype)


def offset_of(offsets: Shape, shape: Shape, size: int) -> int:
    """The first byte of an element of so many bytes in an array, row by row.

    Example:
        >>> offset_of((1, 2), (3, 10), 4)
        48
    """
    return sum(at * stride for at, stride in zip(offsets, _strides(shape, size), strict=True))


def runs_of(parts: Mapping[int, Part], needs: Needs) -> list[Run]:
    """Where the needed chunks lie: in the order of files, and of each file ascending."""
    runs = [run for key, ranges in needs.items() for run in _runs_of_entry(parts[key[0]], *key, ranges)]
    return sorted(runs, key=lambda run: (run.path, run.offset))


def pack(needs: Needs) -> list[int]:
    """Makes plain integers of needs: part, entry, number of ranges, and the borders of each."""
    packed: list[int] = []
    for (part, entry), ranges in needs.items():
        packed += [part, entry, len(ranges), *itertools.chain.from_iterable(ranges)]
    return packed


def unpack(packed: Sequence[int]) -> Needs:
    """Undoes `pack`.

    Example:
        >>> unpack(pack({(0, 3): ((0, 1), (4, 9))}))
        {(0, 3): ((0, 1), (4, 9))}
    """
    needs: dict[tuple[int, int], tuple[Range, ...]] = {}
    numbers = iter(packed)
    for part in numbers:
        entry, count = next(numbers), next(numbers)
        needs[part, entry] = tuple((next(numbers), next(numbers)) for _ in range(count))
    return needs


def _chunks_of(entry: TensorEntry, item: ReadItem, chunk_bytes: int) -> list[Range]:
    strides = _strides(entry.shape, itemsize(entry.dtype))
    length, axis = itemsize(entry.dtype), len(entry.shape)
    # From the innermost axis out, as long as no whole chunk fits between one row of the box and the next.
    while axis > 0 and strides[axis - 1] - length < chunk_bytes:
        axis -= 1
        length += (item.shape[axis] - 1) * strides[axis]
    first = offset_of(item.source, entry.shape, itemsize(entry.dtype))
    rows = [range(0, item.shape[i] * strides[i], strides[i]) for i in range(axis)]
    starts = (first + sum(moves) for moves in itertools.product(*rows))
    return [(at // chunk_bytes, -(-(at + length) // chunk_bytes)) for at in starts]


def _strides(shape: Shape, size: int) -> list[int]:
    return [size * math.prod(shape[axis + 1 :]) for axis in range(len(shape))]


def _runs_of_entry(part: Part, rank: int, position: int, ranges: Sequence[Range]) -> Iterator[Run]:
    entry = part.tensors[position]
    start, waiting = 0, list(reversed(ranges))
    for extent in entry.extents:
        stop = start + extent.length
        while waiting and waiting[-1][0] * part.chunk_bytes < stop:
            first, last = (border * part.chunk_bytes for border in waiting[-1])
            begin, end = max(first, start), min(last, stop)
            path = part.files[extent.file].path
            yield Run(rank, position, begin, end - begin, path, extent.offset + begin - start)
            if last > stop:
                break
            waiting.pop()
        start = stop
