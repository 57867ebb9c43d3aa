"""Who writes what. Pure: each rank computes its own share, and the shares of all ranks fit together.

A rank knows its own structure and one structure of each group of ranks that hold alike. Of a tensor that many
ranks hold exactly one writes each element; which one follows from what all of them know, so nobody is asked.
The trade-off: spreading is by bytes at the time of planning, largest first onto the rank with the least, which
is within one tensor of even, and not by how fast a rank's disk is.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from dtruntime_torch.checkpoint.saving.places import Ranks, check_places, shorten
from dtruntime_torch.checkpoint.specs import FlatSpecs, ObjectSpec, SavePlan, TensorSpec, WriteItem
from dtruntime_torch.errors import InvalidArgument


class _Holding(NamedTuple):
    """A leaf as the lowest rank that holds it knows it, and all ranks that hold it so."""

    spec: TensorSpec | ObjectSpec
    ranks: Ranks


def make_save_plan(
    rank: int,
    world_size: int,
    own: FlatSpecs,
    groups: Mapping[str, FlatSpecs],
    members: Mapping[str, Ranks],
) -> SavePlan:
    """Computes what `rank` writes.

    A tensor or object marked `per_rank` is written by every rank that holds it. A shard of a DTensor is written
    by one of its holders, and a plain tensor of several elements that an optimizer owns (`spread`) by
    one of the ranks that hold it, both balanced by bytes; everything else by the lowest rank that holds it.

    Args:
        rank: this rank.
        world_size: the number of ranks that save.
        own: the structure that this rank holds.
        groups: signature -> the structure of one rank of that group; alike on all its ranks but for the
            offsets and holders of DTensors.
        members: signature -> the ranks of that group, ascending. Every rank is in exactly one group.

    Returns:
        The plan of `rank`. Over all ranks each element of each tensor, and each object, is written exactly once.

    Raises:
        InvalidArgument: ranks hold different things under one name, or a name cannot be stored.

    Example:
        >>> spec = TensorSpec("w", (), 0, "float32", (4,), (0,), (4,), spread=True)
        >>> alike = FlatSpecs((spec,), ())
        >>> [len(make_save_plan(r, 2, alike, {"a": alike}, {"a": (0, 1)}).tensors) for r in (0, 1)]
        [1, 0]
    """
    check_places(groups, members)
    holdings = _holdings(groups, members)
    writers = {
        **_assign_shards(own.tensors, holdings),
        **_assign_spread(holdings),
        **_assign_lowest(holdings),
        **{spec.fqn: rank for of_kind in own for spec in of_kind if spec.per_rank},
    }
    # Of a DTensor whose shard is empty here, or that others hold otherwise, no writer is known.
    items = tuple(
        WriteItem(_to_write(spec), _stored_name(spec, rank))
        for spec in own.tensors
        if writers.get(spec.fqn) == rank
    )
    _check_items(items)
    objects = tuple(spec for spec in own.objects if writers[spec.fqn] == rank)
    others = _completing(own, writers, groups, holdings)
    completed_by = others if others is not None else set(range(world_size))
    return SavePlan(rank, world_size, items, objects, tuple(sorted(completed_by - {rank})))


def _holdings(groups: Mapping[str, FlatSpecs], members: Mapping[str, Ranks]) -> dict[str, _Holding]:
    """Who holds each fqn, alike with the lowest rank that does: ranks that hold it otherwise write nothing."""
    by_fqn: dict[str, list[tuple[str, TensorSpec | ObjectSpec]]] = defaultdict(list)
    for signature in sorted(groups, key=lambda signature: members[signature]):
        leaves: list[TensorSpec | ObjectSpec] = [*groups[signature].tensors, *groups[signature].objects]
        for spec in leaves:
            by_fqn[spec.fqn].append((signature, spec))
    together: dict[tuple[str, ...], Ranks] = {}
    holdings = {}
    for fqn, held in by_fqn.items():
        first = held[0][1]
        if any(_kind(spec) != _kind(first) for _, spec in held):
            raise _differing(fqn, held, members)
        alike = tuple(signature for signature, spec in held if _likeness(spec) == _likeness(first))
        if alike not in together:
            together[alike] = tuple(sorted(rank for signature in alike for rank in members[signature]))
        holdings[fqn] = _Holding(first, together[alike])
    return holdings


def _kind(spec: TensorSpec | ObjectSpec) -> tuple[object, ...]:
    """What must be equal on all ranks that hold a name. The content of bytes and objects need not be."""
    if isinstance(spec, ObjectSpec):
        return "object", spec.per_rank
    if spec.per_rank or spec.is_bytes:
        return "tensor", spec.per_rank, spec.is_bytes
    return "tensor", spec.dtype, spec.global_shape


def _likeness(spec: TensorSpec | ObjectSpec) -> tuple[object, ...]:
    """What must be equal on ranks that share the writing: what one's optimizer owns may differ on another."""
    if isinstance(spec, ObjectSpec):
        return ()
    return spec.layout, spec.holders is None and spec.spread


def _assign_shards(held: Iterable[TensorSpec], holdings: Mapping[str, _Holding]) -> dict[str, int]:
    """Who writes the shards of DTensors that one rank holds: the holders of one shard hold, and so balance, the same."""
    alike: dict[tuple[Ranks, Ranks], list[TensorSpec]] = defaultdict(list)
    for spec in held:
        first, ranks = holdings[spec.fqn]
        if spec.holders and _is_split(spec) and _likeness(spec) == _likeness(first) and spec.nbytes:
            alike[spec.holders, ranks].append(spec)
    by_holders: dict[Ranks, list[TensorSpec]] = defaultdict(list)
    for (holders, ranks), specs in alike.items():
        by_holders[tuple(sorted(set(holders).intersection(ranks)))] += specs
    writers: dict[str, int] = {}
    for holders, specs in by_holders.items():
        writers |= _balance(specs, dict.fromkeys(holders, 0))
    return writers


