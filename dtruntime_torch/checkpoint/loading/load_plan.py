"""Who needs what: the boxes of stored shards that make up the shards that a rank wants. Pure.

Stored and wanted shards may be cut in any way. The boxes of one wanted shard are sorted along one dimension, so
that cutting n ranks' shards anew costs n log n where they are cut along it, and not n times n.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from dtruntime_torch.checkpoint.format.records import ObjectEntry, Part, TensorEntry
from dtruntime_torch.checkpoint.specs import LoadPlan, Path, ReadItem, Shape, TensorSpec
from dtruntime_torch.errors import CheckpointMismatch, CorruptCheckpoint


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """A tensor of a checkpoint.

    Attributes:
        fqn: its name in the state.
        dtype: torch's name of it.
        global_shape: the shape of the whole tensor.
        path: the way to it in the state.
        index: its position among the leaves of the state of the lowest rank that wrote some of it.
        is_bytes: the leaf is `bytes`, kept as uint8.
        alias: fqn of the tensor that it is tied to, or None.
        per_rank: it is this rank's own.
        shards: (rank, position among the tensors of that rank's part) of each stored shard.
    """

    fqn: str
    dtype: str
    global_shape: Shape
    path: Path
    index: int
    is_bytes: bool
    alias: str | None
    per_rank: bool
    shards: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class SavedState:
    """What a checkpoint holds for one rank: each leaf by its fqn, in the order of the parts."""

    tensors: dict[str, SavedTensor]
    objects: dict[str, ObjectEntry]


@dataclass(frozen=True, slots=True)
class _Box:
    offsets: Shape
    shape: Shape

    def intersect(self, other: _Box) -> _Box | None:
        starts = tuple(map(max, self.offsets, other.offsets))
        shape = tuple(
            min(start + size, other_start + other_size) - begin
            for start, size, other_start, other_size, begin in zip(
                self.offsets, self.shape, other.offsets, other.shape, starts, strict=True
            )
        )
        return _Box(starts, shape) if all(size > 0 for size in shape) else None

    def relative_to(self, origin: Shape) -> Shape:
        return tuple(offset - start for offset, start in zip(self.offsets, origin, strict=True))


def index_parts(parts: Mapping[int, Part], rank: int) -> SavedState:
    """Gathers what a checkpoint holds, by name.

    Args:
        parts: rank that saved -> its part.
        rank: the rank that loads: of what was marked per rank it gets that of the same rank, and nothing where
            no such rank saved.

    Raises:
        CorruptCheckpoint: two parts contradict each other.
    """
    shards: dict[str, list[tuple[int, int]]] = {}
    first: dict[str, TensorEntry] = {}
    objects: dict[str, ObjectEntry] = {}
    for writer in sorted(parts):
        for position, entry in enumerate(parts[writer].tensors):
            if entry.per_rank and writer != rank:
                continue
            known = first.setdefault(entry.fqn, entry)
            if _nature(known) != _nature(entry) or entry.fqn in objects:
                raise _contradiction(entry.fqn, parts)
            shards.setdefault(entry.fqn, []).append((writer, position))
        for value in parts[writer].objects:
            if value.per_rank and writer != rank:
                continue
            if value.fqn in objects or value.fqn in first:
                raise _contradiction(value.fqn, parts)
            objects[value.fqn] = value
    return SavedState({fqn: _saved(entry, shards[fqn]) for fqn, entry in first.items()}, objects)


def _nature(entry: TensorEntry) -> tuple[object, ...]:
    return entry.dtype, entry.global_shape, entry.is_bytes, entry.per_rank


def _saved(entry: TensorEntry, shards: Sequence[tuple[int, int]]) -> SavedTensor:
    return SavedTensor(
        fqn=entry.fqn,
        dtype=entry.dtype,
        global_shape=entry.global_shape,
        path=entry.path,
        index=entry.index,
        is_bytes=entry.is_bytes,
        alias=entry.alias,
        per_rank=entry.per_rank,
        shards=tuple(shards),
    )


def _contradiction(fqn: str, parts: Mapping[int, Part]) -> CorruptCheckpoint:
    holders = [rank for rank, part in sorted(parts.items()) if fqn in _names(part)]
    return CorruptCheckpoint(
        f"the part manifests of ranks {holders} contradict each other about {fqn!r}: load another step"
    )


def lies_in(fqn: str, keys: Iterable[str] | None) -> bool:
    """Whether a name is one of the keys, or lies below one; None are all.

    Example:
        >>> lies_in("model.head.bias", ["model.head"]), lies_in("model.header", ["model.head"])
        (True, False)
    """
    return keys is None or any(fqn == key or fqn.startswith(f"{key}.") for key in keys)


def select(saved: SavedState, keys: Collection[str] | None) -> SavedState:
    """What of a checkpoint lies in the keys; None are all."""
    if keys is None:
        return saved
    return SavedState(
        {fqn: tensor for fqn, tensor in saved.tensors.items() if lies_in(fqn, keys)},
        {fqn: value for fqn, value in saved.objects.items() if lies_in(fqn, keys)},
    )


def whole_specs(saved: SavedState) -> tuple[TensorSpec, ...]:
    """What to want in order to get every tensor of a checkpoint whole."""
    return tuple(
        TensorSpec(
            fqn=tensor.fqn,
            path=tensor.path,
            index=tensor.index,
            dtype=tensor.dtype,
            global_shape=tensor.global_shape,
            offsets=(0,) * len(tensor.global_shape),
            shape=tensor.global_shape,
            per_rank=tensor.per_rank,
            alias=tensor.alias,
            is_bytes=tensor.is_bytes,
        )
        for tensor in saved.tensors.values()
    )


def _names(part: Part) -> set[str]:
    return {entry.fqn for entry in part.tensors} | {entry.fqn for entry in part.objects}


def make_load_plan(saved: SavedState, parts: Mapping[int, Part], wanted: Sequence[TensorSpec]) -> LoadPlan:
    """Finds the boxes to read.

    Args:
        saved: what `index_parts` returned for these parts.
        parts: rank that saved -> its part.
        wanted: the shards to fill; only their boxes, dtypes and global shapes matter.

    Returns:
        For each wanted shard the boxes that cover it, each element exactly once. One without elements has none.

    Raises:
        CheckpointMismatch: a wanted tensor is not in the checkpoint, or is another in shape or dtype.
        CorruptCheckpoint: the stored shards of a tensor overlap or leave a gap.
    """
    return LoadPlan(tuple(item for spec in wanted for item in _cover(spec, _find(saved, spec), parts)))


def _find(saved: SavedState, spec: TensorSpec) -> SavedTensor:
    found = saved.tensors.get(spec.fqn)
    if found is None:
        raise CheckpointMismatch(f"the checkpoint holds no tensor {spec.fqn!r}")
    if (found.dtype, found.global_shape) != (spec.dtype, spec.global_shape):
        raise CheckpointMismatch(
            f"tensor {spec.fqn!r} is {found.dtype} of shape {list(found.global_shape)} in the checkpoint and "
            f"{spec.dtype} of shape {list(spec.global_shape)} in the state"
        )
    return found


def _cover(spec: TensorSpec, saved: SavedTensor, parts: Mapping[int, Part]) -> list[ReadItem]:
    target = _Box(spec.offsets, spec.shape)
    items, boxes = [], []
    for rank, position in saved.shards:
        entry = parts[rank].tensors[position]
        box = _Box(entry.offsets, entry.shape).intersect(target)
        if box is not None:
            source = box.relative_to(entry.offsets)
            items.append(ReadItem(rank, position, spec, source, box.relative_to(spec.offsets), box.shape))
            boxes.append(box)
    found, needed = sum(math.prod(box.shape) for box in boxes), math.prod(spec.shape)
    if found < needed or _overlap(boxes):
        fault = "leave a gap in" if found < needed else "overlap in"
        raise CorruptCheckpoint(
            f"tensor {spec.fqn!r}: the shards stored by ranks {[rank for rank, _ in saved.shards]} {fault} "
            f"the box at {list(spec.offsets)} of shape {list(spec.shape)}: load another step"
        )
    return items


def _overlap(boxes: Sequence[_Box]) -> bool:
    """Whether two of the boxes share an element."""
    if len(boxes) < 2 or not boxes[0].shape:
        return len(boxes) > 1
    axis = _most_cut(boxes)
    open_boxes: list[_Box] = []
    for box in sorted(boxes, key=lambda box: box.offsets[axis]):
        start = box.offsets[axis]
        open_boxes = [other for other in open_boxes if other.offsets[axis] + other.shape[axis] > start]
        if any(box.intersect(other) for other in open_boxes):
            return True
        open_boxes.append(box)
    return False


def _most_cut(boxes: Iterable[_Box]) -> int:
    starts = list(zip(*(box.offsets for box in boxes), strict=True))
    return max(range(len(starts)), key=lambda axis: len(set(starts[axis])))
