"""The seam: what the checks need from the place where they run.

`cuda_device.CudaBench` is the one for users. The tests put one on the CPU behind it, whose native calls work on host
memory. Work is enqueued on the current stream, in order, and may go on after the call returned.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, TypeAlias

import torch
from torch.distributed.checkpoint.staging import AsyncStager

from dtruntime_torch import _C
from dtruntime_torch.checkpoint.staging.chunk_table import Place
from dtruntime_torch.checkpoint.staging.device import Device
from dtruntime_torch.checkpoint.staging.stager import Stager
from dtruntime_torch.manager import CheckpointManager

# A moment of a stream: whatever the device makes of it.
Moment: TypeAlias = object


class Bench(Place, Protocol):
    """Where the checks run.

    Attributes:
        kind, name: "gpu", or what else it is (no report of that is taken for a GPU's), and what it calls itself.
    """

    @property
    def kind(self) -> str: ...
    @property
    def name(self) -> str: ...

    def describe(self) -> dict[str, object]:
        """What it is, for the report; JSON."""

    def free_bytes(self) -> int:
        """Memory that can be had there."""

    def other_device(self) -> torch.device | None:
        """A device of the same kind that is not the current one, if there is one."""

    def current_index(self) -> int:
        """The number of the device that is current for this thread now."""

    def on_side_stream(self) -> AbstractContextManager[object]:
        """Makes a second stream the current one, always the same."""

    def record(self) -> Moment:
        """A moment of the current stream: when all that was enqueued there so far is done."""

    def wait_for(self, event: Moment) -> None:
        """Lets the current stream go on only after that moment of another."""

    def seconds_between(self, start: Moment, stop: Moment) -> float:
        """Waits for both moments, and says how far apart they are."""

    def synchronize(self) -> None:
        """Waits until all that was enqueued is done."""

    def clock(self) -> float:
        """Seconds, on the host."""

    def arena(self, nbytes: int) -> _C.Arena:
        """Host memory to which copies run beside computation, and which the device can write."""

    def stager(self, arena: _C.Arena, chunk_bytes: int) -> Stager:
        """What is under test."""

    def staging_device(self) -> Device:
        """What such a stager copies with: for one that is made otherwise."""

    def manager(self, folder: Path) -> AbstractContextManager[CheckpointManager]:
        """One that keeps the newest checkpoint only, and notices each tear of what it copies late.

        What is late may stay so until it is waited for, or until `synchronize` is called.
        """

    def digest(self, tensor: torch.Tensor, chunk_bytes: int) -> torch.Tensor:
        """`torch.ops.dtruntime.digest`."""

    def copy_digest_(self, target: torch.Tensor, source: torch.Tensor, chunk_bytes: int) -> torch.Tensor:
        """`torch.ops.dtruntime.copy_digest_`."""

    def capture(self, work: Callable[[], torch.Tensor]) -> tuple[Callable[[], object], torch.Tensor]:
        """Records what `work` enqueues into a graph; that was done once before, and is not now.

        Gives what enqueues the graph, and what `work` returned, where each time leaves its result.
        """

    def dcp_stager(self) -> AsyncStager:
        """The fastest way that DCP has to stage: `close()` it in the end."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Enqueues a plain copy between the device and an arena."""

    def compute(self, rounds: int) -> None:
        """Enqueues as many rounds of the same arithmetic, which hardly touches memory."""


def on_host(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous uint8 tensor, once all that was enqueued for it is done."""
    return tensor.cpu().numpy().data


def random_bytes(bench: Bench, nbytes: int, seed: int, where: torch.device | None = None) -> torch.Tensor:
    """Fresh bytes on the device, or on another, the same for the same seed."""
    device = bench.torch_device if where is None else where
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, device=device, generator=generator)
