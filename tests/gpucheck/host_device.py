"""The CPU in the place of a GPU. Work is really done, at once; how long it takes is reckoned, not measured.

Each stream has a time of its own, which every piece of work moves on by its bytes over a speed. So what a measurement
says is known beforehand, on a machine of any load, and a device on which nothing overlaps is one line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

import dtruntime_torch.ops  # noqa: F401  registers torch.ops.dtruntime
from dtruntime_torch import _C
from dtruntime_torch.checkpoint.staging.device import Event, as_bytes
from dtruntime_torch.checkpoint.staging.stager import Stager
from dtruntime_torch.gpucheck.device import Moment
from dtruntime_torch.gpucheck.sizes import KIB, Sizes
from dtruntime_torch.manager import CheckpointManager
from tests.checkpoint.late_jobs import LateJob, LateJobs
from tests.gpucheck.host_native import HostNative

# GB/s of the reckoned device: a digest reaches 0.95 of a read.
SPEED = {"read": 100.0, "digest": 95.0, "copy with digest": 40.0, "copy": 50.0, "gather": 25.0}
ROUND = 1e-7  # seconds of a round of computation
TICK = 1e-6  # seconds from one look at the host's clock to the next

TINY = Sizes(
    longest=300,
    ragged_chunks=50,
    ragged_longest=3000,
    chunk_sizes=(64 * KIB, 64 * KIB + 1),
    chunked_bytes=200 * KIB,
    large_bytes=3 << 20,
    changed_chunks=40,
    staging_bytes=400 * KIB,
    staging_rounds=4,
    training_rounds=2,
    copied_bytes=256 * KIB,
    pieces=5,
    measured_bytes=(256 * KIB, 1 << 20),
    other_chunk_sizes=(64 * KIB,),
    launches=2,
    repetitions=3,
    layers=1,
    width=64,
    samples=1,
    tokens=8,
    steps=2,
    windows=1,
)


class HostBench:
    """Stands in for `CudaBench`.

    Attributes:
        overlaps: False makes it a device on which streams wait for each other.
    """

    kind = "stand-in"
    name = "CPU, no GPU"
    index = 3
    torch_device = torch.device("cpu")

    def __init__(self) -> None:
        self.overlaps = True
        self._now = {"main": 0.0, "side": 0.0, "stager": 0.0}
        self._current = "main"
        self._looks = 0
        self._copies = DeviceTime()
        self.native = HostNative(lambda what, nbytes: self._spend(nbytes / SPEED[what] / 1e9), 3, self.stream)

    def describe(self) -> dict[str, object]:
        return {"kind": self.kind, "name": self.name}

    def free_bytes(self) -> int:
        return 1 << 30

    def other_device(self) -> torch.device | None:
        return torch.device("cpu")

    def current_index(self) -> int:
        return self.index

    def stream(self) -> int:
        return {"main": 7, "side": 8, "stager": 9}[self._current]

    @contextmanager
    def on_side_stream(self, name: str = "side") -> Iterator[None]:
        before, self._current = self._current, name
        try:
            yield
        finally:
            self._current = before

    def record(self) -> float:
        return self._now[self._current]

    def wait_for(self, event: Moment) -> None:
        assert isinstance(event, float)
        self._now[self._current] = max(self._now[self._current], event)

    def seconds_between(self, start: Moment, stop: Moment) -> float:
        assert isinstance(start, float) and isinstance(stop, float)
        return stop - start

    def synchronize(self) -> None:
        self._now = dict.fromkeys(self._now, max(self._now.values()))
        self._copies.release()

    def clock(self) -> float:
        self._looks += 1
        return self._looks * TICK

    def arena(self, nbytes: int) -> _C.Arena:
        return _C.Arena(nbytes)

    def stager(self, arena: _C.Arena, chunk_bytes: int) -> Stager:
        return Stager(arena, chunk_bytes, find_device=lambda tensor: StagingSide(self))

    def staging_device(self) -> StagingSide:
        return StagingSide(self)

    @contextmanager
    def manager(self, folder: Path, paranoid: bool = True) -> Iterator[CheckpointManager]:
        with (
            mock.patch.object(_C, "CopyJob", self._copies),
            CheckpointManager(folder, keep_last_n=1, paranoid=paranoid) as made,
        ):
            try:
                yield made
            finally:
                # Closing waits for a save that is still under way.
                self._copies.release()

    def digest(self, tensor: torch.Tensor, chunk_bytes: int) -> torch.Tensor:
        self._spend(tensor.nbytes / SPEED["digest"] / 1e9)
        digests: torch.Tensor = torch.ops.dtruntime.digest(tensor, chunk_bytes)
        return digests

    def copy_digest_(self, target: torch.Tensor, source: torch.Tensor, chunk_bytes: int) -> torch.Tensor:
        digests: torch.Tensor = torch.ops.dtruntime.copy_digest_(target, source, chunk_bytes)
        return digests

    def capture(self, work: Callable[[], torch.Tensor]) -> tuple[Callable[[], object], torch.Tensor]:
        result = torch.zeros_like(work())
        return lambda: result.copy_(work()), result

    def dcp_stager(self) -> DefaultStager:
        return DefaultStager(StagingOptions(False, False, True, False))

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source)
        self._spend(source.nbytes / SPEED["copy"] / 1e9)

    def compute(self, rounds: int) -> None:
        self._spend(rounds * ROUND)

    def _spend(self, seconds: float) -> None:
        for stream in [self._current] if self.overlaps else list(self._now):
            self._now[stream] += seconds


class DeviceTime(LateJobs):
    """The copies of a save are as late as they may be on a device: until `synchronize`, if no step asks for them."""

    def __call__(self, *arguments: object, hold: bool = False) -> LateJob:
        self.released = False
        return super().__call__(*arguments, hold=hold)


class StagingSide:
    """The side of a `HostBench` that `dtruntime_torch.checkpoint.staging.device.Device` is for: what a stager copies with."""

    def __init__(self, bench: HostBench) -> None:
        self._bench = bench
        self.native, self.index, self.torch_device = bench.native, bench.index, bench.torch_device

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StagingSide)

    def __hash__(self) -> int:
        return 0

    def follow_current(self) -> None:
        now = self._bench.record()
        with self.on_side():
            self._bench.wait_for(now)

    def on_side(self) -> AbstractContextManager[None]:
        return self._bench.on_side_stream("stager")

    def stream(self) -> int:
        return self._bench.stream()

    def has_kernels(self) -> bool:
        return True

    def capturing(self) -> bool:
        return False

    def can_write(self, arena: _C.Arena) -> bool:
        return True

    def host_memory(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def as_bytes(self, source: torch.Tensor) -> torch.Tensor:
        return as_bytes(source)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self._bench.copy(target, source)

    def record(self) -> Passed:
        with self.on_side():
            return Passed(self._bench.record())

    def hold_current(self, event: Event) -> None:
        assert isinstance(event, Passed)
        self._bench.wait_for(event.time)


class Passed:
    """An event of a stream on which all is done at once."""

    def __init__(self, time: float) -> None:
        self.time = time

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass
