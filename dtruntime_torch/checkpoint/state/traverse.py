"""The one walk over a state: saving reads the leaves that it finds, loading fills them.

Dicts are always entered, lists and tuples only where they hold a tensor, as torch.distributed.checkpoint does it.
Beyond that one, tuples are entered too, a dict that is keyed by other than str stays whole unless it holds a tensor,
and so does a list of dicts without one: a history that grew is one value, and no two hundred names that differ.
A save refuses containers of types that would not come back; a load fills whatever container is there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeGuard, TypeVar

import torch

from dtruntime_torch.checkpoint import objects
from dtruntime_torch.checkpoint.specs import Kind, Path, PathKey
from dtruntime_torch.checkpoint.state.wrappers import WRAPPING, is_wrapper, take_apart
from dtruntime_torch.errors import InvalidArgument, UnsupportedType

T = TypeVar("T")
Replace = Callable[[object], None]

# The name of a state that is one value and no dict.
ROOT_NAME = "data"

# What comes back as exactly what it was.
_KINDS: dict[type, Kind] = {dict: "dict", OrderedDict: "ordered_dict", list: "list", tuple: "tuple"}

_COMMON_LEAVES = frozenset({type(None), bool, int, float, str, bytes})


class PerRank(Generic[T]):
    """Marks a value of a state as meant to differ by rank: each rank saves its own, and gets its own back.

    A rank that the checkpoint does not know, because the world grew, keeps what it has.

    Args:
        value: what a state may hold: a tensor, a dict, anything with `state_dict` and `load_state_dict`, a value.

    Example:
        >>> state = {"rng": PerRank(torch.get_rng_state())}
    """

    __slots__ = ("value",)

    def __init__(self, value: T) -> None:
        self.value = value


class Stateful(Protocol):
    """What has a state that can be taken and put back: a module, an optimizer, a scheduler."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class Node:
    """A leaf of a state, or a stateful object in it.

    Attributes:
        path: the way to it.
        fqn: its name: the path's keys joined by dots.
        value: what lies there.
        per_rank: it lies in a `PerRank`.
        replace: puts another value into its place.
    """

    path: Path
    fqn: str
    value: Any
    per_rank: bool
    replace: Replace

    @property
    def where(self) -> str:
        """Its name in errors."""
        return self.fqn or "the state"

    def child(self, container: Kind, key: object, value: object, replace: Replace) -> Node:
        """What this node's value holds under a key."""
        name = join_names(self.fqn, str(key)) if self.path else str(key)
        return Node((*self.path, PathKey(container, key)), name, value, self.per_rank, replace)


Look = Callable[[Node], None]


def fill_any(container: Node) -> None:
    """How a load looks at the containers that it enters: it fills them, and each stays the object that it is."""


def keep_types(container: Node) -> None:
    """How a save looks at the containers that it enters: it refuses what would come back as something else.

    Raises:
        UnsupportedType: naming the container, its type, and what to do.
    """
    kind = type(container.value)
    if kind in _KINDS:
        return
    plain = "dict" if issubclass(kind, Mapping) else "list" if issubclass(kind, list) else "tuple"
    raise UnsupportedType(
        f"{container.where}: a {kind.__module__}.{kind.__qualname__} would come back as a {plain}; save {plain}(...) of "
        f"it, which may be loaded into such a {kind.__qualname__}, or, if no tensor is in it, teach it: "
        f"dtruntime_torch.register_codec"
    )


def nodes(state: object, look: Look = fill_any) -> Iterator[Node]:
    """Finds the leaves and the stateful objects of a state, in the order of the state.

    Args:
        state: a dict, or bytes.
        look: is shown each container before it is entered, and may raise.

    Raises:
        InvalidArgument: it is neither.
        UnsupportedType: it contains itself, is too deep, or has a key that cannot be stored.

    Example:
        >>> [node.fqn for node in nodes({"a": 1, "b": {"c": [torch.ones(1), 2]}, "d": [3, 4]})]
        ['a', 'b.c.0', 'b.c.1', 'd']
    """
    if is_stateful(state) or not isinstance(state, (Mapping, bytes)):
        raise InvalidArgument(
            f"a state is a dict or bytes, and not a {type(state).__qualname__}; give it a name: "
            f'{{"model": model}}'
        )
    root = Node((), "" if isinstance(state, Mapping) else ROOT_NAME, state, False, cannot_replace)
    if isinstance(state, Mapping):
        yield from _enter(root, frozenset(), look)
    else:
        yield root


def nodes_below(node: Node, state: object, look: Look = fill_any) -> Iterator[Node]:
    """Finds the leaves of what a stateful object's `state_dict` returned; they are named below the object.

    Args:
        node: where the object lies.
        state: what it returned, mostly a dict.
        look: as for `nodes`.
    """
    yield from _walk(Node(node.path, node.fqn, state, node.per_rank, cannot_replace), frozenset(), look)


def name_clash(fqn: str, first: Path, second: Path) -> InvalidArgument:
    """The error for two places of a state that have one name."""
    places = [f"[{']['.join(repr(step.key) for step in path)}]" for path in (first, second)]
    return InvalidArgument(
        f"two leaves of the state are called {fqn!r}: {places[0]} and {places[1]}; rename one of them"
    )