def _assign_spread(holdings: Mapping[str, _Holding]) -> dict[str, int]:
    """Who writes the plain tensors of optimizers; every rank computes the shares of all."""
    by_ranks: dict[Ranks, list[TensorSpec]] = defaultdict(list)
    for spec, ranks in holdings.values():
        if isinstance(spec, TensorSpec) and _is_split(spec) and spec.holders is None:
            by_ranks[ranks].append(spec)
    loads: Counter[int] = Counter()
    writers: dict[str, int] = {}
    for ranks in sorted(by_ranks, key=lambda ranks: (len(ranks), ranks)):
        shares = {holder: loads[holder] for holder in ranks}
        writers |= _balance(by_ranks[ranks], shares)
        loads.update({holder: shares[holder] - loads[holder] for holder in ranks})
    return writers


def _assign_lowest(holdings: Mapping[str, _Holding]) -> dict[str, int]:
    """Who writes what is neither shared out nor its holders' own: the lowest rank that holds it."""
    return {
        fqn: ranks[0] for fqn, (spec, ranks) in holdings.items() if not spec.per_rank and not _is_split(spec)
    }


def _completing(
    own: FlatSpecs,
    writers: Mapping[str, int],
    groups: Mapping[str, FlatSpecs],
    holdings: Mapping[str, _Holding],
) -> set[int] | None:
    """The ranks that write what this one holds, and some of everything else; None if that cannot be known here."""
    needed = set(writers.values())
    if any(spec.nbytes and spec.fqn not in writers for spec in own.tensors):
        return None  # cut otherwise than by the ranks that write it
    left = {fqn for fqn, (spec, _) in holdings.items() if fqn not in writers and not spec.per_rank}
    for specs in (own, *groups.values()):
        if left:
            shown = _assign_shards(specs.tensors, holdings)
            for spec in specs.tensors:
                # Some of those who hold the first shard write it: it has an element.
                some = [shown[spec.fqn]] if spec.fqn in shown else spec.first_holders
                if spec.fqn in left and some and set(some) <= set(holdings[spec.fqn].ranks):
                    needed.update(some)
                    left.remove(spec.fqn)
    return None if left else needed


def _is_split(spec: TensorSpec | ObjectSpec) -> bool:
    """Whether several ranks share the work of writing it. One without elements is whole on each of them.

    To share out single elements, as the steps that Adam counts for each parameter, would spare nothing, and every rank
    that loads would have to look for them in the parts of all.
    """
    if isinstance(spec, ObjectSpec) or spec.per_rank or not math.prod(spec.global_shape):
        return False
    return spec.holders is not None or (spec.spread and math.prod(spec.global_shape) > 1)


def _balance(specs: Iterable[TensorSpec], loads: dict[int, int]) -> dict[str, int]:
    """Who writes which fqn when the largest goes first to who has least. Adds to `loads`, in bytes."""
    least = [(load, holder) for holder, load in loads.items()]
    heapq.heapify(least)
    writers = {}
    for spec in sorted(specs, key=lambda spec: (-spec.nbytes, spec.fqn)):
        load, holder = least[0]
        heapq.heapreplace(least, (load + spec.nbytes, holder))
        loads[holder] = load + spec.nbytes
        writers[spec.fqn] = holder
    return writers


def _to_write(spec: TensorSpec) -> TensorSpec:
    """The box to store: of a DTensor without elements the one rank that writes it stores all of its shape."""
    if math.prod(spec.global_shape) or spec.per_rank:
        return spec
    return replace(spec, offsets=(0,) * len(spec.global_shape), shape=spec.global_shape)


def _stored_name(spec: TensorSpec, rank: int) -> str:
    return f"{spec.fqn}.rank-{rank:05d}" if spec.per_rank else spec.fqn


def _check_items(items: Sequence[WriteItem]) -> None:
    counts = Counter(item.name for item in items)
    for item in items:
        name = item.name
        if counts[name] > 1:
            raise InvalidArgument(f"two tensors would be stored as {name!r}; rename one of them in the state")
        if item.spec.per_rank and item.spec.shape != item.spec.global_shape:
            raise InvalidArgument(
                f"{item.spec.fqn!r} is a sharded DTensor in dt.PerRank: take it out of it, it differs by rank as it is"
            )
        if name == "__metadata__":
            raise InvalidArgument("safetensors keeps the name '__metadata__' for itself; rename that tensor")
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise InvalidArgument(f"tensor {name!r}: its name is not valid Unicode; rename it") from error


def _differing(
    fqn: str, held: Sequence[tuple[str, TensorSpec | ObjectSpec]], members: Mapping[str, Ranks]
) -> InvalidArgument:
    found: dict[str, list[int]] = defaultdict(list)
    for signature, spec in held:
        found[_describe(spec)].extend(members[signature])
    lines = "; ".join(f"{what} on ranks {shorten(sorted(ranks))}" for what, ranks in found.items())
    return InvalidArgument(
        f"{fqn!r} differs between ranks: {lines}. Wrap it in dt.PerRank on all ranks if each is to keep its own, "
        f"or give it different names"
    )


def _describe(spec: TensorSpec | ObjectSpec) -> str:
    own = "dt.PerRank " if spec.per_rank else ""
    if isinstance(spec, ObjectSpec):
        return f"{own}no tensor"
    if spec.is_bytes:
        return f"{own}bytes of length {spec.global_shape[0]}"
    return f"{own}{spec.dtype} tensor of shape {list(spec.global_shape)}"
