"""A copy of a state dict whose tensors lie elsewhere: what is in it is found first, and put together again last.

Tensors that read the same memory alike are one tensor in the copy too. A DTensor stays one, on the mesh that it has, and
so does any tensor that can be taken apart (`__tensor_flatten__`). What is no tensor is copied deeply.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed._shard.sharded_tensor.shard import Shard
from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper

from dtruntime_torch.checkpoint.state.local_shard import check_plain, is_dtensor, memory_of
from dtruntime_torch.errors import UnsupportedType


class StateCopy:
    """What a state dict consists of.

    Args:
        state: the state dict.

    Attributes:
        tensors: the plain tensors in it, detached, each once, under what tells it from others.

    Raises:
        UnsupportedType: a tensor has no memory that could be copied; the message names it by its key.
    """

    def __init__(self, state: Mapping[str, Any]) -> None:
        self._state = state
        self.tensors: dict[Hashable, torch.Tensor] = {}
        for key, value in state.items():
            self._find(value, str(key))

    def rebuild(self, copies: Mapping[Hashable, torch.Tensor]) -> dict[str, Any]:
        """The same state on other tensors.

        Args:
            copies: for each of `tensors` the one that takes its place, of the same shape and dtype.
        """
        rebuild = _Rebuild(copies)
        return {key: rebuild.copy_of(value) for key, value in self._state.items()}

    def _find(self, value: Any, where: str) -> None:
        if isinstance(value, torch.Tensor):
            inner = dict(_inner_parts(value))
            for name, part in inner.items():
                if isinstance(part, torch.Tensor):
                    self._find(part, f"{where}.{name}")
            if not inner and not isinstance(value, (ShardedTensor, LocalShardsWrapper)):
                plain = _plain(value)
                check_plain(plain, where)
                self.tensors.setdefault(memory_of(plain), plain)
        elif isinstance(value, Mapping):
            for key, item in value.items():
                self._find(item, f"{where}.{key}")
        elif isinstance(value, (list, tuple)):
            for position, item in enumerate(value):
                self._find(item, f"{where}.{position}")


class _Rebuild:
    def __init__(self, copies: Mapping[Hashable, torch.Tensor]) -> None:
        self._copies = copies
        self._memo: dict[int, Any] = {}  # for deep copies, so that what is shared stays so

    def copy_of(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, Mapping):
            items = {key: self.copy_of(item) for key, item in value.items()}
            return items if type(value) is dict else _like(value, items)
        if type(value) is list:
            return [self.copy_of(item) for item in value]
        if isinstance(value, tuple):
            members = [self.copy_of(item) for item in value]
            return type(value)(*members) if hasattr(value, "_fields") else _like(value, members)
        return copy.deepcopy(value, self._memo)

    def _tensor(self, value: Any) -> torch.Tensor:
        if isinstance(value, ShardedTensor):
            return self._sharded(value)
        if isinstance(value, LocalShardsWrapper):
            shards = [self._tensor(one) for one in value.local_shards()]
            return LocalShardsWrapper(shards, [tuple(at) for at in value.local_offsets()])
        if is_dtensor(value):
            return _dtensor_around(self._tensor(value._local_tensor), value)
        inner = {
            name: self._tensor(part) if isinstance(part, torch.Tensor) else part
            for name, part in _inner_parts(value)
        }
        if not inner:
            return self._copies[memory_of(_plain(value))]
        _, context = value.__tensor_flatten__()
        made: torch.Tensor = type(value).__tensor_unflatten__(inner, context, value.size(), value.stride())
        return made.detach()

    def _sharded(self, value: ShardedTensor) -> torch.Tensor:
        shards = [Shard(self._tensor(shard.tensor), shard.metadata) for shard in value.local_shards()]
        made: torch.Tensor = ShardedTensor._init_from_local_shards_and_global_metadata(
            shards, value.metadata(), process_group=value._process_group, sharding_spec=value.sharding_spec()
        )
        return made


def _dtensor_around(local: torch.Tensor, like: Any) -> torch.Tensor:
    """A DTensor on the same mesh whose shard is another tensor, wherever that lies.

    A DTensor takes over the place in its storage of the shard that it is made around, and one that has a place cannot be
    sent to another process: pickling it then reads the storage that it does not have (torch 2.13: SIGSEGV).
    """
    placeless = local
    if not isinstance(local, LocalShardsWrapper):
        placeless = local.as_strided(local.shape, local.stride(), 0)
    made: Any = type(like)(placeless, like._spec, requires_grad=False)
    made._local_tensor = local
    return made  # type: ignore[no-any-return]  # a DTensor


def _inner_parts(value: torch.Tensor) -> Iterator[tuple[str, Any]]:
    """What a tensor wraps; nothing for one that has memory of its own."""
    if isinstance(value, ShardedTensor):
        for shard in value.local_shards():
            if not shard.tensor.is_cpu:
                raise UnsupportedType("the shards of a ShardedTensor are staged on the host only: use FSDP2")
            yield str(shard.metadata.shard_offsets), shard.tensor
    elif isinstance(value, LocalShardsWrapper):
        yield from zip(map(str, value.local_offsets()), value.local_shards(), strict=True)
    elif hasattr(type(value), "__tensor_flatten__") and not hasattr(value, "wait"):
        names, _ = value.__tensor_flatten__()  # type: ignore[attr-defined]  # just asked
        yield from ((name, getattr(value, name)) for name in names)


def _plain(value: Any) -> torch.Tensor:
    """The tensor without its history; the result of a collective once that has ended."""
    done: torch.Tensor = value.wait() if hasattr(value, "wait") else value
    return done.detach()


def _like(value: Any, items: Any) -> Any:
    """A container of the same kind around copies."""
    try:
        return type(value)(items)
    except TypeError:
        return items if isinstance(items, dict) else tuple(items)
