"""A checkpoint into an optimizer, without a step and without `Optimizer.load_state_dict`.

That one casts state to the parameter's dtype, matches parameters by position and replaces the dicts of the groups,
to which schedulers hold on. Here parameters are matched by name, the state of each becomes exactly what was saved,
and groups are changed in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import torch

from dtruntime_torch.checkpoint.format.records import ObjectEntry
from dtruntime_torch.checkpoint.loading.load_plan import SavedTensor
from dtruntime_torch.checkpoint.objects import decode
from dtruntime_torch.checkpoint.specs import Path
from dtruntime_torch.checkpoint.state.fqns import parameters_of
from dtruntime_torch.checkpoint.state.local_shard import BoxFinder, local_part
from dtruntime_torch.checkpoint.state.nest import SavedLeaf, nest
from dtruntime_torch.checkpoint.state.optimizer_groups import (
    SavedGroup,
    check_same_tensors,
    fill_group,
    foreign_options,
    match_groups,
    saved_groups,
    scalar_device,
)
from dtruntime_torch.checkpoint.state.stateful import GROUPS, STATE
from dtruntime_torch.checkpoint.state.traverse import Node
from dtruntime_torch.checkpoint.state.wanted import Below, Loaded, Request, fill_tensor, needed_box
from dtruntime_torch.checkpoint.state.wrappers import (
    WRAPPING,
    Wrapping,
    innermost,
    inside,
    is_wrapper,
    rewrapped,
    with_wrapper,
)


def optimizer_request(node: Node, names: Sequence[str], below: Below, boxes: BoxFinder) -> Request:
    """Asks for the state of an optimizer's parameters and for its groups' options.

    Args:
        node: where the optimizer lies.
        names: of its parameters, in its order.
        below: what the checkpoint holds under the optimizer's name. What of that belongs to parameters that it
            does not have is unexpected: another rank may have them.
        boxes: finds the shards of DTensors.
    """
    optimizer, depth = node.value, below.depth + 2
    states, in_groups, others = _sort(below)
    saved = saved_groups(in_groups, depth)
    matches, differences = match_groups(node.fqn, _by_group(optimizer, names), saved)
    differences += foreign_options(node.fqn, optimizer.param_groups, optimizer.defaults, matches)
    request = Request(differences=differences, unexpected=[leaf.fqn for leaf in others])
    # Of a group without parameters nothing would be missed.
    request.unexpected += [
        leaf.fqn
        for group in saved
        if group.params and set(group.params).isdisjoint(names)
        for leaf in group.below.leaves
    ]
    for leaf in [leaf for groups in matches for group in groups for leaf in group.below.leaves]:
        request.want(leaf)

    target = _StateTarget(optimizer, names, depth)
    foreign = {name for group in saved for name in group.params}.difference(names)
    for name in foreign.intersection(states):
        request.unexpected += [leaf.fqn for leaf in states.pop(name)]
    for leaf in [leaf for leaves in states.values() for leaf in leaves]:
        request.want(leaf, needed_box(leaf, target.like(leaf), boxes))
        request.differences += target.differences(leaf)

    def check(loaded: Loaded) -> None:
        for groups in filter(None, matches):
            check_same_tensors(node.fqn, groups, loaded.tensors)

    def fill(loaded: Loaded) -> None:
        for group, groups in zip(optimizer.param_groups, matches, strict=True):
            if groups:
                fill_group(group, _options(groups[0], loaded))
        target.fill(states, loaded)

    request.check, request.fill = check, fill
    request.homes = lambda: target.homes(states)
    return request


def _sort(below: Below) -> tuple[dict[str, list[SavedLeaf]], list[SavedLeaf], list[SavedLeaf]]:
    """Which leaves are the state of what name, which lie in groups, and which in neither."""
    states: dict[str, list[SavedLeaf]] = {}
    in_groups, others = [], []
    for leaf in below.leaves:
        section, *rest = [str(step.key) for step in leaf.path[below.depth : below.depth + 2]] or [""]
        if section == STATE and rest:
            states.setdefault(rest[0], []).append(leaf)
        elif section == GROUPS and rest:
            in_groups.append(leaf)
        elif section != STATE:
            others.append(leaf)
    return states, in_groups, others


def _by_group(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> list[list[str]]:
    rest = iter(names)
    return [[next(rest) for _ in group["params"]] for group in optimizer.param_groups]


def _options(group: SavedGroup, loaded: Loaded) -> dict[str, object]:
    options = nest(group.below.leaves, group.below.depth, lambda leaf: loaded.value_of(leaf, _as_it_is))
    assert isinstance(options, dict)
    return options


def _as_it_is(leaf: SavedTensor, data: torch.Tensor) -> torch.Tensor:
    return data


class _StateTarget:
    """The state of an optimizer's parameters.

    Args:
        optimizer: whose state.
        names: of its parameters.
        depth: how many steps of a leaf's path lead to the state of a parameter.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, names: Sequence[str], depth: int) -> None:
        self._state: dict[Any, Any] = optimizer.state
        self._parameters = dict(zip(names, parameters_of(optimizer), strict=True))
        self._group_of = {
            name: group
            for group, members in zip(optimizer.param_groups, _by_group(optimizer, names), strict=True)
            for name in members
        }
        self._depth = depth
        self._homes: dict[str, torch.Tensor] = {}
        self._taken: set[int] = set().union(*map(_addresses, self._parameters.values()))

    def like(self, leaf: SavedLeaf) -> torch.Tensor | None:
        """The tensor whose placements, device and strides a tensor's data takes: what lies there, or the parameter."""
        if not isinstance(leaf, SavedTensor):
            return None
        current = self._current(leaf)
        if current is not None:
            return current
        parameter = self._like_parameter(leaf)
        return parameter if _is_like(parameter, leaf) and not _is_step(leaf) else None

    def differences(self, leaf: SavedLeaf) -> list[str]:
        """Says where a wrapper was saved that cannot be made here."""
        if not isinstance(leaf, ObjectEntry) or leaf.path[-1].key != WRAPPING:
            return []
        _, differs = self._wrapping(leaf, decode(leaf.value, leaf.fqn))
        where = leaf.fqn.rpartition(".")[0]
        return [f"{where}: {differs}; if the first step makes it, take that first"] if differs else []

    def _wrapping(self, leaf: SavedLeaf, saved: object) -> tuple[object, str | None]:
        """What was saved of a wrapper, with the one that it is made like: what lies there, or the parameter."""
        if not isinstance(saved, Wrapping):
            return saved, "no wrapper in the checkpoint"
        name, way = self._name(leaf), leaf.path[self._depth : -1]
        current = _at(self._state.get(self._parameters.get(name, name)), way)
        like = current if is_wrapper(current) else self._like_parameter(leaf)
        return with_wrapper(saved, like, leaf.fqn)

    def _like_parameter(self, leaf: SavedLeaf) -> object:
        """The parameter that a leaf is state of; of what lies in a wrapper, what lies there in the parameter."""
        parameter = self._parameters.get(self._name(leaf))
        if not is_wrapper(parameter):
            return parameter
        keys = [step.key for step in leaf.path[self._depth + 1 :]]
        return inside(parameter, keys[:-1] if keys[-1:] == [WRAPPING] else keys)

    def _value_of(
        self, leaf: SavedLeaf, loaded: Loaded, place: Callable[[SavedTensor, torch.Tensor], torch.Tensor]
    ) -> object:
        value = loaded.value_of(leaf, place)
        return self._wrapping(leaf, value)[0] if isinstance(value, Wrapping) else value

    def fill(self, states: dict[str, list[SavedLeaf]], loaded: Loaded) -> None:
        """Makes the state of each parameter what was saved of it; of one without saved state, none."""
        stays = {id(self._parameters.get(name, name)) for name in states}
        for key in [key for key in self._state if id(key) not in stays and key not in states]:
            del self._state[key]
        for name, leaves in states.items():
            new = rewrapped(nest(leaves, self._depth, lambda leaf: self._value_of(leaf, loaded, self._place)))
            key = self._parameters.get(name, name)
            old = self._state.get(key)
            if isinstance(old, dict) and isinstance(new, dict):
                old.clear()
                old.update(new)
            else:
                self._state[key] = new

    def homes(self, states: dict[str, list[SavedLeaf]]) -> dict[str, torch.Tensor]:
        """The memory in which the tensors of these states end up."""
        leaves = (leaf for leaves in states.values() for leaf in leaves)
        return {
            leaf.fqn: self._home(leaf)
            for leaf in leaves
            if isinstance(leaf, SavedTensor) and not leaf.is_bytes
        }

    def _place(self, leaf: SavedTensor, data: torch.Tensor) -> torch.Tensor:
        home = self._home(leaf)
        fill_tensor(home, data)
        return home

    def _home(self, leaf: SavedTensor) -> torch.Tensor:
        """Where a tensor's data belongs: what lies there, or a new tensor; no two have the same memory."""
        if leaf.fqn not in self._homes:
            self._homes[leaf.fqn] = home = self._find_home(leaf)
            self._taken.update(_addresses(home))
        return self._homes[leaf.fqn]

    def _find_home(self, leaf: SavedTensor) -> torch.Tensor:
        like, device, dtype = self.like(leaf), self._device(leaf), getattr(torch, leaf.dtype)
        if like is None or like.device != device:
            return torch.empty(leaf.global_shape, dtype=dtype, device=device)
        # One that was made in inference mode refuses to be filled outside of it.
        if like.dtype == dtype and not like.is_inference() and self._taken.isdisjoint(_addresses(like)):
            return like
        return torch.empty_like(like, dtype=dtype, requires_grad=False)

    def _device(self, leaf: SavedTensor) -> torch.device:
        parameter = self._parameters.get(self._name(leaf))
        current = self._current(leaf)
        if parameter is not None and _is_step(leaf):
            return scalar_device(self._group_of[self._name(leaf)], parameter)
        if current is not None:
            return current.device
        return parameter.device if parameter is not None else torch.device("cpu")

    def _current(self, leaf: SavedTensor) -> torch.Tensor | None:
        name = self._name(leaf)
        found = _at(self._state.get(self._parameters.get(name, name)), leaf.path[self._depth :])
        return found if _is_like(found, leaf) else None

    def _name(self, leaf: SavedLeaf) -> str:
        return str(leaf.path[self._depth - 1].key)


def _is_like(value: object, leaf: SavedTensor) -> TypeGuard[torch.Tensor]:
    """Whether it is a tensor of that shape; what lies in a wrapper is compared by itself."""
    return (
        isinstance(value, torch.Tensor) and not is_wrapper(value) and tuple(value.shape) == leaf.global_shape
    )


def _is_step(leaf: SavedTensor) -> bool:
    return leaf.path[-1].key == "step" and not leaf.global_shape


def _addresses(tensor: torch.Tensor) -> set[int]:
    """Where a tensor's data begins, or those of the tensors in it; nowhere if there is none."""
    parts = (local_part(part) for _, part in innermost(tensor, ""))
    return {part.data_ptr() for part in parts if part.numel()}


def _at(value: Any, path: Path) -> Any:
    """What lies at the end of a path through nested containers, or None."""
    for step in path:
        try:
            value = inside(value, [step.key]) if is_wrapper(value) else value[step.key]
        except (KeyError, IndexError, TypeError):
            return None
    return value
