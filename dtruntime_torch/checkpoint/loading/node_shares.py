"""Who of the ranks of one node reads what, so that each byte is read once there. Pure.

What only one rank wants it reads for itself. What several want is cut into as many shares as there are ranks, alike in
bytes, each a row of neighbours in the files. A tensor is cut only where the shares would else be uneven, because one
that lies in two shares has to be put together.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dtruntime_torch.checkpoint.format.records import Part
from dtruntime_torch.checkpoint.loading.chunk_needs import Needs, Range, Run, merge, runs_of

UNEVEN = 16
"""A run shorter than this part of a share is not cut."""


@dataclass(frozen=True, slots=True)
class Shares:
    """What each rank of a node reads, by its position among them.

    Attributes:
        own: what it alone wants.
        common: what it reads for all.
    """

    own: tuple[tuple[Run, ...], ...]
    common: tuple[tuple[Run, ...], ...]

    def files_of(self, position: int) -> list[str]:
        """The files of which this rank checks what is no tensor: those of which it is the first to read."""
        first: dict[str, int] = {}
        for reader, runs in enumerate(zip(self.common, self.own, strict=True)):
            for run in (run for of_kind in runs for run in of_kind):
                first.setdefault(run.path, reader)
        return [path for path, reader in first.items() if reader == position]


def divide(needs: Sequence[Needs], parts: Mapping[int, Part]) -> Shares:
    """Divides what the ranks of a node need.

    Args:
        needs: of each of them.
        parts: rank that saved -> its part.

    Returns:
        Shares in which each needed chunk lies exactly once; every rank comes to the same.
    """
    if len(needs) == 1:
        return Shares((tuple(runs_of(parts, needs[0])),), ((),))
    if all(one == needs[0] for one in needs):
        own: list[Needs] = [{} for _ in needs]
        common: Needs = needs[0]
    else:
        own, common = _sort(needs)
    return Shares(
        own=tuple(tuple(runs_of(parts, one)) for one in own),
        common=_cut(runs_of(parts, common), len(needs), parts),
    )


def _sort(needs: Sequence[Needs]) -> tuple[list[Needs], Needs]:
    """What each wants alone, and what more than one wants."""
    own: list[dict[tuple[int, int], tuple[Range, ...]]] = [{} for _ in needs]
    common: dict[tuple[int, int], tuple[Range, ...]] = {}
    for key in sorted(set().union(*needs)):
        wanted = [one.get(key, ()) for one in needs]
        borders = sorted({border for ranges in wanted for found in ranges for border in found})
        shared: list[Range] = []
        alone: list[list[Range]] = [[] for _ in needs]
        for piece in itertools.pairwise(borders):
            wanting = [i for i, ranges in enumerate(wanted) if _covers(ranges, piece[0])]
            if wanting:
                (alone[wanting[0]] if len(wanting) == 1 else shared).append(piece)
        for mine, ranges in zip(own, alone, strict=True):
            if ranges:
                mine[key] = merge(ranges)
        if shared:
            common[key] = merge(shared)
    return list(own), common


def _covers(ranges: Sequence[Range], chunk: int) -> bool:
    after = bisect_right(ranges, chunk, key=lambda found: found[0])
    return after > 0 and chunk < ranges[after - 1][1]


def _cut(runs: Sequence[Run], count: int, parts: Mapping[int, Part]) -> tuple[tuple[Run, ...], ...]:
    """Cuts neighbours into `count` shares of about the same bytes."""
    total = sum(run.length for run in runs)
    shares: list[list[Run]] = [[] for _ in range(count)]
    done, waiting = 0, list(reversed(runs))
    while waiting:
        run = waiting.pop()
        reader = min(done * count // total, count - 1)
        # Rounded up, so that a run that begins before the border of a share ends or is cut at it, never before.
        room = -(-total * (reader + 1) // count) - done
        chunk_bytes = parts[run.part].chunk_bytes
        kept = _most(run.length, room, chunk_bytes, total // (count * UNEVEN))
        if kept < run.length:
            rest = replace(run, start=run.start + kept, length=run.length - kept, offset=run.offset + kept)
            waiting.append(rest)
            run = replace(run, length=kept)
        shares[reader].append(run)
        done += run.length
    return tuple(map(tuple, shares))


def _most(length: int, room: int, chunk_bytes: int, little: int) -> int:
    """How many bytes of a run go into the room that is left: all of it, or whole chunks."""
    if length - room <= max(little, chunk_bytes):
        return length
    return min(length, max(1, -(-room // chunk_bytes)) * chunk_bytes)
