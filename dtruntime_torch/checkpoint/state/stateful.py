"""What the stateful objects of a state hold, leaf by leaf: modules and optimizers under the names that torch's
distributed checkpoints give, all others as their `state_dict` returns it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from dtruntime_torch.checkpoint.specs import PathKey
from dtruntime_torch.checkpoint.state.fqns import clean_name, named_state, parameter_names, parameters_of
from dtruntime_torch.checkpoint.state.local_shard import is_dtensor, local_part
from dtruntime_torch.checkpoint.state.traverse import (
    Look,
    Node,
    cannot_replace,
    fill_any,
    holds_tensor,
    is_stateful,
    join_names,
    nodes,
    nodes_below,
)
from dtruntime_torch.errors import UnsupportedType

STATE = "state"
GROUPS = "param_groups"


class Leaf(NamedTuple):
    """A leaf of a state.

    Attributes:
        node: where it lies.
        owned: it is an optimizer's state of one of its parameters.
        filled: it lies in a module or an optimizer, which has tensors of its own class when it is loaded.
        part_of: fqn of the stateful object whose `state_dict` gave it, if that is neither module nor optimizer.
    """

    node: Node
    owned: bool = False
    filled: bool = False
    part_of: str = ""


class Survey:
    """The leaves and stateful objects of a state, with what modules and optimizers must know of each other.

    Args:
        state: a dict, or bytes.
        look: is shown each container before it is entered, and may raise.

    Attributes:
        nodes: in the order of the state.
        module_states: name -> `state_dict()` of each module.

    Raises:
        InvalidArgument, UnsupportedType: the state cannot be saved or loaded into.
    """

    def __init__(self, state: object, look: Look = fill_any) -> None:
        self._look = look
        self.nodes = tuple(nodes(state, look))
        for node in self.nodes:
            _check_supported(node)
        self._modules = {
            node.fqn: node.value for node in self.nodes if isinstance(node.value, torch.nn.Module)
        }
        # Before any optimizer is looked at: FSDP2 puts the parameters back that optimizers know.
        self.module_states: dict[str, Mapping[str, Any]] = {
            fqn: module.state_dict() for fqn, module in self._modules.items()
        }

    def names_of(self, node: Node) -> tuple[str, ...]:
        """Names of the parameters of the optimizer at `node`, in its order."""
        return parameter_names(node.value, self._modules, node.fqn)

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The parameters that optimizers of the state own, with their names."""
        for node in self.nodes:
            if isinstance(node.value, torch.optim.Optimizer):
                yield from zip(self.names_of(node), parameters_of(node.value), strict=True)

    def leaves(self) -> Iterator[Leaf]:
        """All leaves, in the order of the state."""
        for node in self.nodes:
            if isinstance(node.value, torch.nn.Module):
                for _, entry in self.entries_of(node):
                    yield from (
                        Leaf(leaf, filled=True) for leaf in nodes_below(entry, entry.value, self._look)
                    )
            elif isinstance(node.value, torch.optim.Optimizer):
                yield from _optimizer_leaves(node, self.names_of(node), self._look)
            elif is_stateful(node.value):
                for leaf in nodes_below(node, node.value.state_dict(), self._look):
                    yield Leaf(leaf, part_of=node.fqn)
            else:
                yield Leaf(node)

    def entries_of(self, node: Node) -> Iterator[tuple[str, Node]]:
        """The entries of the `state_dict` of the module at `node`: the key there, and a node with the name here."""
        for key, value in self.module_states[node.fqn].items():
            yield key, node.child("dict", clean_name(node.value, key), value, cannot_replace)


def _optimizer_leaves(node: Node, names: tuple[str, ...], look: Look) -> Iterator[Leaf]:
    named = named_state(node.value, names, node.fqn)
    parameters = dict(zip(names, parameters_of(node.value), strict=True))
    below = len(node.path) + 1
    for leaf in nodes_below(node.child("dict", STATE, named[STATE], cannot_replace), named[STATE], look):
        parameter = parameters.get(str(leaf.path[below].key)) if len(leaf.path) > below else None
        if parameter is not None:
            _check_not_local(leaf, parameter)
        yield Leaf(leaf, owned=parameter is not None, filled=True)
    for i, group in enumerate(named[GROUPS]):
        group_node = _group_node(node, i, group)
        if holds_tensor(group):
            yield from (Leaf(leaf, filled=True) for leaf in nodes_below(group_node, group, look))
        else:
            yield Leaf(group_node, filled=True)


def _group_node(node: Node, position: int, group: Mapping[str, Any]) -> Node:
    path = (*node.path, PathKey("dict", GROUPS), PathKey("list", position))
    name = join_names(join_names(node.fqn, GROUPS), group_name(position, list(map(str, group["params"]))))
    return Node(path, name, group, node.per_rank, cannot_replace)


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
    kinds = {c.__name__ for c in type(node.value).__mro__}
    if "ZeroRedundancyOptimizer" in kinds:
        raise UnsupportedType(
            f"{node.fqn}: a ZeroRedundancyOptimizer must gather its state to save it; shard the model with "
            f"torch.distributed.fsdp.fully_shard (FSDP2) and use a plain optimizer instead"
        )
    if isinstance(node.value, torch.nn.Module) and any(map(_is_fsdp1, node.value.modules())):
        raise UnsupportedType(
            f"{node.fqn}: FSDP1 (FullyShardedDataParallel) must gather its state to save it; use "
            f"torch.distributed.fsdp.fully_shard (FSDP2) instead"
        )


def _is_fsdp1(module: torch.nn.Module) -> bool:
    return any(c.__name__ == "FullyShardedDataParallel" for c in type(module).__mro__)
