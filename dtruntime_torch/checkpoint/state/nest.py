"""Leaves of a checkpoint, each with the way to it, back into nested containers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch

from dtruntime_torch.checkpoint.format.records import ObjectEntry
from dtruntime_torch.checkpoint.loading.load_plan import SavedState, SavedTensor
from dtruntime_torch.checkpoint.objects import decode
from dtruntime_torch.checkpoint.specs import Kind, Path
from dtruntime_torch.errors import CheckpointMismatch

SavedLeaf = SavedTensor | ObjectEntry


class _Step(NamedTuple):
    """One step of the way to a leaf.

    Attributes:
        container: what is stepped into.
        key: a dict's key, or a position.
        name: where a leaf is not called by the position: what it is called by. Elements of a list that have names
            do not take each other's place, but follow each other.
    """

    container: Kind
    key: object
    name: str = ""


class _Placed(NamedTuple):
    way: tuple[_Step, ...]
    leaf: SavedLeaf


def build_state(
    saved: SavedState, tensors: Mapping[str, torch.Tensor], values: Mapping[str, object]
) -> object:
    """Makes the state that was saved, in new containers.

    Args:
        saved: what the checkpoint holds.
        tensors: fqn -> the whole tensor, on the host; it becomes part of the result as it is.
        values: fqn -> object.

    Returns:
        A nested state dict with the keys, containers and order of the state that was saved, whose tied tensors are
        one tensor and whose leaves marked per rank are plain ones; or the bytes that were saved.

    Raises:
        CheckpointMismatch: the ranks saved structures that do not fit into one.
    """

    def value_of(leaf: SavedLeaf) -> object:
        if isinstance(leaf, ObjectEntry):
            return values[leaf.fqn]
        if leaf.is_bytes:
            return bytes_of(tensors[leaf.fqn])
        return tensors[first_of_tied(saved, leaf).fqn]

    return nest(leaves_of(saved), 0, value_of)


def leaves_of(saved: SavedState) -> list[SavedLeaf]:
    """All leaves of a checkpoint, in the order of the state."""
    leaves: list[SavedLeaf] = [*saved.tensors.values(), *saved.objects.values()]
    return sorted(leaves, key=lambda leaf: leaf.index)


def first_of_tied(saved: SavedState, tensor: SavedTensor) -> SavedTensor:
    """The tensor that this one is tied to, or itself."""
    first = saved.tensors.get(tensor.alias or tensor.fqn, tensor)
    return first if (first.dtype, first.global_shape) == (tensor.dtype, tensor.global_shape) else tensor


def bytes_of(tensor: torch.Tensor) -> bytes:
    """The bytes that were saved as a uint8 tensor."""
    return tensor.numpy().tobytes()


def names_along(path: Path) -> list[str]:
    """The names of what lies along a path, from "" to the leaf's."""
    keys = [str(step.key) for step in path]
    return [".".join(keys[:length]) for length in range(len(keys) + 1)]


def nest(leaves: Iterable[SavedLeaf], skip: int, value_of: Callable[[SavedLeaf], object]) -> object:
    """Puts leaves into nested containers.

    Args:
        leaves: in the order of the state.
        skip: how many containers to leave out, counted from the outermost.
        value_of: what to put in a leaf's place.

    Returns:
        The outermost container that was not left out; a dict if there are no leaves. If the only leaf is none of a
        container's, its value.

    Raises:
        CheckpointMismatch: two leaves need one place, or a list lacks an element.
    """
    return _nest([_Placed(_way_to(leaf), leaf) for leaf in leaves], skip, value_of)


def name_in_list(leaf: SavedLeaf, depth: int) -> str:
    """What the element of a list, `depth` steps into a state, is called by in the fqn of a leaf in it."""
    step = _way_to(leaf)[depth]
    return step.name or str(step.key)


def _way_to(leaf: SavedLeaf) -> tuple[_Step, ...]:
    steps = [_Step(step.container, step.key) for step in leaf.path]
    names = names_along(leaf.path)
    if leaf.fqn == names[-1]:
        return tuple(steps)
    for depth, step in enumerate(leaf.path):
        before = f"{names[depth]}."
        after = names[-1][len(names[depth + 1]) :]
        if step.container == "list" and leaf.fqn.startswith(before) and leaf.fqn.endswith(after):
            steps[depth] = _Step("list", step.key, leaf.fqn[len(before) : len(leaf.fqn) - len(after)])
            break
    return tuple(steps)


def _nest(placed: Sequence[_Placed], depth: int, value_of: Callable[[SavedLeaf], object]) -> object:
    if not placed:
        return {}
    if len(placed) > 1:
        # Of ranks of which some had nothing in a dict yet.
        placed = [one for one in placed if len(one.way) > depth or not _is_empty(one.leaf)] or placed[:1]
    if len(placed) == 1 and len(placed[0].way) == depth:
        return value_of(placed[0].leaf)
    if any(len(one.way) == depth for one in placed) or len({one.way[depth].container for one in placed}) > 1:
        raise _no_room(placed[0], depth)
    by_step: dict[_Step, list[_Placed]] = {}
    for one in placed:
        by_step.setdefault(one.way[depth], []).append(one)
    container = placed[0].way[depth].container
    if container in ("dict", "ordered_dict"):
        items = {step.key: _nest(below, depth + 1, value_of) for step, below in by_step.items()}
        return OrderedDict(items) if container == "ordered_dict" else items
    steps = sorted(by_step, key=lambda step: (step.key, step.name))
    if not any(step.name for step in steps) and steps[-1].key != len(steps) - 1:
        raise CheckpointMismatch(
            f"{'.'.join(str(step.key) for step in placed[0].way[:depth])}: the checkpoint holds the positions "
            f"{[step.key for step in steps][:10]} of a {container} only; load it in place instead"
        )
    elements = [_nest(by_step[step], depth + 1, value_of) for step in steps]
    return tuple(elements) if container == "tuple" else elements


def _is_empty(leaf: SavedLeaf) -> bool:
    """Whether it is a dict without anything in it."""
    if not isinstance(leaf, ObjectEntry):
        return False
    value = decode(leaf.value, leaf.fqn)
    return isinstance(value, dict) and not value


def _no_room(placed: _Placed, depth: int) -> CheckpointMismatch:
    where = ".".join(str(step.key) for step in placed.way[:depth])
    return CheckpointMismatch(
        f"{where or 'the state'}: ranks saved different kinds of things under this name, which do not fit into one "
        f"state; load it in place instead"
    )
