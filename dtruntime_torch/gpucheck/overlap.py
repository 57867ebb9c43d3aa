"""Copies to pinned memory run beside computation."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from dtruntime_torch.gpucheck.device import Device, random_bytes
from dtruntime_torch.gpucheck.findings import Check
from dtruntime_torch.gpucheck.sizes import Sizes
from dtruntime_torch.gpucheck.timing import Work, by_events, in_turns, medians

ENOUGH = 0.8  # of the shorter of the two hides behind the other


def check_overlap(device: Device, sizes: Sizes) -> Iterator[Check]:
    """Times a copy, computation of about the same length, and both at once."""
    source = random_bytes(device, sizes.copied_bytes, seed=12)
    target = torch.frombuffer(device.arena(sizes.copied_bytes), dtype=torch.uint8)

    def copy() -> None:
        device.copy(target, source)

    rounds = _rounds_as_long_as(device, copy)

    def both() -> None:
        start = device.record()
        with device.on_side_stream():
            device.wait_for(start)
            copy()
            copied = device.record()
        device.compute(rounds)
        device.wait_for(copied)

    works: dict[str, Work] = {"copy": copy, "compute": lambda: device.compute(rounds), "both": both}
    seconds = medians(in_turns(works, lambda work: by_events(device, work), sizes.repetitions))
    hidden = seconds["copy"] + seconds["compute"] - seconds["both"]
    fraction = hidden / min(seconds["copy"], seconds["compute"])
    took = ", ".join(f"{name} {1e3 * taken:.3f} ms" for name, taken in seconds.items())
    yield Check(
        "overlap/copies beside computation", fraction >= ENOUGH, f"{fraction:.2f} of it hides: {took}"
    )


def _rounds_as_long_as(device: Device, work: Work) -> int:
    """How many rounds of computation take as long as `work`."""
    some = 8
    works: dict[str, Work] = {"work": work, "rounds": lambda: device.compute(some)}
    seconds = medians(in_turns(works, lambda each: by_events(device, each), 3))
    return math.ceil(some * seconds["work"] / seconds["rounds"])
