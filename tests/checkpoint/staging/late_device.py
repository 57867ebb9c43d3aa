"""A device in host memory whose work really happens late, and no earlier than somebody must wait for it.

What is put on a stream is only noted. It is done when an event behind it is waited for, and then nothing more is done
than has to be: an early read finds the bytes not there, and a stream that was not told to wait runs ahead.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from dtruntime_torch import _C
from dtruntime_torch.checkpoint.staging.device import as_bytes
from tests.gpucheck.host_native import HostNative

Work = Callable[[], object]


def raw(tensor: torch.Tensor) -> bytes:
    return as_bytes(tensor).numpy().tobytes()


class LateStream:
    """Work in order. `blocked` is what its owner is not ready for: an event waited for is waited for through it."""

    def __init__(self) -> None:
        self._work: deque[Work] = deque()
        self._taken = 0
        self._given = 0

    def put(self, work: Work) -> None:
        self._given += 1
        self._work.append(work)

    def record(self) -> LateEvent:
        return LateEvent(self, self._given)

    def wait_for(self, event: LateEvent) -> None:
        self.put(event.pass_it)

    def has_passed(self, point: int) -> bool:
        return self._taken >= point

    def run_to(self, point: int) -> None:
        while self._taken < point:
            work = self._work.popleft()
            work()
            self._taken += 1

    def clear(self) -> None:
        self._work.clear()
        self._taken = self._given

    def run(self) -> None:
        """Does all that can be done."""
        self.run_to(self._given)


class LateEvent:
    """A point of a stream.

    Attributes:
        queries: how often it says no before the work is done; None: always.
        waited: how often a thread waited for it.
        error: raised by whoever asks.
    """

    def __init__(self, stream: LateStream, point: int) -> None:
        self._stream = stream
        self._point = point
        self._lock = threading.Lock()
        self.queries: int | None = None
        self.waited = 0
        self.error: RuntimeError | None = None

    def pass_it(self) -> None:
        with self._lock:
            self._stream.run_to(self._point)

    def query(self) -> bool:
        if self.error is not None:
            raise self.error
        if self.queries == 0:
            self.pass_it()
        elif self.queries is not None:
            self.queries -= 1
        return self._stream.has_passed(self._point)

    def synchronize(self) -> None:
        self.waited += 1
        if self.error is not None:
            raise self.error
        self.pass_it()


class LateNative:
    """The native calls of a device: each is put on the stream that is named, and goes to `native` when its turn comes."""

    def __init__(self, device: LateDevice, native: object) -> None:
        self._device = device
        self._native = native

    def __getattr__(self, name: str) -> Callable[..., None]:
        call, device = getattr(self._native, name), self._device

        def put(*arguments: object) -> None:
            stream, handle = device.at, device.stream()
            device.note(name)
            if name == device.refuse_call:
                raise RuntimeError(f"launching {name}: out of memory")

            def run() -> None:
                device.running = handle
                call(*arguments)

            stream.put(run)
            if name in device.meddle:
                stream.put(device.meddle[name])

        return put


class LateDevice:
    """A `Device` whose tensors are those that `hold` was given.

    Args:
        native: what does the native calls in the end; None: Python, byte for byte.

    Attributes:
        current: the current stream; a test may put another in its place.
        calls: the names of what was enqueued, with "current " before what was on that stream, and of
            `follow_current` and `record`.
        copied: (bytes, address of the target) of each copy that was enqueued.
        events: all that were recorded.
        refuse: number of the copy that is refused, counted from 0, or None.
        refuse_call: name of the native call that is refused, or None.
        meddle: name of a native call -> what happens on the side stream right after it.
        reaches_arenas: whether its kernels can write an arena.
        kernels: whether it has any.
        captures: whether a graph is being captured.
        running: handle of the stream whose native call is at work.
    """

    index = 1
    torch_device = torch.device("cpu")

    def __init__(self, native: object = None) -> None:
        self.native = LateNative(
            self, native or HostNative(lambda what, nbytes: None, self.index, lambda: self.running)
        )
        self.current = LateStream()
        self.side = LateStream()
        self.calls: list[str] = []
        self.refuse_call: str | None = None
        self.meddle: dict[str, Work] = {}
        self.reaches_arenas = self.kernels = True
        self.captures = False
        self.running = 0
        self.copied: list[tuple[int, int]] = []
        self.events: list[LateEvent] = []
        self.refuse: int | None = None
        self._storages: set[int] = set()
        self._on_side = False

    def hold(self, tensor: torch.Tensor) -> torch.Tensor:
        self._storages.add(tensor.untyped_storage().data_ptr())
        return tensor

    def find(self, tensor: torch.Tensor) -> LateDevice | None:
        return self if tensor.untyped_storage().data_ptr() in self._storages else None

    def fail(self, message: str) -> None:
        """What is in flight is lost, and whoever asks for it is told."""
        for event in self.events:
            event.error = RuntimeError(message)
        self.side.clear()

    @property
    def at(self) -> LateStream:
        return self.side if self._on_side else self.current

    def note(self, call: str) -> None:
        self.calls.append(call if self._on_side else f"current {call}")

    def stream(self) -> int:
        return 77 if self._on_side else 76

    def has_kernels(self) -> bool:
        return self.kernels

    def capturing(self) -> bool:
        return self.captures

    def can_write(self, arena: _C.Arena) -> bool:
        return self.reaches_arenas

    def host_memory(self, nbytes: int) -> torch.Tensor:
        return torch.full((nbytes,), 0xA5, dtype=torch.uint8)

    def follow_current(self) -> None:
        self.calls.append("follow_current")
        self.side.wait_for(self.current.record())

    @contextmanager
    def on_side(self) -> Iterator[None]:
        self._on_side = True
        try:
            yield
        finally:
            self._on_side = False

    def as_bytes(self, source: torch.Tensor) -> torch.Tensor:
        self.note("as_bytes")
        bytes_ = torch.zeros(source.nbytes, dtype=torch.uint8)
        self.at.put(lambda: bytes_.copy_(as_bytes(source)))
        return bytes_

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        assert self._on_side
        self.note("copy")
        if len(self.copied) == self.refuse:
            raise RuntimeError("CUDA error: out of memory")
        self.copied.append((target.nbytes, target.data_ptr()))
        self.side.put(lambda: target.copy_(source))

    def record(self) -> LateEvent:
        self.calls.append("record")
        self.events.append(self.side.record())
        return self.events[-1]

    def hold_current(self, event: object) -> None:
        assert isinstance(event, LateEvent)
        if event.error is not None:
            raise event.error
        self.current.wait_for(event)
