"""The parameter groups of an optimizer and those of a checkpoint: which belongs to which, and taking over options.

They are matched by the names of their parameters. Ranks may hold parts of one group, pipeline stages for example:
then the checkpoint has a group for each part, and what matters is that they agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dtruntime_torch.checkpoint import objects
from dtruntime_torch.checkpoint.format.records import ObjectEntry
from dtruntime_torch.checkpoint.loading.load_plan import SavedTensor
from dtruntime_torch.checkpoint.state.nest import SavedLeaf, name_in_list, nest
from dtruntime_torch.checkpoint.state.stateful import GROUPS, group_name
from dtruntime_torch.checkpoint.state.wanted import Below
from dtruntime_torch.errors import CheckpointMismatch, CorruptCheckpoint

# These say which parameters a group has, here and now.
_MEMBERSHIP = ("params", "param_names")
# Schedulers put these into groups of any optimizer.
_SCHEDULERS = {"initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum"}


@dataclass(frozen=True, slots=True)
class SavedGroup:
    """A parameter group of a checkpoint.

    Attributes:
        name: what it is called by; that of one without parameters tells its position.
        below: its leaves.
        params: the names of its parameters.
        options: name -> value, in which a tensor is the leaf that stands for it.
    """

    name: str
    below: Below
    params: tuple[str, ...]
    options: dict[str, object]


def saved_groups(leaves: Sequence[SavedLeaf], depth: int) -> list[SavedGroup]:
    """Reads the groups of a checkpoint.

    Args:
        leaves: all that lie in groups.
        depth: how many steps of their paths lead to a group.

    Raises:
        CorruptCheckpoint: something that is no group lies in a group's place.
    """
    by_name: dict[str, list[SavedLeaf]] = {}
    for leaf in leaves:
        by_name.setdefault(name_in_list(leaf, depth - 1), []).append(leaf)
    return [_saved_group(name, Below(depth, group)) for name, group in by_name.items()]


def _saved_group(name: str, below: Below) -> SavedGroup:
    options = nest(below.leaves, below.depth, _known_value)
    params = options.get("params") if isinstance(options, dict) else None
    if not isinstance(options, dict) or not isinstance(params, list):
        raise CorruptCheckpoint(f"{below.leaves[0].fqn}: this is no parameter group of an optimizer")
    return SavedGroup(
        name,
        below,
        tuple(map(str, params)),
        {key: value for key, value in options.items() if key not in _MEMBERSHIP},
    )


def _known_value(leaf: SavedLeaf) -> object:
    return objects.decode(leaf.value, where=leaf.fqn) if isinstance(leaf, ObjectEntry) else leaf


def match_groups(
    fqn: str, own: Sequence[Sequence[str]], saved: Sequence[SavedGroup]
) -> tuple[list[list[SavedGroup]], list[str]]:
    """Finds the saved groups for each group of an optimizer.

    Args:
        fqn: name of the optimizer.
        own: the names of the parameters of each of its groups.
        saved: the groups of the checkpoint.

    Returns:
        For each group the one that was it, or else those that it has parameters of, all with the same options; one
        without parameters may have none. And what differs.
    """
    matches = [_find_groups(position, names, saved) for position, names in enumerate(own)]
    differences = []
    for position, (names, groups) in enumerate(zip(own, matches, strict=True)):
        where = f"{fqn}.{GROUPS}[{position}]"
        if names and not groups:
            differences.append(f"{where}: its parameters {_some(names)} are in no group of the checkpoint")
        elif any(not _have_same_options(groups[0], other) for other in groups[1:]):
            differences.append(
                f"{where}: its parameters {_some(names)} are in groups of different options in the checkpoint"
            )
    for group in saved:
        positions = [position for position, groups in enumerate(matches) if any(g is group for g in groups)]
        if len(positions) > 1:
            differences.append(
                f"{fqn}.{GROUPS}{positions}: their parameters {_some(group.params)} are in one group in the checkpoint"
            )
    return matches, differences


def foreign_options(
    fqn: str,
    own: Sequence[Mapping[str, Any]],
    defaults: Mapping[str, Any],
    matches: Sequence[Sequence[SavedGroup]],
) -> list[str]:
    """Says where a group of the checkpoint belongs to an optimizer of another class.

    A later torch may add options to a class, an earlier one may lack some; of another class it is only if each side
    has options that the other lacks.

    Args:
        fqn: name of the optimizer.
        own: its groups.
        defaults: the options of its class.
        matches: for each of its groups those of the checkpoint.
    """
    differences = []
    for position, (group, saved) in enumerate(zip(own, matches, strict=True)):
        if not saved:
            continue
        theirs = sorted(saved[0].options.keys() - group.keys() - _SCHEDULERS)
        ours = sorted(defaults.keys() - saved[0].options.keys())
        if theirs and ours:
            differences.append(
                f"{fqn}.{GROUPS}[{position}]: checkpoint {theirs}, state {ours}: is it an optimizer of another class?"
            )
    return differences


def _find_groups(position: int, names: Sequence[str], saved: Sequence[SavedGroup]) -> list[SavedGroup]:
    if not names:
        return [group for group in saved if group.name == group_name(position, ())]
    same = [group for group in saved if set(group.params) == set(names)]
    return same or [group for group in saved if not set(group.params).isdisjoint(names)]


def _have_same_options(one: SavedGroup, other: SavedGroup) -> bool:
    try:
        return _comparable(one.options) == _comparable(other.options)
    except TypeError:
        # What stands for a tensor inside of a container.
        return False


def _comparable(options: Mapping[str, object]) -> dict[str, object]:
    """Of a tensor, whose value is not known yet, its kind."""
    return {
        key: (
            (value.dtype, value.global_shape) if isinstance(value, SavedTensor) else objects.encode(value, "")
        )
        for key, value in options.items()
    }


def check_same_tensors(fqn: str, groups: Sequence[SavedGroup], tensors: Mapping[str, torch.Tensor]) -> None:
    """Compares the tensors in the options of groups that become one.

    Raises:
        CheckpointMismatch: they differ.
    """
    for key, first in _tensor_options(groups[0]).items():
        for group in groups[1:]:
            if not torch.equal(tensors[first.fqn], tensors[_tensor_options(group)[key].fqn]):
                raise CheckpointMismatch(
                    f"{fqn}.{GROUPS}: the parameters {_some(groups[0].params)} and {_some(group.params)} have "
                    f"different values of {key!r} in the checkpoint, and are in one group in the state"
                )


def _tensor_options(group: SavedGroup) -> dict[str, SavedTensor]:
    return {key: value for key, value in group.options.items() if isinstance(value, SavedTensor)}


def _some(names: Sequence[str]) -> str:
    return f"[{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}]"


def scalar_device(group: Mapping[str, Any], parameter: torch.Tensor) -> torch.device:
    """Where an optimizer keeps step counts and the like: on the host, unless the device reads them by itself."""
    return parameter.device if group.get("capturable") or group.get("fused") else torch.device("cpu")


def fill_group(group: dict[str, Any], options: Mapping[str, object]) -> None:
    """Takes options over into a group, which stays the same dict; those that were not saved stay as they are.

    A tensor of the group is filled in place, from a number too.

    Args:
        group: of the optimizer.
        options: as they were saved; their tensors are copied.
    """
    device = torch.device("cpu")
    for parameter in group["params"][:1]:
        device = scalar_device({**group, **options}, parameter)
    with torch.no_grad():
        for key, value in options.items():
            if key not in _MEMBERSHIP:
                group[key] = _merge(group.get(key), value, device)


def _merge(current: object, value: object, device: torch.device) -> object:
    if isinstance(current, torch.Tensor) and current.is_inference():
        current = None  # it refuses to be filled outside of inference mode
    if isinstance(value, torch.Tensor):
        if isinstance(current, torch.Tensor) and (current.shape, current.dtype) == (value.shape, value.dtype):
            return current.copy_(value)
        return value.to(device, copy=True)
    if isinstance(current, torch.Tensor) and isinstance(value, (int, float)) and not isinstance(value, bool):
        return current.fill_(value)
    if isinstance(value, (list, tuple)):
        alike = isinstance(current, (list, tuple)) and len(current) == len(value)
        old = current if alike else [None] * len(value)
        return type(value)(_merge(c, v, device) for c, v in zip(old, value, strict=True))  # type: ignore[call-overload]
    if isinstance(value, dict):
        return {key: _merge(None, item, device) for key, item in value.items()}
    return value
