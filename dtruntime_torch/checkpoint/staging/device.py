"""What staging needs of an accelerator: a seam, and the real one behind it.

The order of the calls can so be tested without a device. `CudaDevice` is written against `torch.cuda`, not
`torch.accelerator`: the arena is pinned by CUDA's runtime (ROCm's under the same name), so a copy from any other
accelerator would not be asynchronous, and only an event of `torch.cuda` is surely one that a thread can sleep on.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch

from dtruntime_torch import _C
from dtruntime_torch.checkpoint.staging.chunk_table import NativeCalls, Place

CAPTURE_MODE_RELAXED = 2
"""CU_STREAM_CAPTURE_MODE_RELAXED of cuda.h."""


class Event(Protocol):
    """A point in the work of a stream. It may be asked also while a graph is captured, here or by another thread."""

    def query(self) -> bool:
        """Whether the stream has passed it."""

    def synchronize(self) -> None:
        """Blocks this thread until the stream has passed it."""


class Device(Place, Protocol):
    """What staging needs of a device: its current stream, which is the caller's, and a side stream, which is ours."""

    def follow_current(self) -> None:
        """Makes the side stream wait for all that the current stream was given so far."""

    def on_side(self) -> AbstractContextManager[object]:
        """Inside, `copy`, the native calls and the memory that they need belong to the side stream."""

    def as_bytes(self, source: torch.Tensor) -> torch.Tensor:
        """Enqueues on the current stream a copy of the elements in row-major order: uint8, in memory of its own.

        Args:
            source: strided or conjugated.
        """

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Enqueues a copy; the bytes move later.

        Args:
            target: host memory, one-dimensional uint8, of the source's bytes.
            source: on the device, as many of its bytes in one piece, uint8.
        """

    def has_kernels(self) -> bool:
        """Whether our kernels run there, and reach `host_memory`."""

    def capturing(self) -> bool:
        """Whether the current stream is being captured into a graph: nothing done there now happens now."""

    def can_write(self, arena: _C.Arena) -> bool:
        """Whether its kernels reach the memory of an arena."""

    def host_memory(self, nbytes: int) -> torch.Tensor:
        """Memory of the host that its kernels read and write: uint8, aligned to 16, of any content."""

    def record(self) -> Event:
        """An event behind all that the side stream was given so far."""

    def hold_current(self, event: Event) -> None:
        """Makes what the current stream is given from now on wait for an event; the calling thread does not wait."""


class CudaDevice:
    """One CUDA device.

    The side stream has a high priority, so that a copy never queues behind the kernels of training.
    """

    native: NativeCalls = _C

    def __init__(self, index: int) -> None:
        self.index = index
        self.torch_device = torch.device("cuda", index)
        self._side = torch.cuda.Stream(index, priority=-1)  # type: ignore[no-untyped-call]

    def follow_current(self) -> None:
        self._side.wait_stream(torch.cuda.current_stream(self.index))

    def on_side(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._side)

    def as_bytes(self, source: torch.Tensor) -> torch.Tensor:
        return as_bytes(source)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def has_kernels(self) -> bool:
        return _kernels_reach(self.index)

    def capturing(self) -> bool:
        if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            return False
        with torch.cuda.device(self.index):
            return torch.cuda.is_current_stream_capturing()

    def stream(self) -> int:
        return int(torch.cuda.current_stream(self.index).cuda_stream)

    def can_write(self, arena: _C.Arena) -> bool:
        return arena.pinned  # and mapped: csrc/cuda/transfer.cu

    def host_memory(self, nbytes: int) -> torch.Tensor:
        # torch keeps such memory for the next who asks: to pin anew may wait for the device.
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def record(self) -> Event:
        # A thread that waits for a blocking event sleeps, and leaves its core to training.
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(self._side)
        return CudaEvent(event)

    def hold_current(self, event: Event) -> None:
        assert isinstance(event, CudaEvent)
        torch.cuda.current_stream(self.index).wait_event(event.of_torch)


class CudaEvent:
    """An event of torch that is asked without harm to a graph that is being captured.

    To ask for any event spoils a capture of mode "global", torch's default, also from another thread, unless the
    asking thread has said that it knows what it does.
    """

    def __init__(self, of_torch: torch.cuda.Event) -> None:
        self.of_torch = of_torch

    def query(self) -> bool:
        with _beside_captures():
            return bool(self.of_torch.query())  # type: ignore[no-untyped-call]

    def synchronize(self) -> None:
        with _beside_captures():
            self.of_torch.synchronize()


@contextmanager
def _beside_captures() -> Iterator[None]:
    exchange = _exchange_capture_mode()
    if exchange is None:
        yield
        return
    mode = ctypes.c_int(CAPTURE_MODE_RELAXED)
    exchange(ctypes.byref(mode))
    try:
        yield
    finally:
        exchange(ctypes.byref(mode))


@functools.cache
def _exchange_capture_mode() -> Callable[..., object] | None:
    """The driver's function that swaps the calling thread's mode. The runtime's would make a context for it."""
    try:
        return ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode
    except (OSError, AttributeError):
        return None  # ROCm, or a driver from before there were modes


@functools.cache
def _kernels_reach(index: int) -> bool:
    """Whether this build has kernels, and the driver suits them; torch has a CUDA runtime of its own."""
    try:
        return index < _C.cuda_device_count()
    except RuntimeError:
        return False


@functools.cache
def cuda_device(index: int) -> CudaDevice:
    """The device of that index, with the one side stream that all stagings of this process use."""
    return CudaDevice(index)


def device_of(tensor: torch.Tensor) -> Device | None:
    """The device from whose side stream a tensor can be copied, or None."""
    return cuda_device(tensor.get_device()) if tensor.is_cuda else None


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor in row-major order, where it lies.

    They share memory with it if it is contiguous. Conjugation is resolved here: torch would do it on the host,
    after the copy, which an asynchronous copy has not made by then.

    Example:
        >>> as_bytes(torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8).T).tolist()
        [1, 3, 2, 4]
    """
    return tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def in_one_piece(tensor: torch.Tensor) -> bool:
    """Whether the bytes at its address are those of its elements, in row-major order."""
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()
