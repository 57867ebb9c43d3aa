"""The door from torch's types to specs: what a rank's state consists of, and where its data lies.

A walk over the state gives the leaves; each tensor becomes a spec and its data as it lies on this rank, each other
leaf a spec and its encoded value. Nothing is copied but what is no tensor, and nothing is changed.

A loop saves one structure again and again, and waits meanwhile. So every leaf is looked at each time, and what it is
compared with that which made its spec the last time: if it is the same, so is the spec, and the old one is taken.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from dtruntime_torch.checkpoint import objects
from dtruntime_torch.checkpoint.objects import Json, register_codec
from dtruntime_torch.checkpoint.specs import FlatSpecs, ObjectSpec, TensorSpec
from dtruntime_torch.checkpoint.state.codecs import register_codecs
from dtruntime_torch.checkpoint.state.local_shard import (
    Box,
    BoxFinder,
    check_class,
    check_plain,
    dtype_name,
    is_common,
    is_dtensor,
    local_tensor,
    memory_of,
    require_member,
)
from dtruntime_torch.checkpoint.state.stateful import Leaf, Origin, Survey
from dtruntime_torch.checkpoint.state.traverse import (
    PerRank,
    Place,
    Stateful,
    keep_types,
    name_clash,
)
from dtruntime_torch.checkpoint.state.wrappers import innermost
from dtruntime_torch.errors import InvalidArgument

__all__ = ["FlatState", "Flattener", "PerRank", "Stateful", "flatten_state", "register_codec"]

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
    return Flattener(rank).flatten(state)


class Flattener:
    """Takes one state apart after the other; the more alike they are, the quicker.

    What it returns is what `flatten_state` would. It keeps names and specs of the last state, and nothing of its data.

    Args:
        rank: as for `flatten_state`.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._root = Place((), "")
        self._boxes = BoxFinder()
        self._known = _Known([], FlatSpecs((), ()))

    def flatten(self, state: object) -> FlatState:
        """Takes a state apart, as `flatten_state` does."""
        survey = Survey(state, keep_types, self._root, keep=False)
        collector = _Collector(self._rank, self._boxes, self._known, _owned_data(survey))
        collector.collect(survey.leaves())
        flat, known = collector.collected()
        if known is not self._known:
            # Those of kinds of shards that there are no more would pile up.
            self._boxes = BoxFinder()
            self._known = known
        return flat


# What the spec of a leaf was made of, and the spec.
_Found = tuple[Hashable, TensorSpec | ObjectSpec]


class _Known(NamedTuple):
    """What an earlier state was found to consist of."""

    leaves: list[_Found]
    specs: FlatSpecs


def _owned_data(survey: Survey) -> dict[int, list[Hashable]]:
    """The memory of the parameters of the state's optimizers, by address.

    That of DTensors is left out: their mesh tells what their optimizer would.
    """
    owned: dict[int, list[Hashable]] = {}
    for name, parameter in survey.named_parameters():
        if is_common(parameter):
            owned.setdefault(parameter.data_ptr(), []).append(memory_of(parameter))
            continue
        for where, part in innermost(parameter, name):
            if not is_dtensor(part):
                check_plain(part, where)
                owned.setdefault(part.data_ptr(), []).append(memory_of(part))
    return owned


