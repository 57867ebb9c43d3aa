"""A checkpoint without storage: what ranks flattened, put together, and what a load would be handed of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dtruntime_torch.checkpoint import objects
from dtruntime_torch.checkpoint.flatten import FlatState, flatten_state
from dtruntime_torch.checkpoint.format.records import ObjectEntry
from dtruntime_torch.checkpoint.loading.load_plan import SavedState, SavedTensor
from dtruntime_torch.checkpoint.loading.targets import Wanted, bind_targets, build_state
from dtruntime_torch.checkpoint.specs import Shape


@dataclass
class MemoryCheckpoint:
    """Everything that was saved, whole."""

    saved: SavedState
    tensors: dict[str, torch.Tensor]
    values: dict[str, object]

    def read(self, wanted: Wanted) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
        """The wanted shards, as freshly read memory that may be freed."""
        tensors = {s.fqn: self.tensors[s.fqn][box(s.offsets, s.shape)].clone() for s in wanted.tensors}
        return tensors, {fqn: self.values[fqn] for fqn in wanted.objects}


def box(offsets: Shape, shape: Shape) -> tuple[slice, ...]:
    return tuple(slice(start, start + size) for start, size in zip(offsets, shape, strict=True))


def checkpoint_of(*flats: FlatState, rank: int = 0) -> MemoryCheckpoint:
    """What `rank` finds if the ranks saved these, the lowest rank that holds a leaf being asked first."""
    saved = SavedState({}, {})
    checkpoint = MemoryCheckpoint(saved, {}, {})
    for writer, flat in enumerate(flats):
        for spec in flat.specs.tensors:
            if spec.per_rank and writer != rank:
                continue
            saved.tensors.setdefault(
                spec.fqn,
                SavedTensor(
                    fqn=spec.fqn,
                    dtype=spec.dtype,
                    global_shape=spec.global_shape,
                    path=spec.path,
                    index=spec.index,
                    is_bytes=spec.is_bytes,
                    alias=spec.alias,
                    per_rank=spec.per_rank,
                    shards=(),
                ),
            )
            data = flat.tensors[spec.fqn]
            first = spec.fqn not in checkpoint.tensors
            whole = checkpoint.tensors.setdefault(spec.fqn, torch.empty(spec.global_shape, dtype=data.dtype))
            if first or spec.layout:
                whole[box(spec.offsets, spec.shape)] = data
        for leaf in flat.specs.objects:
            if (leaf.per_rank and writer != rank) or leaf.fqn in saved.objects:
                continue
            encoded = flat.values[leaf.fqn]
            saved.objects[leaf.fqn] = ObjectEntry(leaf.fqn, leaf.path, leaf.index, leaf.per_rank, encoded)
            checkpoint.values[leaf.fqn] = objects.decode(encoded, where=leaf.fqn)
    return checkpoint


def save(state: object) -> MemoryCheckpoint:
    """What a single rank saves of a state."""
    return checkpoint_of(flatten_state(state, rank=0))


def differences(checkpoint: MemoryCheckpoint, state: object) -> list[str]:
    """All lines in which a state differs from a checkpoint, as a load on one rank reports them."""
    wanted = bind_targets(state).want(checkpoint.saved)
    return [
        *wanted.differences,
        *(f"{fqn}: in the state, not in the checkpoint" for fqn in wanted.missing),
        *(f"{fqn}: in the checkpoint, not in the state" for fqn in wanted.unexpected),
    ]


def load(checkpoint: MemoryCheckpoint, state: object) -> None:
    """Fills a state, which must fit, and clobbers the memory from which it was filled."""
    targets = bind_targets(state)
    wanted = targets.want(checkpoint.saved)
    assert not wanted.differences
    assert not wanted.missing
    assert not wanted.unexpected
    tensors, values = checkpoint.read(wanted)
    targets.apply(tensors, values)
    for tensor in tensors.values():
        tensor.view(torch.uint8).fill_(0xA5) if tensor.dim() else tensor.fill_(1)


def load_fresh(checkpoint: MemoryCheckpoint) -> object:
    """The state that was saved, in new containers."""
    return build_state(checkpoint.saved, checkpoint.tensors, checkpoint.values)


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors agree in dtype, shape and every bit."""
    as_bytes = [t.detach().contiguous().view(-1).view(torch.uint8) for t in (left, right)]
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(*as_bytes)


def exact(value: object) -> object:
    """A form in which 1, 1.0 and True differ, nan equals nan, and tensors compare by their bits."""
    if isinstance(value, torch.Tensor):
        raw = value.detach().contiguous().view(-1).view(torch.uint8).tolist()
        return "tensor", str(value.dtype), tuple(value.shape), raw
    if isinstance(value, dict):
        return "dict", [(exact(key), exact(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return type(value).__name__, [exact(item) for item in value]
    return type(value).__name__, value.hex() if isinstance(value, float) else value
