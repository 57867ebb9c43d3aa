"""The one walk over a state: saving reads the leaves that it finds, loading fills them.

Dicts are always entered, lists and tuples only where they hold a tensor, as torch.distributed.checkpoint does it.
Beyond that one, tuples are entered too, a dict that is keyed by other than str stays whole unless it holds a tensor,
and so does a list of dicts without one: a history that grew is one value, and no two hundred names that differ.
A save refuses containers of types that would not come back; a load fills whatever container is there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping
from typing import Any, Generic, Protocol, TypeGuard, TypeVar

import torch

from dtruntime_torch.checkpoint import objects
from dtruntime_torch.checkpoint.specs import Kind, Path, PathKey
from dtruntime_torch.checkpoint.state.local_shard import PLAIN_TENSORS, dtensor_class
from dtruntime_torch.checkpoint.state.wrappers import WRAPPING, is_wrapper, take_apart
from dtruntime_torch.errors import InvalidArgument, UnsupportedType

T = TypeVar("T")

# The name of a state that is one value and no dict.
ROOT_NAME = "data"

# What comes back as exactly what it was.
_KINDS: dict[type, Kind] = {dict: "dict", OrderedDict: "ordered_dict", list: "list", tuple: "tuple"}

_COMMON_LEAVES = frozenset({type(None), bool, int, float, str, bytes})
_LEAVES = _COMMON_LEAVES | PLAIN_TENSORS
_STRINGS = {str}


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


class Place:
    """Where something lies in states of one structure. A walk makes the places that it comes to, the next finds them.

    Nothing of a state is in here but the keys of its containers.

    Attributes:
        path: the way there.
        fqn: the keys of the path joined by dots.
    """

    __slots__ = ("_inside", "fqn", "path")

    def __init__(self, path: Path, fqn: str) -> None:
        self.path = path
        self.fqn = fqn
        self._inside: dict[Kind, dict[str | int, Place]] = {}

    def inside(self, container: Kind) -> dict[str | int, Place]:
        """The places that are known in a container of that kind, by keys of exactly these types."""
        known = self._inside.get(container)
        if known is None:
            known = self._inside[container] = {}
        return known

    def child(self, container: Kind, key: object, name: str | None = None) -> Place:
        """The place of what lies under a key; another name than the key's makes a place that is not kept."""
        # 1, 1.0 and True are one key of a dict, and have different names.
        kept = name is None and (type(key) is str or type(key) is int)
        known = self.inside(container).get(key) if kept else None  # type: ignore[call-overload]
        if known is not None:
            return known  # type: ignore[no-any-return]
        name = str(key) if name is None else name
        made = Place((*self.path, PathKey(container, key)), join_names(self.fqn, name) if self.path else name)
        if kept:
            self.inside(container)[key] = made  # type: ignore[index]
        return made

    def forget_others(self, container: Kind, keys: Collection[object]) -> None:
        """Keeps of a container only what lies under these keys."""
        known = self.inside(container)
        if len(known) > len(keys):
            self._inside[container] = {key: known[key] for key in known.keys() & set(keys)}


class Node:
    """A leaf of a state, or a stateful object in it.

    Attributes:
        place: where it lies.
        value: what lies there.
        per_rank: it lies in a `PerRank`.
        owner: the container that holds it, if another value can be put there.
    """

    # Tens of thousands are made for each save: neither a frozen dataclass nor a closure to replace it by.
    __slots__ = ("_put", "owner", "per_rank", "place", "value")

    def __init__(
        self,
        place: Place,
        value: Any,
        per_rank: bool = False,
        put: Callable[[Node, object], None] | None = None,
        owner: Node | None = None,
    ) -> None:
        self.place = place
        self.value = value
        self.per_rank = per_rank
        self._put = put
        self.owner = owner

    @property
    def path(self) -> Path:
        """The way to it."""
        return self.place.path

    @property
    def fqn(self) -> str:
        """Its name: the path's keys joined by dots."""
        return self.place.fqn

    @property
    def where(self) -> str:
        """Its name in errors."""
        return self.fqn or "the state"

    def child(self, container: Kind, key: object, value: object) -> Node:
        """What this node's value holds under a key, which no other can be put for."""
        return Node(self.place.child(container, key), value, self.per_rank)

    def replace(self, value: object) -> None:
        """Puts another value into its place."""
        if self._put is None:
            raise InvalidArgument("bytes cannot be filled in place; use load_checkpoint")
        self._put(self, value)


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


