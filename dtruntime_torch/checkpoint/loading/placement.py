"""Where what is read lies in memory, and in which requests it comes. Pure.

A byte lies in its page of memory as it lies in its page of the file, so that it comes past the page cache without a
copy, and is aligned as its tensor needs it. Neighbours in a file are neighbours in memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from dtruntime_torch.checkpoint.loading.chunk_needs import Run
from dtruntime_torch.checkpoint.loading.read_requests import JOIN_BYTES

PAGE_BYTES = 4096

FETCH_BYTES = 8 << 20
"""A fetch ends where the file passes a multiple of this: at a page, and while its bytes are in the caches."""


@dataclass(frozen=True, slots=True)
class Fetch:
    """One request to the storage.

    Attributes:
        path: of the file, relative to the checkpoint's folder.
        offset: first byte in the file.
        length: bytes.
        at: where they go in memory.
    """

    path: str
    offset: int
    length: int
    at: int


@dataclass(frozen=True, slots=True)
class Placement:
    """What one rank reads, in the order of files.

    Attributes:
        runs: with the place of each in memory, which ascends.
        fetches: bring all of them; they ascend in memory too, and none shares a byte with another.
        nbytes: of the memory.
    """

    runs: tuple[tuple[Run, int], ...]
    fetches: tuple[Fetch, ...]
    nbytes: int


def place(runs: Sequence[Run]) -> Placement:
    """Places runs that are in the order of `runs_of`; a short gap between two of a file is read along."""
    placed: list[tuple[Run, int]] = []
    fetches: list[Fetch] = []
    stretch: list[tuple[Run, int]] = []
    end = 0
    for run in runs:
        last = stretch[-1][0] if stretch else None
        gap = run.offset - last.offset - last.length if last is not None else 0
        if last is not None and last.path == run.path and gap <= JOIN_BYTES:
            at = end + gap
        else:
            fetches += _fetches(stretch)
            stretch = []
            at = end + (run.offset - end) % PAGE_BYTES
        stretch.append((run, at))
        placed.append((run, at))
        end = at + run.length
    fetches += _fetches(stretch)
    return Placement(tuple(placed), tuple(fetches), end)


def _fetches(stretch: Sequence[tuple[Run, int]]) -> list[Fetch]:
    if not stretch:
        return []
    (first, at), (last, _) = stretch[0], stretch[-1]
    begin, end = first.offset, last.offset + last.length
    borders = range(begin - begin % FETCH_BYTES + FETCH_BYTES, end, FETCH_BYTES)
    edges = [begin, *borders, end]
    return [
        Fetch(first.path, start, stop - start, at + start - begin)
        for start, stop in itertools.pairwise(edges)
    ]
