"""Whether the structures of all ranks fit into one state: what is in one place is of one kind, wherever it is. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import NamedTuple

from dtruntime_torch.checkpoint.specs import FlatSpecs, ObjectSpec, TensorSpec
from dtruntime_torch.errors import InvalidArgument

Ranks = tuple[int, ...]


class _Held(NamedTuple):
    """A leaf, and the ranks of the group that holds it."""

    spec: TensorSpec | ObjectSpec
    ranks: Ranks


def check_places(groups: Mapping[str, FlatSpecs], members: Mapping[str, Ranks]) -> None:
    """Refuses structures that could be saved, and of which no load could make one state.

    Args:
        groups: signature -> the structure of one rank of that group.
        members: signature -> the ranks of that group, ascending.

    Raises:
        InvalidArgument: a place is a value on some ranks and a container on others; or a stateful object has other names on
            other ranks.
    """
    if len(groups) > 1:
        leaves = list(_leaves(groups, members))
        _check_nesting(leaves)
        _check_statefuls(leaves)


def _leaves(groups: Mapping[str, FlatSpecs], members: Mapping[str, Ranks]) -> Iterator[_Held]:
    for signature, specs in groups.items():
        for of_kind in specs:
            yield from (_Held(spec, members[signature]) for spec in of_kind)


def _check_nesting(leaves: Sequence[_Held]) -> None:
    """But for an empty dict, which gives way where others hold something in it."""
    at: dict[tuple[Hashable, ...], list[_Held]] = defaultdict(list)
    for held in leaves:
        way = tuple(step.key for step in held.spec.path)
        # Groups of an optimizer are told apart by names, whatever their position.
        if held.spec.fqn == ".".join(map(str, way)):
            at[way].append(held)
    solid = {way: [held for held in here if not _is_empty(held.spec)] for way, here in at.items()}
    for way, inside in at.items():
        for depth in range(len(way)):
            outside = solid.get(way[:depth], [])
            # Of what differs by rank each reads its own.
            if outside and not all(held.spec.per_rank for held in (*outside, *inside)):
                raise InvalidArgument(
                    f"{_where(outside)} is a value by itself, and has {_where(inside)} in it. Wrap it in dt.PerRank on "
                    f"all ranks if each is to keep its own, or give it different names"
                )


def _check_statefuls(leaves: Sequence[_Held]) -> None:
    """It would be given the names of all, and what another rank holds of those goes stale with it."""
    names: dict[str, dict[Ranks, set[str]]] = defaultdict(lambda: defaultdict(set))
    for spec, ranks in leaves:
        if spec.part_of and not spec.per_rank:
            names[spec.part_of][ranks].add(spec.fqn)
    for part_of, held in names.items():
        first, *others = sorted(held)
        for other in others:
            if held[other] != held[first]:
                example = min(held[first] ^ held[other])
                raise InvalidArgument(
                    f"what the state_dict of {part_of!r} holds differs between ranks {shorten(first)} and "
                    f"{shorten(other)}, by {example!r}: wrap it in dt.PerRank on all ranks, or give it another name "
                    f"in the state on each"
                )


def _is_empty(spec: TensorSpec | ObjectSpec) -> bool:
    return isinstance(spec, ObjectSpec) and spec.is_empty


def _where(held: Sequence[_Held]) -> str:
    ranks = sorted(rank for one in held for rank in one.ranks)
    return f"{held[0].spec.fqn!r} on ranks {shorten(ranks)}"


def shorten(ranks: Sequence[int]) -> str:
    """Names ranks in an error, not all of a thousand."""
    return str(list(ranks)) if len(ranks) <= 8 else f"[{', '.join(map(str, ranks[:8]))}, ...]"
