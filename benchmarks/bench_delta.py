"""Saves of 256 MiB of which some changed: deltas against full saves, in time and in bytes written.

Ours and the peer are two managers that save one state of 256 tensors of 1 MiB in turns, with the call, the commit and
all. Before each save the same tensors change, so for both the same has changed since their last save. On tmpfs the
figures are the program's own cost; the disk is that of `tempfile.gettempdir()`.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Literal

import torch

import dtruntime_torch as dt
from benchmarks.harness import Case, main

TENSORS = 256
TENSOR_BYTES = 1 << 20
NBYTES = TENSORS * TENSOR_BYTES
PERCENT = (0, 1, 10, 50, 100)
PLACES = {"disk": None, "tmpfs": "/dev/shm"}
CLOCKS: tuple[Literal["wall", "written"], ...] = ("wall", "written")
# So that also a save of which all changed is one.
ALWAYS = dt.DeltaPolicy(max_changed=1.0)


@cache
def state() -> dict[str, torch.Tensor]:
    """Bytes that do not compress."""
    generator = torch.Generator().manual_seed(0)
    return {
        f"layers.{i}.weight": torch.randint(1 << 40, (TENSOR_BYTES // 8,), generator=generator)
        for i in range(TENSORS)
    }


class Saves:
    """The saves of one manager, each a step after the last."""

    def __init__(self, place: str, delta: bool | dt.DeltaPolicy) -> None:
        folder = tempfile.mkdtemp(dir=PLACES[place], prefix="bench_delta-")
        atexit.register(shutil.rmtree, folder)
        self._manager = dt.CheckpointManager(folder, delta=delta, keep_last_n=2)
        self._step = 0

    def save(self) -> int:
        """Saves, and returns the bytes of data files that this wrote."""
        self._step += 1
        return self._manager.save(state(), self._step).written


@cache
def saves(place: str, delta: bool) -> Saves:
    """One manager for all cases, warmed up by a full save."""
    made = Saves(place, ALWAYS if delta else False)
    made.save()
    return made


def save(place: str, delta: bool) -> int:
    """Saves once more there, and returns the bytes that this wrote."""
    return saves(place, delta).save()


def changer(tensors: int) -> Callable[[], None]:
    """Changes an element of so many tensors, spread over the state."""
    chosen = list(state().values())[:: max(1, TENSORS // max(1, tensors))][:tensors]

    def change() -> None:
        for tensor in chosen:
            tensor[0] += 1

    return change


def cases() -> Iterator[Case]:
    """Time and bytes for each share that changed."""
    for place in PLACES:
        for percent in PERCENT:
            tensors = -(-TENSORS * percent // 100)
            for clock in CLOCKS:
                if clock == "written" and (place == "disk" or not tensors):
                    continue
                yield Case(
                    metric=f"delta/256MiB, {percent}% changed/{place}, {'time' if clock == 'wall' else 'bytes'}",
                    ours=partial(save, place, True),
                    peer=partial(save, place, False),
                    peer_name="a full save",
                    nbytes=NBYTES,
                    goal=round(0.9 * TENSORS / tensors, 2) if clock == "written" else None,
                    clock=clock,
                    before=changer(tensors),
                )


if __name__ == "__main__":
    main(cases)