def join_names(prefix: str, name: str) -> str:
    """The name of what lies under `name` below `prefix`."""
    return f"{prefix}.{name}"


def is_stateful(value: object) -> TypeGuard[Stateful]:
    """Whether the value has a state that can be taken and put back."""
    if isinstance(value, (torch.Tensor, type)) or type(value) in _COMMON_LEAVES:
        return False
    return callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))


def _walk(node: Node, inside: frozenset[int], look: Look) -> Iterator[Node]:
    value = node.value
    if is_wrapper(value):
        yield from _parts_of_wrapper(node, _deeper(node, inside), look)
    elif isinstance(value, torch.Tensor):
        yield node
    elif isinstance(value, PerRank):
        inner = Node(node.path, node.fqn, value.value, True, lambda new: setattr(value, "value", new))
        yield from _walk(inner, _deeper(node, inside), look)
    elif is_stateful(value) or not _is_entered(value):
        yield node
    else:
        yield from _enter(node, inside, look)


def _parts_of_wrapper(node: Node, inside: frozenset[int], look: Look) -> Iterator[Node]:
    inner, wrapping = take_apart(node.value, node.fqn)
    for name, part in inner.items():
        yield from _walk(node.child("dict", name, part, cannot_replace), inside, look)
    yield node.child("dict", WRAPPING, wrapping, cannot_replace)


def _enter(node: Node, inside: frozenset[int], look: Look) -> Iterator[Node]:
    inside = _deeper(node, inside)
    look(node)
    for child in _children(node):
        yield from _walk(child, inside, look)


def _deeper(node: Node, inside: frozenset[int]) -> frozenset[int]:
    if id(node.value) in inside:
        raise UnsupportedType(
            f"{node.where}: a {type(node.value).__qualname__} that contains itself cannot be stored"
        )
    if len(inside) == objects.MAX_DEPTH:
        raise UnsupportedType(
            f"{node.where}: more than {objects.MAX_DEPTH} containers in each other cannot be stored"
        )
    return inside | {id(node.value)}


def _is_entered(value: object) -> bool:
    if type(value) is not OrderedDict and objects.has_codec(type(value)):
        return False
    if isinstance(value, Mapping):
        return bool(value) and (all(isinstance(key, str) for key in value) or holds_tensor(value))
    return isinstance(value, (list, tuple)) and holds_tensor(value)


def holds_tensor(container: object) -> bool:
    """Whether a tensor, or what must be taken apart like one, lies anywhere in nested containers."""
    # The values are kept, so that no id is given to another one meanwhile.
    seen: dict[int, object] = {}
    waiting = [container]
    while waiting:
        value = waiting.pop()
        if type(value) in _COMMON_LEAVES or id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, (torch.Tensor, PerRank)) or is_stateful(value):
            return True
        if isinstance(value, Mapping):
            waiting.extend(value.values())
        elif isinstance(value, (list, tuple)):
            waiting.extend(value)
    return False


def _children(node: Node) -> Iterator[Node]:
    value = node.value
    if isinstance(value, Mapping):
        for key, item in value.items():
            if type(key) is not str:
                _check_key(key, f"{node.where}, a key of it")
            yield node.child(_KINDS.get(type(value), "dict"), key, item, _setter(value, key, node.fqn))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield node.child("list", i, item, _setter(value, i, node.fqn))
    else:
        items = list(value)
        for i, item in enumerate(value):
            yield node.child("tuple", i, item, _tuple_setter(node, items, i))


def _check_key(key: object, where: str) -> None:
    """A key becomes part of names, which must be the same in every process, and be read without torch or a codec."""
    if not _is_plain(key):
        raise UnsupportedType(
            f"{where}: a {type(key).__qualname__} gives no name to a tensor; use a str, a number, bytes or a tuple of "
            f"those as the key"
        )
    objects.encode(key, where)
    try:
        str(key)
    except ValueError as error:
        raise UnsupportedType(f"{where}: an integer that long gives no name to a tensor: {error}") from error


def _is_plain(key: object) -> bool:
    if type(key) is tuple:
        return all(map(_is_plain, key))
    # NaN is no key that is found again.
    return type(key) in _COMMON_LEAVES | {complex} and key == key


def _setter(container: Any, key: Any, fqn: str) -> Replace:
    def replace(value: object) -> None:
        if not isinstance(container, (MutableMapping, list)):
            raise InvalidArgument(f"{fqn}: a {type(container).__qualname__} cannot be changed; pass a dict")
        container[key] = value

    return replace


def _tuple_setter(node: Node, items: list[object], position: int) -> Replace:
    def replace(value: object) -> None:
        items[position] = value
        kind = type(node.value)
        node.replace(kind(*items) if hasattr(kind, "_fields") else kind(items))

    return replace


def cannot_replace(value: object) -> None:
    """Stands for the way back of a value that no container of the user's holds."""
    raise InvalidArgument("bytes cannot be filled in place; use load_checkpoint")
