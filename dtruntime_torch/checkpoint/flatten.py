"""The door from torch's types to specs: what a rank's state consists of, and where its data lies.

A walk over the state gives the leaves; each tensor becomes a spec and its data as it lies on this rank, each other
leaf a spec and its encoded value. Nothing is copied but what is no tensor, and nothing is changed.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch

from dtruntime_torch.checkpoint import objects
from dtruntime_torch.checkpoint.objects import Json, register_codec
from dtruntime_torch.checkpoint.specs import FlatSpecs, ObjectSpec, Path, TensorSpec
from dtruntime_torch.checkpoint.state.codecs import register_codecs
from dtruntime_torch.checkpoint.state.local_shard import (
    BoxFinder,
    check_class,
    check_plain,
    dtype_name,
    is_dtensor,
    local_tensor,
    memory_of,
    require_member,
)
from dtruntime_torch.checkpoint.state.stateful import Leaf, Survey
from dtruntime_torch.checkpoint.state.traverse import PerRank, Stateful, keep_types, name_clash
from dtruntime_torch.checkpoint.state.wrappers import innermost

__all__ = ["FlatState", "PerRank", "Stateful", "flatten_state", "register_codec"]

# Who registers a codec comes through here too, so ours are always there first.
register_codecs()


@dataclass(frozen=True, slots=True)
class FlatState:
    """A state as one rank holds it.

    Attributes:
        specs: its structure.
        tensors: fqn -> the data on this rank: a plain detached tensor of any stride and device, of the spec's
            shape; it shares memory with the state wherever that is possible.
        values: fqn -> the encoded value of what is no tensor.
    """

    specs: FlatSpecs
    tensors: dict[str, torch.Tensor]
    values: dict[str, Json]


def flatten_state(state: object, rank: int) -> FlatState:
    """Takes a state apart.

    Args:
        state: `{name: module | optimizer | anything with state_dict and load_state_dict | value}`, a plain (nested)
            state dict, or bytes. `PerRank` may wrap what is in it.
        rank: of this process among those that save.

    Raises:
        InvalidArgument: it is no such thing, two leaves have one name, or an optimizer's parameter has none.
        UnsupportedType: it holds something that cannot be stored; the message names it by its key.

    Example:
        >>> flat = flatten_state({"layer": {"weight": torch.zeros(2, 3)}, "epoch": 4}, rank=0)
        >>> [(spec.fqn, spec.global_shape) for spec in flat.specs.tensors], flat.values
        ([('layer.weight', (2, 3))], {'epoch': 4})
    """
    survey = Survey(state, keep_types)
    collector = _Collector(rank, _owned_data(survey))
    for leaf in survey.leaves():
        collector.add(leaf)
    return collector.collected()


def _owned_data(survey: Survey) -> frozenset[Hashable]:
    """The memory of the parameters of the state's optimizers; a DTensor's mesh tells what its optimizer would."""
    plain = [
        part
        for name, parameter in survey.named_parameters()
        for part in innermost(parameter, name)
        if not is_dtensor(part[1])
    ]
    for name, tensor in plain:
        check_plain(tensor, name)
    return frozenset(memory_of(tensor) for _, tensor in plain)


class _Collector:
    def __init__(self, rank: int, owned: frozenset[Hashable]) -> None:
        self._rank = rank
        self._owned = owned
        self._boxes = BoxFinder()
        self._paths: dict[str, Path] = {}
        self._first_at: dict[Hashable, str] = {}
        self._tensor_specs: list[TensorSpec] = []
        self._object_specs: list[ObjectSpec] = []
        self._tensors: dict[str, torch.Tensor] = {}
        self._values: dict[str, Json] = {}

    def collected(self) -> FlatState:
        specs = FlatSpecs(tuple(self._tensor_specs), tuple(self._object_specs))
        return FlatState(specs, self._tensors, self._values)

    def add(self, leaf: Leaf) -> None:
        node = leaf.node
        if node.fqn in self._paths:
            raise name_clash(node.fqn, self._paths[node.fqn], node.path)
        index = len(self._paths)
        self._paths[node.fqn] = node.path
        if isinstance(node.value, torch.Tensor):
            self._add_tensor(leaf, index)
        elif type(node.value) is bytes:
            self._add_bytes(leaf, index)
        else:
            self._add_object(leaf, index)

    def _add_tensor(self, leaf: Leaf, index: int) -> None:
        node = leaf.node
        tensor = local_tensor(node.value, node.fqn)
        if not leaf.filled:
            check_class(node.value, node.fqn)
        box = self._boxes.find(node.value, node.fqn)
        require_member(box, self._rank, node.fqn)
        memory = memory_of(tensor)
        alias = (
            self._first_at.setdefault((memory, box, node.per_rank), node.fqn) if tensor.numel() else node.fqn
        )
        self._tensors[node.fqn] = tensor
        self._tensor_specs.append(
            TensorSpec(
                fqn=node.fqn,
                path=node.path,
                index=index,
                dtype=dtype_name(tensor),
                global_shape=tuple(node.value.shape),
                offsets=box.offsets,
                shape=box.shape,
                layout=box.layout,
                holders=box.holders,
                first_holders=box.first_holders,
                spread=(leaf.owned or memory in self._owned) and not node.per_rank and box.holders is None,
                per_rank=node.per_rank,
                alias=None if alias == node.fqn else alias,
                part_of=leaf.part_of,
            )
        )

    def _add_bytes(self, leaf: Leaf, index: int) -> None:
        node = leaf.node
        shape = (len(node.value),)
        self._tensors[node.fqn] = tensor_of(node.value)
        self._tensor_specs.append(
            TensorSpec(
                fqn=node.fqn,
                path=node.path,
                index=index,
                dtype="uint8",
                global_shape=shape,
                offsets=(0,),
                shape=shape,
                per_rank=node.per_rank,
                is_bytes=True,
                part_of=leaf.part_of,
            )
        )

    def _add_object(self, leaf: Leaf, index: int) -> None:
        node = leaf.node
        self._values[node.fqn] = objects.encode(node.value, where=node.fqn)
        is_empty = isinstance(node.value, dict) and not node.value
        self._object_specs.append(
            ObjectSpec(node.fqn, node.path, index, node.per_rank, is_empty, leaf.part_of)
        )


def tensor_of(data: bytes) -> torch.Tensor:
    """The bytes as uint8; a copy, since a tensor cannot share memory that must not change."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
