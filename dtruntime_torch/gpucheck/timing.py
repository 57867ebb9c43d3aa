"""How long work takes on the device."""

from __future__ import annotations

from collections.abc import Callable

from dtruntime_torch.gpucheck.device import Bench

Work = Callable[[], object]


def by_events(bench: Bench, work: Work, launches: int = 1) -> float:
    """Seconds of the device for one piece of work that is enqueued on the current stream.

    Args:
        bench: where.
        work: enqueues it.
        launches: how many are enqueued between two looks at the clock, so that launching hides behind the work.
    """
    start = bench.record()
    for _ in range(launches):
        work()
    return bench.seconds_between(start, bench.record()) / launches


def by_clock(bench: Bench, work: Work) -> float:
    """Seconds of the host for a piece of work and all that it left on the device."""
    bench.synchronize()
    start = bench.clock()
    work()
    bench.synchronize()
    return bench.clock() - start
