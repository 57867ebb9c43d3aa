"""What the stateful objects of a state hold, leaf by leaf: modules and optimizers under the names that torch's
distributed checkpoints give, all others as their `state_dict` returns it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from dtruntime_torch.checkpoint.state.fqns import NameCleaner, named_state, parameter_names, parameters_of
from dtruntime_torch.checkpoint.state.local_shard import PLAIN_TENSORS, is_dtensor, local_part
from dtruntime_torch.checkpoint.state.traverse import (
    Look,
    Node,
    Place,
    fill_any,
    holds_tensor,
    is_stateful,
    nodes,
    nodes_below,
)
from dtruntime_torch.errors import UnsupportedType

STATE = "state"
GROUPS = "param_groups"


class Origin(NamedTuple):
    """Whose leaf it is.

    Attributes:
        owned: an optimizer's, which keeps it for one of its parameters.
        filled: it lies in a module or an optimizer, which has tensors of its own class when it is loaded.
        part_of: fqn of the stateful object whose `state_dict` gave it, if that is neither module nor optimizer.
    """

    owned: bool = False
    filled: bool = False
    part_of: str = ""


_USERS = Origin()
_MODULES = Origin(filled=True)
_OPTIMIZERS = Origin(filled=True)
_PARAMETERS = Origin(owned=True, filled=True)

# Place, value, whether it is a rank's own, and whose leaf it is.
Leaf = tuple[Place, Any, bool, Origin]


class Survey:
    """The leaves and stateful objects of a state, with what modules and optimizers must know of each other.

    Args:
        state: a dict, or bytes.
        look: is shown each container before it is entered, and may raise.
        root: as for `nodes`.
        keep: keeps `nodes`. Garbage collection goes through them: who needs the leaves alone does without.

    Attributes:
        nodes: in the order of the state, if they are kept.
        module_states: name -> `state_dict()` of each module.

    Raises:
        InvalidArgument, UnsupportedType: the state cannot be saved or loaded into.
    """

    def __init__(
        self, state: object, look: Look = fill_any, root: Place | None = None, keep: bool = True
    ) -> None:
        self._look = look
        self._places: list[Place] = []
        self._values: list[Any] = []
        self._per_rank: list[bool] = []
        self._modules: dict[str, torch.nn.Module] = {}
        self._optimizers: list[Node] = []
        kept = []
        for node in nodes(state, look, root):
            self._places.append(node.place)
            self._values.append(node.value)
            self._per_rank.append(node.per_rank)
            if keep:
                kept.append(node)
            if type(node.value) not in PLAIN_TENSORS and is_stateful(node.value):
                self._add_stateful(node)
        self.nodes = tuple(kept)
        # Before any optimizer is looked at: FSDP2 puts the parameters back that optimizers know.
        self.module_states: dict[str, Mapping[str, Any]] = {
            fqn: module.state_dict() for fqn, module in self._modules.items()
        }

    def _add_stateful(self, node: Node) -> None:
        _check_supported(node)
        if isinstance(node.value, torch.nn.Module):
            self._modules[node.fqn] = node.value
        elif isinstance(node.value, torch.optim.Optimizer):
            self._optimizers.append(node)

    def names_of(self, node: Node) -> tuple[str, ...]:
        """Names of the parameters of the optimizer at `node`, in its order."""
        return parameter_names(node.value, self._modules, node.fqn)

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The parameters that optimizers of the state own, with their names."""
        for node in self._optimizers:
            yield from zip(self.names_of(node), parameters_of(node.value), strict=True)

    def leaves(self) -> Iterator[Leaf]:
        """All leaves, in the order of the state."""
        for place, value, per_rank in zip(self._places, self._values, self._per_rank, strict=True):
            if type(value) in PLAIN_TENSORS or not is_stateful(value):
                yield place, value, per_rank, _USERS
            else:
                yield from self._leaves_of(Node(place, value, per_rank))

    def _leaves_of(self, node: Node) -> Iterator[Leaf]:
        """The leaves of a stateful object."""
        if isinstance(node.value, torch.nn.Module):
            for _, place, value in self._entries_at(node):
                if type(value) in PLAIN_TENSORS or is_dtensor(value):
                    yield place, value, node.per_rank, _MODULES
                else:
                    entry = Node(place, value, node.per_rank)
                    yield from _with(_MODULES, nodes_below(entry, value, self._look))
        elif isinstance(node.value, torch.optim.Optimizer):
            yield from _optimizer_leaves(node, self.names_of(node), self._look)
        else:
            below = nodes_below(node, node.value.state_dict(), self._look)
            yield from _with(Origin(part_of=node.fqn), below)

    def entries_of(self, node: Node) -> Iterator[tuple[str, Node]]:
        """The entries of the `state_dict` of the module at `node`: the key there, and a node with the name here."""
        for key, place, value in self._entries_at(node):
            yield key, Node(place, value, node.per_rank)

    def _entries_at(self, node: Node) -> Iterator[tuple[str, Place, Any]]:
        state, clean = self.module_states[node.fqn], NameCleaner(node.value)
        known = node.place.inside("dict")
        for key, value in state.items():
            name = clean(key)
            yield key, known.get(name) or node.place.child("dict", name), value
        node.place.forget_others("dict", state)


