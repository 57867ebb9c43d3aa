"""The optimizer's door: which memory only an optimizer's step changes, and what has to be done before it does.

torch calls its global pre-hooks in front of the step of every optimizer of the process, also of compiled ones. So what
belongs to an optimizer that was seen there, its parameters and their state, may still be read while forward and backward
run: whoever reads it is asked here before the step goes on. What else a training loop changes nobody can know of.
"""

from __future__ import annotations

import inspect
import logging
import os
import threading
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]  # not in its __all__
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from dtruntime_torch.checkpoint.state.local_shard import local_part
from dtruntime_torch.checkpoint.state.wrappers import innermost

# A compiled function that holds `optimizer.step()` as a whole cannot be interrupted for the door, and torch says so.
_COMPILED = "a checkpoint may still be read: compile optimizer.step, or save with consistency='immediate'"

logger = logging.getLogger(__name__)

_OPTIMIZER_FILE = torch.optim.Optimizer.profile_hook_step.__code__.co_filename

_PLAIN = (torch.nn.Parameter, torch.Tensor)

SMALL_BYTES = 16 << 10
"""Below this it takes less time to copy a tensor than to keep account of it."""


class Reader(Protocol):
    """Who still reads memory of optimizers."""

    @property
    def reads_others(self) -> bool:
        """Whether it also reads what no optimizer was known to own when it began, which a step may change all the same."""

    def before_step(self, storages: Collection[int] | None) -> None:
        """Returns when a step may change memory, and raises nothing.

        Args:
            storages: addresses of the storages that it may change; None for those of all optimizers.
        """

    def before_update(self) -> None:
        """Returns when everything that is read may be changed, and raises nothing."""


class OwnedMemory:
    """Memory that the steps of some optimizers change, and nothing else that is known of; without what is small.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(8, 4096))
        >>> owned = OwnedMemory([torch.optim.SGD([weight])])
        >>> tensors = weight.detach(), weight.detach()[2:4], torch.zeros(8, 4096)
        >>> [owned.storage_around(tensor) is not None for tensor in tensors]
        [True, True, False]

    Attributes:
        unknown: some of the optimizers change memory, too, of which nothing can be known.
    """

    def __init__(self, optimizers: Iterable[torch.optim.Optimizer] = ()) -> None:
        self.unknown = False
        # address of a storage -> first byte of a tensor in it -> behind its last
        self._stops: dict[int, dict[int, int]] = {}
        for optimizer in optimizers:
            try:
                for tensor in _tensors_of(optimizer):
                    self.add(tensor)
            except Exception as error:
                # An optimizer and its tensors may be anything, and training goes on whatever they are.
                logger.debug("what a %s owns is not known: %s", type(optimizer).__qualname__, error)
                self.unknown = True

    def add(self, tensor: torch.Tensor) -> None:
        """Adds the memory of a tensor, if it is on this rank. Where that is in several pieces, or small, only its storage is known."""
        for part in _parts_of(tensor):
            stops = self._stops.setdefault(storage_of(part), {})
            if part.nbytes >= SMALL_BYTES and part.is_contiguous():
                start = part.data_ptr()
                stops[start] = max(stops.get(start, 0), start + part.nbytes)

    def storage_around(self, tensor: torch.Tensor) -> int | None:
        """The address of a plain contiguous tensor's storage, if all its bytes belong to one tensor of an optimizer."""
        if not self._stops:
            return None
        storage = storage_of(tensor)
        stops = self._stops.get(storage, {})
        start = tensor.data_ptr()
        stop = start + tensor.nbytes
        inside = stops.get(start, 0) >= stop or any(
            first <= start and stop <= last for first, last in stops.items()
        )
        return storage if inside else None

    @property
    def storages(self) -> Collection[int]:
        """Addresses of the storages that it lies in."""
        return self._stops.keys()

    def leave_out(self, other: OwnedMemory) -> None:
        """Takes all storages away in which other memory lies; all there are, if that is not known."""
        if other.unknown:
            self._stops.clear()
        for storage in other.storages:
            self._stops.pop(storage, None)