class _Collector:
    def __init__(self, rank: int, boxes: BoxFinder, known: _Known, owned: dict[int, list[Hashable]]) -> None:
        self._rank = rank
        self._boxes = boxes
        self._known = known
        self._owned = owned
        # Two tensors of one memory have one address: only those that do are looked at closely.
        self._first_at: dict[int, int] = {}
        self._tied_at: dict[int, dict[Hashable, str]] = {}
        self._found: list[_Found] = []
        self._all_known = True
        self._tensors: dict[str, torch.Tensor] = {}
        self._values: dict[str, Json] = {}

    def collected(self) -> tuple[FlatState, _Known]:
        known = self._known
        if not self._all_known or len(self._found) != len(known.leaves):
            specs = [spec for _, spec in self._found]
            known = _Known(
                self._found,
                FlatSpecs(
                    tuple(spec for spec in specs if isinstance(spec, TensorSpec)),
                    tuple(spec for spec in specs if isinstance(spec, ObjectSpec)),
                ),
            )
        return FlatState(known.specs, self._tensors, self._values), known

    def collect(self, leaves: Iterable[Leaf]) -> None:
        # All that is done for each tensor of each save, in one loop: calls and look-ups would double its price.
        found, tensors, values = self._found, self._tensors, self._values
        known, owned, first_at, whole = self._known.leaves, self._owned, self._first_at, self._boxes.whole
        for place, value, per_rank, origin in leaves:
            fqn, path, part_of = place.fqn, place.path, origin.part_of
            if fqn in tensors or fqn in values:
                raise self._clash(place)
            if is_common(value):
                shape = value.shape
                tensor, box = value.detach(), whole(shape)
            elif isinstance(value, torch.Tensor):
                shape = value.shape
                tensor, box = self._look_closely(value, fqn, origin)
            else:
                self._add_value(place, value, per_rank, part_of)
                continue
            tensors[fqn] = tensor
            index, address = len(found), tensor.data_ptr()
            spread = not per_rank and box.holders is None
            if spread and not origin.owned:
                spread = address in owned and memory_of(tensor) in owned[address]
            alias = None
            if first_at.setdefault(address, index) != index:
                alias = self._tied_to(fqn, tensor, address, box, per_rank)
            made_of = (fqn, path, tensor.dtype, shape, box, spread, per_rank, alias, part_of)
            if index < len(known) and known[index][0] == made_of:
                found.append(known[index])
                continue
            self._add_new(
                made_of,
                TensorSpec(
                    fqn=fqn,
                    path=path,
                    index=index,
                    dtype=dtype_name(tensor),
                    global_shape=tuple(shape),
                    offsets=box.offsets,
                    shape=box.shape,
                    layout=box.layout,
                    holders=box.holders,
                    first_holders=box.first_holders,
                    spread=spread,
                    per_rank=per_rank,
                    alias=alias,
                    part_of=part_of,
                ),
            )

    def _look_closely(self, value: torch.Tensor, fqn: str, origin: Origin) -> tuple[torch.Tensor, Box]:
        tensor = local_tensor(value, fqn)
        if is_dtensor(value):
            box = self._boxes.of_shard(value, tensor.shape, fqn)
            require_member(box, self._rank, fqn)
            return tensor, box
        if not origin.filled:
            check_class(value, fqn)
        return tensor, self._boxes.whole(value.shape)

    def _add_value(self, place: Place, value: object, per_rank: bool, part_of: str) -> None:
        """Adds what is no tensor."""
        fqn, path, index = place.fqn, place.path, len(self._found)
        spec: TensorSpec | ObjectSpec
        if type(value) is bytes:
            self._tensors[fqn] = tensor_of(value)
            shape = (len(value),)
            spec = TensorSpec(
                fqn=fqn,
                path=path,
                index=index,
                dtype="uint8",
                global_shape=shape,
                offsets=(0,),
                shape=shape,
                per_rank=per_rank,
                is_bytes=True,
                part_of=part_of,
            )
        else:
            self._values[fqn] = objects.encode(value, where=fqn)
            spec = ObjectSpec(fqn, path, index, per_rank, isinstance(value, dict) and not value, part_of)
        known = self._known.leaves
        if index < len(known) and known[index][1] == spec:
            self._found.append(known[index])
        else:
            self._add_new(None, spec)

    def _add_new(self, made_of: Hashable, spec: TensorSpec | ObjectSpec) -> None:
        self._found.append((made_of, spec))
        self._all_known = False

    def _clash(self, place: Place) -> InvalidArgument:
        first = next(spec for _, spec in self._found if spec.fqn == place.fqn)
        return name_clash(place.fqn, first.path, place.path)

    def _tied_to(self, fqn: str, tensor: torch.Tensor, address: int, box: Box, per_rank: bool) -> str | None:
        """The first tensor of the same memory, of those at its address."""
        if not tensor.numel():
            return None
        tied = self._tied_at.get(address)
        if tied is None:
            _, first = self._found[self._first_at[address]]
            assert isinstance(first, TensorSpec)
            its = Box(first.offsets, first.shape, first.layout, first.holders, first.first_holders)
            tied = {(memory_of(self._tensors[first.fqn]), its, first.per_rank): first.fqn}
            self._tied_at[address] = tied
        name = tied.setdefault((memory_of(tensor), box, per_rank), fqn)
        return None if name == fqn else name


def tensor_of(data: bytes) -> torch.Tensor:
    """The bytes as uint8; a copy, since a tensor cannot share memory that must not change."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