def _with(origin: Origin, found: Iterable[Node]) -> Iterator[Leaf]:
    for node in found:
        yield node.place, node.value, node.per_rank, origin


def _optimizer_leaves(node: Node, names: tuple[str, ...], look: Look) -> Iterator[Leaf]:
    named = named_state(node.value, names, node.fqn)
    parameters = dict(zip(names, parameters_of(node.value), strict=True))
    below = len(node.path) + 1
    step, parameter = None, None
    for leaf in nodes_below(node.child("dict", STATE, named[STATE]), named[STATE], look):
        path = leaf.place.path
        if len(path) == below:
            parameter = None
        elif path[below] is not step:
            step = path[below]
            parameter = parameters.get(str(step.key))
        if (
            parameter is not None
            and type(parameter) not in PLAIN_TENSORS
            and type(leaf.value) is not type(parameter)
        ):
            _check_not_local(leaf, parameter)
        yield leaf.place, leaf.value, leaf.per_rank, _OPTIMIZERS if parameter is None else _PARAMETERS
    for i, group in enumerate(named[GROUPS]):
        group_node = _group_node(node, i, group)
        found = nodes_below(group_node, group, look) if holds_tensor(group) else (group_node,)
        yield from _with(_OPTIMIZERS, found)


def _group_node(node: Node, position: int, group: Mapping[str, Any]) -> Node:
    groups = node.place.child("dict", GROUPS)
    place = groups.child("list", position, name=group_name(position, list(map(str, group["params"]))))
    return Node(place, group, node.per_rank)


def group_name(position: int, params: Sequence[str]) -> str:
    """Named by its parameters and not by its position: stages of a pipeline each have a group 0 of their own.

    By all of them: ranks with experts of their own share the first ones.
    """
    if len(params) < 2:
        return params[0] if params else f"empty-{position}"
    digest = hashlib.sha256("\0".join(params).encode("utf-8", "surrogatepass")).hexdigest()
    return f"{params[0]}-{digest[:16]}"


def _check_not_local(leaf: Node, parameter: torch.Tensor) -> None:
    value = leaf.value
    if not is_dtensor(parameter) or not isinstance(value, torch.Tensor) or is_dtensor(value):
        return
    if value.dim() and value.shape == local_part(parameter).shape != parameter.shape:
        raise UnsupportedType(
            f"{leaf.fqn}: a plain tensor for this rank's shard of a DTensor parameter would be saved from one rank "
            f"only; make it a DTensor with the parameter's placements"
        )


def _check_supported(node: Node) -> None:
    if _is_called("ZeroRedundancyOptimizer", type(node.value)):
        raise UnsupportedType(
            f"{node.fqn}: a ZeroRedundancyOptimizer must gather its state to save it; shard the model with "
            f"torch.distributed.fsdp.fully_shard (FSDP2) and use a plain optimizer instead"
        )
    if not isinstance(node.value, torch.nn.Module):
        return
    if any(_is_called("FullyShardedDataParallel", kind) for kind in set(map(type, node.value.modules()))):
        raise UnsupportedType(
            f"{node.fqn}: FSDP1 (FullyShardedDataParallel) must gather its state to save it; use "
            f"torch.distributed.fsdp.fully_shard (FSDP2) instead"
        )


def _is_called(name: str, kind: type) -> bool:
    return any(c.__name__ == name for c in kind.__mro__)
