"""Staging for `dcp.async_save`: a copy of the state dict in memory that is used again from save to save."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Hashable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch.distributed.checkpoint.staging import AsyncStager

from dtruntime_torch import _C
from dtruntime_torch.checkpoint.dcp.state_copy import StateCopy
from dtruntime_torch.checkpoint.staging.staging import make_room

_CHUNK_BYTES = 1 << 20
_NATIVE_FROM = 1 << 20  # bytes; from here on a copy past the caches on several threads is quicker


class PinnedStager(AsyncStager):
    """Copies a state dict for `dcp.async_save` into memory of its own, and keeps that for the next save.

    The memory is pinned where the process uses CUDA. `StorageWriter` writes the tensors from where they lie in it, in the
    order in which they lie there. When `stage` returns, the state may change. Where what was staged last is still in use,
    as by a save that has not ended or a planner that is kept, other memory is taken: so it may be twice the state.

    Args:
        shared: takes memory that another process can have as it is, for `AsyncCheckpointerType.PROCESS`. Without it that
            process gets a copy, which costs the memory once more, and the copying in a background thread. Memory
            that is shared is not pinned, not in huge pages, and counts against /dev/shm. What was staged into it is in use as
            long as the dict that `stage` returned is there.

    Example:
        >>> stager = PinnedStager()
        >>> state = {"w": torch.arange(3)}
        >>> staged = stager.stage(state)
        >>> _ = state["w"].zero_()
        >>> staged["w"]
        tensor([0, 1, 2])
    """

    _synchronize_after_execute = False

    def __init__(self, *, shared: bool = False) -> None:
        self._memory: _Memory = _SharedMemory() if shared else _OwnMemory()

    @torch.no_grad()
    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Copies a state dict; the copies are complete when it returns.

        Raises:
            UnsupportedType: a tensor has no memory that could be copied; the message names it by its key.
            MemoryError: the system refuses.
        """
        state = StateCopy(state_dict)
        sources = sorted(state.tensors.items(), key=lambda pair: -pair[1].element_size())
        sizes = [tensor.numel() * tensor.element_size() for _, tensor in sources]
        starts = list(itertools.accumulate(sizes, initial=0))
        memory = self._memory.take(starts[-1])
        copies: dict[Hashable, torch.Tensor] = {}
        for (key, source), start, nbytes in zip(sources, starts, sizes, strict=False):
            place = memory[start : start + nbytes]
            copies[key] = (place.view(source.dtype) if nbytes else place.to(source.dtype)).view(source.shape)
        _copy([(copies[key], source) for key, source in sources])
        return self._memory.lend(state.rebuild(copies))

    def synchronize_staging(self) -> None:
        """Nothing is left to wait for when `stage` has returned."""

    def close(self) -> None:
        """Lets go of the memory; what was staged keeps its own as long as it is used."""
        self._memory.close()


class _Memory(Protocol):
    """Memory for one state at a time."""

    def take(self, nbytes: int) -> torch.Tensor:
        """Bytes that nobody uses."""

    def lend(self, staged: dict[str, Any]) -> dict[str, Any]:
        """What the user gets of what was staged there."""

    def close(self) -> None:
        """Lets go of it."""


class _OwnMemory:
    """Memory of this process: huge pages, pinned if the process uses CUDA."""

    def __init__(self) -> None:
        self._arenas: list[_C.Arena] = []

    def take(self, nbytes: int) -> torch.Tensor:
        arena = next((arena for arena in self._arenas if _is_free(arena)), None)
        room = make_room(_C.Arena(0) if arena is None else arena, nbytes)
        if room is not arena:
            self._arenas = [room, *(known for known in self._arenas if known is not arena)]
        # An array keeps the arena from being resized as long as some tensor on it is there.
        return (
            torch.from_numpy(np.frombuffer(memoryview(room), np.uint8))
            if nbytes
            else torch.empty(0, dtype=torch.uint8)
        )

    def lend(self, staged: dict[str, Any]) -> dict[str, Any]:
        return staged

    def close(self) -> None:
        self._arenas.clear()


class _Lent(dict[str, Any]):
    """A dict of which one can tell whether it is still there."""

    __slots__ = ("__weakref__",)

    def __reduce__(self) -> tuple[type, tuple[dict[str, Any]]]:
        return dict, (dict(self),)


class _SharedMemory:
    """Memory that torch hands to another process by its name."""

    def __init__(self) -> None:
        self._blocks: list[tuple[torch.Tensor, weakref.ref[_Lent]]] = []
        self._taken: torch.Tensor | None = None

    def take(self, nbytes: int) -> torch.Tensor:
        free = [block for block, user in self._blocks if user() is None]
        self._blocks = [(block, user) for block, user in self._blocks if user() is not None]
        fitting = [block for block in free if nbytes <= block.numel() <= 2 * nbytes]
        self._taken = fitting[0] if fitting else _shared_block(nbytes)
        return self._taken[:nbytes]

    def lend(self, staged: dict[str, Any]) -> dict[str, Any]:
        lent = _Lent(staged)
        if self._taken is not None:
            self._blocks.append((self._taken, weakref.ref(lent)))
            self._taken = None
        return lent

    def close(self) -> None:
        self._blocks.clear()


def _shared_block(nbytes: int) -> torch.Tensor:
    block = torch.empty(nbytes, dtype=torch.uint8)
    if nbytes:
        block.share_memory_()  # type: ignore[no-untyped-call]
    return block


def _is_free(arena: _C.Arena) -> bool:
    try:
        arena.resize(arena.nbytes)
    except BufferError:
        return False
    return True


def _copy(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    devices = {source.device for _, source in pairs if source.device.type != "cpu"}
    for target, source in pairs:
        nbytes = source.numel() * source.element_size()
        plain = source.device.type == "cpu" and source.is_contiguous()
        if plain and nbytes >= _NATIVE_FROM and not (source.is_conj() or source.is_neg()):
            digests = bytearray(16 * -(-nbytes // _CHUNK_BYTES))
            at = np.frombuffer(digests, np.uint8).ctypes.data
            _C.copy_digest_into(at, target.data_ptr(), source.data_ptr(), nbytes, _CHUNK_BYTES)
        else:
            target.copy_(source, non_blocking=bool(devices))
    for device in devices:
        torch.accelerator.current_stream(device).synchronize()
