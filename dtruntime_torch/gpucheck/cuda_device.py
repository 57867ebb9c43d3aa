"""The device of the user: an NVIDIA GPU, by torch and the native module."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch.distributed.checkpoint.staging import AsyncStager, DefaultStager

import dtruntime_torch.ops  # noqa: F401  registers torch.ops.dtruntime
from dtruntime_torch import _C
from dtruntime_torch.checkpoint.staging.chunk_table import NativeCalls
from dtruntime_torch.checkpoint.staging.device import Device, cuda_device
from dtruntime_torch.checkpoint.staging.stager import Stager
from dtruntime_torch.gpucheck.device import Moment
from dtruntime_torch.gpucheck.machine import nvidia_driver
from dtruntime_torch.manager import CheckpointManager

COMPUTE_WIDTH = 2048


def what_is_missing() -> list[str]:
    """Says why nothing can be checked here: a sentence for each thing that is missing, none if all is there."""
    missing = []
    if torch.version.cuda is None:
        missing.append(f"torch {torch.__version__} is a CPU build: install one that is built for CUDA.")
    if _C.build_info()["cuda"] is False:
        missing.append(
            "This dtruntime_torch was built without CUDA: build it again with CUDA_HOME set to a CUDA toolkit."
        )
    if not missing:
        missing += _what_the_driver_lacks()
    return missing


def _what_the_driver_lacks() -> list[str]:
    """Torch and the native module each bring a CUDA runtime of their own; the driver has to suit both."""
    missing = []
    if not torch.cuda.is_available():
        missing.append(
            f"torch {torch.__version__} finds no GPU: is there one, with a driver for CUDA {torch.version.cuda}?"
        )
    module = f"The native module, built for CUDA {_C.build_info()['cuda']},"
    try:
        if _C.cuda_device_count() == 0 and not missing:
            missing.append(f"{module} finds no GPU though torch does.")
    except RuntimeError as error:
        # Torch does not say why it finds none: what CUDA says to the module is often the reason for both.
        missing.append(f"{module} cannot use the GPU: {error}.")
    return missing


class CudaBench:
    """The current device of torch.cuda. `gpucheck.device.Bench` says what each method does."""

    kind = "gpu"
    native: NativeCalls = _C

    def __init__(self) -> None:
        self.index = torch.cuda.current_device()
        self.torch_device = torch.device("cuda", self.index)
        self.name = torch.cuda.get_device_name(self.index)
        self._side = torch.cuda.Stream(self.index)  # type: ignore[no-untyped-call]
        square = (COMPUTE_WIDTH, COMPUTE_WIDTH)
        self._factor = torch.rand(square, dtype=torch.float16, device=self.torch_device)
        self._product = torch.empty_like(self._factor)

    def describe(self) -> dict[str, object]:
        facts = torch.cuda.get_device_properties(self.index)
        return {
            "kind": self.kind,
            "name": self.name,
            "capability": f"{facts.major}.{facts.minor}",
            "multiprocessors": facts.multi_processor_count,
            "memory": facts.total_memory,
            "driver": nvidia_driver(),
            "cuda_of_torch": torch.version.cuda,
        }

    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info(self.index)[0]

    def other_device(self) -> torch.device | None:
        count = torch.cuda.device_count()
        return torch.device("cuda", (self.index + 1) % count) if count > 1 else None

    def current_index(self) -> int:
        return torch.cuda.current_device()

    def stream(self) -> int:
        return int(torch.cuda.current_stream(self.index).cuda_stream)

    def on_side_stream(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._side)

    def record(self) -> Moment:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.index))
        return event

    def wait_for(self, event: Moment) -> None:
        assert isinstance(event, torch.cuda.Event)
        torch.cuda.current_stream(self.index).wait_event(event)

    def seconds_between(self, start: Moment, stop: Moment) -> float:
        assert isinstance(start, torch.cuda.Event) and isinstance(stop, torch.cuda.Event)
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1e3

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.index)

    def clock(self) -> float:
        return time.perf_counter()

    def arena(self, nbytes: int) -> _C.Arena:
        arena = _C.Arena(nbytes, pin=True)
        if not arena.pinned:
            raise RuntimeError(f"{nbytes} bytes of host memory could not be pinned: {arena.pin_refusal}")
        return arena

    def stager(self, arena: _C.Arena, chunk_bytes: int) -> Stager:
        return Stager(arena, chunk_bytes)

    def staging_device(self) -> Device:
        return cuda_device(self.index)

    def manager(self, folder: Path) -> AbstractContextManager[CheckpointManager]:
        return CheckpointManager(folder, keep_last_n=1)

    def digest(self, tensor: torch.Tensor, chunk_bytes: int) -> torch.Tensor:
        digests: torch.Tensor = torch.ops.dtruntime.digest(tensor, chunk_bytes)
        return digests

    def copy_digest_(self, target: torch.Tensor, source: torch.Tensor, chunk_bytes: int) -> torch.Tensor:
        digests: torch.Tensor = torch.ops.dtruntime.copy_digest_(target, source, chunk_bytes)
        return digests

    def capture(self, work: Callable[[], torch.Tensor]) -> tuple[Callable[[], object], torch.Tensor]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = work()
        return graph.replay, result

    def dcp_stager(self) -> AsyncStager:
        # Pinned, in a thread, on a stream of its own, in shared memory: all its options are on.
        return DefaultStager()

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def compute(self, rounds: int) -> None:
        for _ in range(rounds):
            torch.mm(self._factor, self._factor, out=self._product)
