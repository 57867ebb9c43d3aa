"""The frozen records that the rooms of `checkpoint` hand to each other. No torch, no I/O.

A *leaf* of a state is a tensor (or bytes) or an object; its `fqn` is its path joined by dots, as
`torch.distributed.checkpoint` names it. A *box* is (offsets, shape): what of the global tensor it is about.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from dtruntime_torch.checkpoint.dtypes import itemsize

Shape = tuple[int, ...]
Kind = Literal["dict", "ordered_dict", "list", "tuple"]

# Signature of a structure -> the ranks that have it, ascending; every rank is in one of them.
Members = Mapping[str, tuple[int, ...]]

DIGEST_BYTES = 16
MAX_DIMENSIONS = 64


def digest_length(nbytes: int, chunk_bytes: int) -> int:
    """Bytes of the digests of all chunks of a tensor.

    Example:
        >>> digest_length(nbytes=4097, chunk_bytes=4096)
        32
    """
    return DIGEST_BYTES * -(-nbytes // chunk_bytes)


@dataclass(frozen=True, slots=True)
class PathKey:
    """One step from a container to what it holds.

    Attributes:
        container: what is stepped into.
        key: a dict's key (any type that `objects` encodes), or the position in a list or tuple.
    """

    container: Kind
    key: object


Path = tuple[PathKey, ...]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor as one rank holds it.

    Attributes:
        fqn: its name in the state, unique.
        path: the way to it.
        index: its position among all leaves of the state, in the order of the state.
        dtype: torch's name of it, without "torch.": "bfloat16".
        global_shape: the shape of the whole tensor.
        offsets: where this rank's shard starts; zeros for a plain tensor.
        shape: the shape of this rank's shard.
        layout: how it is sharded (mesh and placements), alike on all ranks of the mesh; "" for a plain tensor.
        holders: the ranks that hold this very shard, ascending, where the mesh tells; None for a plain tensor.
        first_holders: of a DTensor the ranks that hold the shard with its first element, ascending.
        spread: an optimizer owns it, so that its replicas are equal and any holder may write it.
        per_rank: it is meant to differ by rank, and each rank writes its own.
        alias: fqn of the tensor that it is tied to, or None.
        is_bytes: the leaf is `bytes`, kept as uint8.
        part_of: fqn of the stateful object that it is of, which takes whatever lies under its name; "" for a module's,
            an optimizer's, and a leaf of plain containers.
    """

    fqn: str
    path: Path
    index: int
    dtype: str
    global_shape: Shape
    offsets: Shape
    shape: Shape
    layout: str = ""
    holders: tuple[int, ...] | None = None
    first_holders: tuple[int, ...] = ()
    spread: bool = False
    per_rank: bool = False
    alias: str | None = None
    is_bytes: bool = False
    part_of: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's shard."""
        return math.prod(self.shape) * itemsize(self.dtype)


@dataclass(frozen=True, slots=True)
class ObjectSpec:
    """A leaf that is no tensor, as one rank holds it; its value is not part of the structure.

    Attributes:
        fqn: its name in the state.
        path: the way to it through the containers of the state.
        index: its position among all leaves of the state.
        per_rank: it is meant to differ by rank, and each rank writes its own.
        is_empty: it is a dict without anything in it, as the state of an optimizer before its first step.
        part_of: as of a `TensorSpec`.
    """

    fqn: str
    path: Path
    index: int
    per_rank: bool = False
    is_empty: bool = False
    part_of: str = ""


@dataclass(frozen=True, slots=True)
class WriteItem:
    """A tensor that this rank writes, under the name that it has in the safetensors file."""

    spec: TensorSpec
    name: str


@dataclass(frozen=True, slots=True)
class SavePlan:
    """What one rank writes.

    Attributes:
        rank: this rank.
        world_size: the number of ranks that save.
        tensors: in the order of the state.
        objects: in the order of the state.
        completed_by: other ranks, ascending. Together with this one they write all that this rank holds, and of every
            other tensor and object that is not `per_rank` at least something.
    """

    rank: int
    world_size: int
    tensors: tuple[WriteItem, ...]
    objects: tuple[ObjectSpec, ...]
    completed_by: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Extent:
    """A range of bytes of one data file.

    Attributes:
        file: position in the part's list of files.
        offset: first byte in that file.
        length: number of bytes.
    """

    file: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class ReadItem:
    """A stored shard of which this rank needs something.

    Attributes:
        rank: whose part describes it.
        entry: its position in that part's list of tensors.
        wanted: the spec that it serves.
        source: offsets of the needed box within the stored shard.
        target: offsets of the needed box within the wanted shard.
        shape: the shape of the needed box.
    """

    rank: int
    entry: int
    wanted: TensorSpec
    source: Shape
    target: Shape
    shape: Shape


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """What one rank reads: for each wanted tensor the boxes that cover it exactly once."""

    items: tuple[ReadItem, ...]


class FlatSpecs(NamedTuple):
    """The structure of a state: its leaves, tensors and objects, each in the order of the state."""

    tensors: tuple[TensorSpec, ...]
    objects: tuple[ObjectSpec, ...]