class Door:
    """In front of the optimizers of a process; `DOOR` is the one there is. Its methods may be called from any thread.

    Attributes:
        bypassed: a step was captured in a CUDA graph: when that is replayed, nobody comes by here.
    """

    def __init__(self) -> None:
        self.bypassed = False
        self._stands = False
        # A signal handler that saves may interrupt its own thread in here. What it adds meanwhile is not lost, for one
        # operation of a dict adds it.
        self._lock = threading.RLock()
        # By id, for an optimizer may compare equal to another, or have no hash.
        self._known: weakref.WeakValueDictionary[int, torch.optim.Optimizer] = weakref.WeakValueDictionary()
        # Those that have come by and not gone on yet: what they own changes without another question. A step may call that
        # of its base class, which comes by as well.
        self._inside: weakref.WeakValueDictionary[int, torch.optim.Optimizer] = weakref.WeakValueDictionary()
        self._depths: dict[int, int] = {}
        self._readers: dict[int, Reader] = {}
        os.register_at_fork(after_in_child=self._forget)

    def stand(self) -> None:
        """From now on no optimizer steps without coming by here; called again it does nothing."""
        with self._lock:
            if not self._stands:
                _put_first(register_optimizer_step_pre_hook(self._hook))
                _put_first(register_optimizer_step_post_hook(self._hook_behind))
                self._stands = True

    def trust(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        """Takes these for optimizers that will come by here, before they have done so.

        One around another that was not made as torch makes them has a step of its own that calls no hooks. That one is
        left out: the one inside comes by.
        """
        with self._lock:
            self._known.update((id(one), one) for one in optimizers if getattr(one.step, "hooked", False))

    def owned(self) -> OwnedMemory:
        """The memory of the optimizers that have come by here, as it is now, but for what a step changes right now."""
        with self._lock:
            known = list(self._known.values())
        memory = OwnedMemory(known)
        memory.leave_out(self.changing())
        return memory

    def changing(self) -> OwnedMemory:
        """The memory of the optimizers that are in the middle of a step, and may have called back: a closure, a hook."""
        with self._lock:
            inside = list(self._inside.values())
        return OwnedMemory(inside)

    def hold(self, reader: Reader) -> None:
        """Asks a reader before each step, until `let_go`."""
        with self._lock:
            self._readers[id(reader)] = reader

    def let_go(self, reader: Reader) -> None:
        """Asks it no more; does nothing if it is not held."""
        with self._lock:
            self._readers.pop(id(reader), None)

    def before_update(self) -> None:
        """Returns when whoever reads anything lets it be changed: for who changes what optimizers own in their stead."""
        with self._lock:
            readers = list(self._readers.values())
        for reader in readers:
            reader.before_update()

    def _hook(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        _pass(self, optimizer)

    def _hook_behind(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        _leave(self, optimizer)

    def _come_by(self, optimizer: torch.optim.Optimizer) -> None:
        with self._lock:
            self._known[id(optimizer)] = optimizer
            was_inside = self._inside.get(id(optimizer)) is optimizer
            # Before it is known who reads: whoever begins to read later finds it inside.
            self._inside[id(optimizer)] = optimizer
            # One that is inside already calls a step within a step, or its step before this one raised.
            self._depths[id(optimizer)] = _steps_under_way(optimizer) if was_inside else 1
            alone, readers = len(self._known) == 1, list(self._readers.values())
        if _is_capturing():
            self.bypassed = True
        if readers:
            # Of a single optimizer is all that is read, as a rule, so there is nothing to be looked up.
            alone = alone and not any(reader.reads_others for reader in readers)
            memory = None if alone else OwnedMemory([optimizer])
            for reader in readers:
                if memory is not None and memory.unknown:
                    reader.before_update()
                else:
                    reader.before_step(None if memory is None else memory.storages)

    def _go_on(self, optimizer: torch.optim.Optimizer) -> None:
        # One whose step raised stays inside until its next has ended, which costs lateness and nothing else.
        with self._lock:
            depth = self._depths.pop(id(optimizer), 1) - 1
            if depth > 0:
                self._depths[id(optimizer)] = depth
            else:
                self._inside.pop(id(optimizer), None)

    def _forget(self) -> None:
        """In a forked child: nothing is read here."""
        self._lock = threading.RLock()
        self._readers = {}


@torch.compiler.disable(reason=_COMPILED)  # type: ignore[no-untyped-call, untyped-decorator]
def _pass(door: Door, optimizer: torch.optim.Optimizer) -> None:
    door._come_by(optimizer)


@torch.compiler.disable(reason=_COMPILED)  # type: ignore[no-untyped-call, untyped-decorator]
def _leave(door: Door, optimizer: torch.optim.Optimizer) -> None:
    door._go_on(optimizer)


def _put_first(handle: RemovableHandle) -> None:
    """Has a hook called before those that are there already: such a one may change memory, or save."""
    hooks = handle.hooks_dict_ref()
    assert hooks is not None, "torch has given up its global hooks"
    hooks.move_to_end(handle.id, last=False)


def _steps_under_way(optimizer: torch.optim.Optimizer) -> int:
    """How many steps of an optimizer, one calling the other, this thread is in; torch's hooks have no way to tell."""
    count, frame = 0, inspect.currentframe()
    while frame is not None:
        is_step = frame.f_code.co_filename == _OPTIMIZER_FILE and frame.f_code.co_name == "wrapper"
        count += is_step and frame.f_locals.get("self") is optimizer
        frame = frame.f_back
    return max(count, 1)


def storage_of(tensor: torch.Tensor) -> int:
    """The address of a plain tensor's storage."""
    return tensor.untyped_storage().data_ptr()


def _tensors_of(optimizer: Any) -> Iterator[torch.Tensor]:
    """Its parameters, and the tensors that its state has for each of them at once."""
    state = optimizer.state if isinstance(optimizer.state, Mapping) else {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield parameter
            entry = state.get(parameter)
            if isinstance(entry, dict):
                yield from (value for value in entry.values() if isinstance(value, torch.Tensor))


def _parts_of(tensor: torch.Tensor) -> Iterable[torch.Tensor]:
    """The plain tensors in a tensor that have memory on this rank."""
    if type(tensor) in _PLAIN:
        parts: Iterable[torch.Tensor] = (tensor,)
    elif isinstance(tensor, UninitializedTensorMixin):
        return ()
    else:
        parts = [part for _, part in innermost(local_part(tensor), "")]
    return [part for part in parts if part.layout is torch.strided and not part.is_meta and part.nbytes]


def _is_capturing() -> bool:
    # Asked of a process without a context it would be false, too, but not for nothing.
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]


DOOR = Door()
