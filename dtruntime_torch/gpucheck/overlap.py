"""Copies to pinned memory run beside computation: plain ones, and those of a staging, whose start waits for nothing."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping

import torch

from dtruntime_torch import _C
from dtruntime_torch.gpucheck.comparison import in_turns, medians
from dtruntime_torch.gpucheck.device import Bench, random_bytes
from dtruntime_torch.gpucheck.findings import Check
from dtruntime_torch.gpucheck.sizes import MIB, Sizes
from dtruntime_torch.gpucheck.staging import TIMEOUT
from dtruntime_torch.gpucheck.timing import Work, by_events

ENOUGH = 0.8  # of the shorter of the two hides behind the other
AT_ONCE = 0.5  # of the time of the copies: until then a start has surely returned if it did not wait for them


def check_overlap(bench: Bench, sizes: Sizes) -> Iterator[Check]:
    """Times copies, computation of about the same length, and both at once."""
    source = random_bytes(bench, sizes.copied_bytes, seed=12)
    arena = bench.arena(sizes.copied_bytes)
    target = torch.frombuffer(arena, dtype=torch.uint8)

    def copy() -> None:
        bench.copy(target, source)

    rounds = _rounds_as_long_as(bench, copy)
    yield _plain_copies(bench, sizes, copy, rounds)
    yield from _stagings(bench, sizes, source, arena, rounds)


def _plain_copies(bench: Bench, sizes: Sizes, copy: Work, rounds: int) -> Check:
    """On a stream of normal priority."""

    def both() -> None:
        start = bench.record()
        with bench.on_side_stream():
            bench.wait_for(start)
            copy()
            copied = bench.record()
        bench.compute(rounds)
        bench.wait_for(copied)

    works: dict[str, Work] = {"copy": copy, "compute": lambda: bench.compute(rounds), "both": both}
    seconds = medians(in_turns(works, lambda work: by_events(bench, work), sizes.repetitions))
    return _hides("overlap/copies beside computation", seconds)


def _stagings(
    bench: Bench, sizes: Sizes, source: torch.Tensor, arena: _C.Arena, rounds: int
) -> Iterator[Check]:
    """On the stager's own stream: it is between the two moments, since the current stream is made to wait for it."""
    stager = bench.stager(arena, MIB)
    starts = []

    def staged(beside: int) -> float:
        bench.synchronize()
        before = bench.record()
        began = bench.clock()
        staging = stager.start([(source, 0)])
        starts.append(bench.clock() - began)
        bench.compute(beside)
        staging.before_overwrite(timeout=TIMEOUT)
        seconds = bench.seconds_between(before, bench.record())
        # Only now: the host's digests are not part of it.
        staging.wait(TIMEOUT)
        return seconds

    ways = {
        "copy": lambda: staged(0),
        "compute": lambda: by_events(bench, lambda: bench.compute(rounds)),
        "both": lambda: staged(rounds),
    }
    seconds = medians(in_turns(ways, lambda way: way(), sizes.repetitions))
    yield _hides("overlap/staging beside computation", seconds)
    start = statistics.median(starts)
    yield Check(
        "overlap/start returns while it copies",
        start <= AT_ONCE * seconds["copy"],
        f"start takes {1e3 * start:.3f} ms, the copies {1e3 * seconds['copy']:.3f} ms",
    )


def _hides(name: str, seconds: Mapping[str, float]) -> Check:
    hidden = seconds["copy"] + seconds["compute"] - seconds["both"]
    fraction = hidden / min(seconds["copy"], seconds["compute"])
    took = ", ".join(f"{what} {1e3 * taken:.3f} ms" for what, taken in seconds.items())
    return Check(name, fraction >= ENOUGH, f"{fraction:.2f} of it hides: {took}")


def _rounds_as_long_as(bench: Bench, work: Work) -> int:
    """How many rounds of computation take as long as `work`."""
    some = 8
    works: dict[str, Work] = {"work": work, "rounds": lambda: bench.compute(some)}
    seconds = medians(in_turns(works, lambda each: by_events(bench, each), 3))
    return math.ceil(some * seconds["work"] / seconds["rounds"])