def nodes(state: object, look: Look = fill_any, root: Place | None = None) -> Iterator[Node]:
    """Finds the leaves and the stateful objects of a state, in the order of the state.

    Args:
        state: a dict, or bytes.
        look: is shown each container before it is entered, and may raise.
        root: where the state lies, for names that are known from an earlier walk.

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
    if isinstance(state, Mapping):
        yield from _enter(Node(root or Place((), ""), state), (), look)
    else:
        yield Node(Place((), ROOT_NAME), state)


def nodes_below(node: Node, state: object, look: Look = fill_any) -> Iterator[Node]:
    """Finds the leaves of what a stateful object's `state_dict` returned; they are named below the object.

    Args:
        node: where the object lies.
        state: what it returned, mostly a dict.
        look: as for `nodes`.
    """
    yield from _walk(Node(node.place, state, node.per_rank), (), look)


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


def _walk(node: Node, inside: tuple[int, ...], look: Look) -> Iterator[Node]:
    value = node.value
    if is_wrapper(value):
        yield from _parts_of_wrapper(node, _deeper(node, inside), look)
    elif isinstance(value, torch.Tensor):
        yield node
    elif isinstance(value, PerRank):
        inner = Node(node.place, value.value, True, _put_inside, node)
        yield from _walk(inner, _deeper(node, inside), look)
    elif is_stateful(value) or not _is_entered(value):
        yield node
    else:
        yield from _enter(node, inside, look)


def _parts_of_wrapper(node: Node, inside: tuple[int, ...], look: Look) -> Iterator[Node]:
    inner, wrapping = take_apart(node.value, node.fqn)
    for name, part in inner.items():
        yield from _walk(node.child("dict", name, part), inside, look)
    yield node.child("dict", WRAPPING, wrapping)


def _enter(node: Node, inside: tuple[int, ...], look: Look) -> Iterator[Node]:
    inside = _deeper(node, inside)
    look(node)
    kind_of_shards = dtensor_class()
    for child in _children(node):
        # Most leaves are told by their type; to ask what else they might be takes longer than all the rest.
        kind = type(child.value)
        if kind in _LEAVES or kind is kind_of_shards:
            yield child
        elif kind is dict and set(map(type, child.value)) == _STRINGS:
            yield from _enter(child, inside, look)
        else:
            yield from _walk(child, inside, look)


def _deeper(node: Node, inside: tuple[int, ...]) -> tuple[int, ...]:
    if id(node.value) in inside:
        raise UnsupportedType(
            f"{node.where}: a {type(node.value).__qualname__} that contains itself cannot be stored"
        )
    if len(inside) == objects.MAX_DEPTH:
        raise UnsupportedType(
            f"{node.where}: more than {objects.MAX_DEPTH} containers in each other cannot be stored"
        )
    return (*inside, id(node.value))


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
    value, place, per_rank = node.value, node.place, node.per_rank
    if isinstance(value, Mapping):
        kind = _KINDS.get(type(value), "dict")
        known = place.inside(kind)
        for key, item in value.items():
            child = known.get(key) if type(key) is str or type(key) is int else None
            if child is None:
                if type(key) is not str:
                    _check_key(key, f"{node.where}, a key of it")
                child = place.child(kind, key)
            yield Node(child, item, per_rank, _put_item, node)
        place.forget_others(kind, value)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield Node(place.child("list", i), item, per_rank, _put_item, node)
        place.forget_others("list", range(len(value)))
    else:
        for i, item in enumerate(value):
            yield Node(place.child("tuple", i), item, per_rank, _put_element, node)
        place.forget_others("tuple", range(len(value)))


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


def _put_inside(node: Node, value: object) -> None:
    assert node.owner is not None
    node.owner.value.value = value


def _put_item(node: Node, value: object) -> None:
    assert node.owner is not None
    container = node.owner.value
    if not isinstance(container, (MutableMapping, list)):
        raise InvalidArgument(
            f"{node.owner.fqn}: a {type(container).__qualname__} cannot be changed; pass a dict"
        )
    container[node.path[-1].key] = value  # type: ignore[call-overload]  # in a list an int


def _put_element(node: Node, value: object) -> None:
    owner = node.owner
    assert owner is not None
    items = list(owner.value)
    items[node.path[-1].key] = value  # type: ignore[call-overload]  # the position in a tuple
    kind = type(owner.value)
    new = kind(*items) if hasattr(kind, "_fields") else kind(items)
    owner.replace(new)
    owner.value = new
