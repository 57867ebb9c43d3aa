"""How long work takes on the device."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import TypeVar

from dtruntime_torch.gpucheck.device import Device

Work = Callable[[], object]
Way = TypeVar("Way")


def by_events(device: Device, work: Work, launches: int = 1) -> float:
    """Seconds of the device for one piece of work that is enqueued on the current stream.

    Args:
        device: where.
        work: enqueues it.
        launches: how many are enqueued between two looks at the clock, so that launching hides behind the work.
    """
    start = device.record()
    for _ in range(launches):
        work()
    return device.seconds_between(start, device.record()) / launches


def by_clock(device: Device, work: Work) -> float:
    """Seconds of the host for a piece of work and all that it left on the device."""
    device.synchronize()
    start = device.clock()
    work()
    device.synchronize()
    return device.clock() - start


def in_turns(
    ways: Mapping[str, Way], take: Callable[[Way], float], repetitions: int
) -> dict[str, list[float]]:
    """Times several ways to do something, one after another, after one run of each that is not counted.

    Args:
        ways: by name.
        take: gives the seconds of one run.
        repetitions: how often each is counted.

    Returns:
        The seconds of each run, by name: neighbours in time stand at the same place.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repetition in range(1 + repetitions):
        for name, way in ways.items():
            taken = take(way)
            if repetition:
                seconds[name].append(taken)
    return seconds


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """The median of each."""
    return {name: statistics.median(runs) for name, runs in seconds.items()}
