"""What the targets of a load ask a checkpoint for, and what they get."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

import dtruntime_torch.ops  # noqa: F401  # registers the copy that `fill_tensor` uses
from dtruntime_torch.checkpoint.format.records import ObjectEntry
from dtruntime_torch.checkpoint.loading.load_plan import SavedTensor
from dtruntime_torch.checkpoint.specs import Shape, TensorSpec
from dtruntime_torch.checkpoint.state.local_shard import Box, BoxFinder, is_dtensor, local_part, memory_of
from dtruntime_torch.checkpoint.state.nest import SavedLeaf, bytes_of, names_along, nest
from dtruntime_torch.checkpoint.state.wrappers import Wrapping, rewrapped, with_wrapper

STREAM_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a rank needs of a checkpoint, and how its state differs from it.

    Attributes:
        tensors: the shards to read.
        objects: fqns of the objects to decode.
        differences: one line for each shape, dtype or group in which they differ; the state cannot be filled then.
        missing: names of the state that the checkpoint does not have.
        unexpected: fqns of the checkpoint for which this rank's state has no place; another rank's may have.
    """

    tensors: tuple[TensorSpec, ...]
    objects: tuple[str, ...]
    differences: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


class Loaded(NamedTuple):
    """What was read.

    Attributes:
        tensors: fqn -> the wanted shard: on the host, contiguous, of the saved dtype; not to be kept.
        values: fqn -> object.
    """

    tensors: Mapping[str, torch.Tensor]
    values: Mapping[str, object]

    def value_of(self, leaf: SavedLeaf, place: Callable[[SavedTensor, torch.Tensor], torch.Tensor]) -> object:
        """The value of a leaf; what is to become of a tensor's data `place` says."""
        if isinstance(leaf, ObjectEntry):
            return self.values[leaf.fqn]
        if leaf.is_bytes:
            return bytes_of(self.tensors[leaf.fqn])
        return place(leaf, self.tensors[leaf.fqn])


def _nothing(loaded: Loaded) -> None:
    """What is left to do for a target that the checkpoint does not fit, or that cannot be asked."""


@dataclass(slots=True)
class Request:
    """What one target takes from a checkpoint.

    Attributes:
        tensors, objects, differences, missing, unexpected: as in `Wanted`.
        homes: gives the memory in which wanted shards end up, fqn -> tensor or DTensor, where `fill` takes one that was
            read straight into it. Asked at most once, if nothing differs.
        check: lets the target refuse what was read, before any target is filled.
        fill: puts what was read into the target.
    """

    tensors: list[TensorSpec] = field(default_factory=list)
    objects: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    homes: Callable[[], Mapping[str, torch.Tensor]] = dict
    check: Callable[[Loaded], None] = _nothing
    fill: Callable[[Loaded], None] = _nothing

    @property
    def is_filled(self) -> bool:
        """Whether the checkpoint has anything for the target."""
        return self.fill is not _nothing

    def want(self, leaf: SavedLeaf, box: Box | None = None) -> None:
        """Asks for a leaf; of a tensor for the given box, or for all of it."""
        if isinstance(leaf, ObjectEntry):
            self.objects.append(leaf.fqn)
            return
        self.tensors.append(
            TensorSpec(
                fqn=leaf.fqn,
                path=leaf.path,
                index=leaf.index,
                dtype=leaf.dtype,
                global_shape=leaf.global_shape,
                offsets=(0,) * len(leaf.global_shape) if box is None else box.offsets,
                shape=leaf.global_shape if box is None else box.shape,
                per_rank=leaf.per_rank,
                is_bytes=leaf.is_bytes,
            )
        )

    def include(self, other: Request) -> None:
        """Adds what another request asks for, and its lines; how that is filled is not taken over."""
        self.tensors += other.tensors
        self.objects += other.objects
        self.differences += other.differences
        self.missing += other.missing
        self.unexpected += other.unexpected


def homes_of(requests: Iterable[Request]) -> dict[str, torch.Tensor]:
    """The homes of all of them."""
    return {fqn: home for request in requests for fqn, home in request.homes().items()}


class Below(NamedTuple):
    """The leaves of a checkpoint that lie under one name.

    Attributes:
        depth: how many steps of their paths lead to that name.
        leaves: at least one, in the order of the state.
    """

    depth: int
    leaves: list[SavedLeaf]


def divide(leaves: Iterable[SavedLeaf], names: Collection[str]) -> tuple[dict[str, Below], list[SavedLeaf]]:
    """Finds for each leaf the longest of the names under which it lies.

    Returns:
        The leaves by name, and those that lie under none.
    """
    divided: dict[str, Below] = {}
    others = []
    for leaf in leaves:
        along = names_along(leaf.path)
        depth = next((depth for depth in range(len(along) - 1, 0, -1) if along[depth] in names), None)
        if depth is None or divided.setdefault(along[depth], Below(depth, [])).depth != depth:
            others.append(leaf)
        else:
            divided[along[depth]].leaves.append(leaf)
    return divided, others


def missing(fqn: str, per_rank: bool) -> Request:
    """The request of a target for which the checkpoint has nothing; what differs by rank may be missing."""
    return Request() if per_rank else Request(missing=[fqn])


def describe(shape: Shape, dtype: str) -> str:
    """A tensor's shape and dtype as differences show them: "(10, 4) float32"."""
    return f"{shape} {dtype}"


def fill_tensor(target: torch.Tensor, data: torch.Tensor) -> None:
    """Copies a shard into a tensor, or into the local shard of a DTensor, unless that is where it lies.

    On the host by our own kernel, which stores past the caches: 4 times as fast as `copy_`.
    """
    local = local_part(target)
    if data.numel() and memory_of(data) == memory_of(local):
        return
    with torch.no_grad():
        if _can_stream(local, data):
            torch.ops.dtruntime.copy_digest_(local, data, STREAM_CHUNK)
        else:
            local.copy_(data)


def _can_stream(target: torch.Tensor, data: torch.Tensor) -> bool:
    return (
        data.nbytes >= STREAM_CHUNK
        and target.device.type == data.device.type == "cpu"
        and (target.dtype, target.shape) == (data.dtype, data.shape)
        and target.is_contiguous()
        and data.is_contiguous()
        and type(target) in (torch.Tensor, torch.nn.Parameter)
    )


def needed_box(leaf: SavedLeaf, like: object, boxes: BoxFinder) -> Box | None:
    """The shard of a leaf that this rank needs if it becomes a DTensor like another; None for all of it."""
    return boxes.find(like, leaf.fqn) if is_dtensor(like) and _have_one_shape(leaf, like) else None


def _have_one_shape(leaf: SavedLeaf, tensor: torch.Tensor) -> bool:
    return isinstance(leaf, SavedTensor) and tuple(tensor.shape) == leaf.global_shape


def nested_copies(below: Below, loaded: Loaded, current: Mapping[str, object]) -> object:
    """Puts leaves into new containers and their tensors into new tensors; tied ones stay tied.

    Args:
        below: the leaves; they are named as their containers are at that depth.
        loaded: their values.
        current: fqn -> the tensor that lies there now, to whose device, and placements, a new one goes; and the
            `Wrapping` of the wrapper there, like which a new one is made.
    """
    copies: dict[str, torch.Tensor] = {}

    def copy(leaf: SavedTensor, data: torch.Tensor) -> torch.Tensor:
        first = leaf.alias or leaf.fqn
        if first not in copies:
            copies[first] = _copy_like(current.get(leaf.fqn), leaf, data)
        return copies[first]

    def value_of(leaf: SavedLeaf) -> object:
        value, now = loaded.value_of(leaf, copy), current.get(leaf.fqn)
        if isinstance(value, Wrapping) and isinstance(now, Wrapping):
            made, differs = with_wrapper(value, now.tensor, leaf.fqn)
            return value if differs else made
        return value

    return rewrapped(nest(below.leaves, below.depth, value_of))


def _copy_like(like: object, leaf: SavedTensor, data: torch.Tensor) -> torch.Tensor:
    if not isinstance(like, torch.Tensor):
        return data.clone()
    if not is_dtensor(like) or not _have_one_shape(leaf, like):
        return data.to(like.device, copy=True)
    new = torch.empty_like(like, dtype=data.dtype, requires_grad=False)
    fill_tensor(new, data)
    return new
