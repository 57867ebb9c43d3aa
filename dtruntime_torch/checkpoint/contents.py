"""What one rank needs of a committed checkpoint, read and checked; no other rank is asked.

Host memory is allocated per stored shard, after the shard's extents were checked against the true length of
their file, so that no manifest can make a reader allocate more than the files justify.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from dtruntime_torch.checkpoint import catalog, objects
from dtruntime_torch.checkpoint.chunk_reader import read_entries
from dtruntime_torch.checkpoint.load_plan import SavedState, index_parts, make_load_plan
from dtruntime_torch.checkpoint.manifest import Commit, Manifest, Part
from dtruntime_torch.checkpoint.specs import LoadPlan, ReadItem, Shape, TensorSpec
from dtruntime_torch.checkpoint.targets import Wanted
from dtruntime_torch.errors import CorruptCheckpoint, Damage, NotFound
from dtruntime_torch.storage import StorageBackend


@dataclass(frozen=True, slots=True)
class Contents:
    """What one rank read, every digest checked.

    Attributes:
        manifest: of the checkpoint.
        saved: all that it holds.
        wanted: what was asked for, and how it differs from what is held.
        tensors: fqn -> this rank's shard, on the host; empty where anything differs.
        values: fqn -> object; empty where anything differs.
    """

    manifest: Manifest
    saved: SavedState
    wanted: Wanted
    tensors: dict[str, torch.Tensor]
    values: dict[str, object]


async def read_contents(
    backend: StorageBackend, commit: Commit, rank: int, want: Callable[[SavedState], Wanted]
) -> Contents:
    """Reads what is wanted of a checkpoint, and nothing where names or shapes differ.

    Args:
        backend: where it lies.
        commit: names it.
        rank: whose leaves to take of those that differ by rank.
        want: chooses, given all that the checkpoint holds.

    Raises:
        CorruptCheckpoint: with every damaged range that was met.
    """
    manifest = await catalog.read_manifest(backend, commit)
    ranks = range(manifest.world_size)
    read = await asyncio.gather(*(catalog.read_part(backend, manifest, r) for r in ranks))
    parts = dict(zip(ranks, read, strict=True))
    saved = index_parts(parts, rank)
    wanted = want(saved)
    if wanted.differences:
        return Contents(manifest, saved, wanted, {}, {})
    plan = make_load_plan(saved, parts, wanted.tensors)
    shards = await _read_shards(backend, manifest, parts, plan)
    boxes: dict[str, list[ReadItem]] = {spec.fqn: [] for spec in wanted.tensors}
    for item in plan.items:
        boxes[item.wanted.fqn].append(item)
    tensors = {spec.fqn: _assemble(spec, boxes[spec.fqn], parts, shards) for spec in wanted.tensors}
    values = {fqn: objects.decode(saved.objects[fqn].value, where=fqn) for fqn in wanted.objects}
    return Contents(manifest, saved, wanted, tensors, values)


async def _read_shards(
    backend: StorageBackend, manifest: Manifest, parts: Mapping[int, Part], plan: LoadPlan
) -> dict[tuple[int, int], torch.Tensor]:
    """Reads each stored shard that the plan needs, as bytes: (rank of the part, entry) -> uint8 tensor."""
    shards: dict[tuple[int, int], torch.Tensor] = {}
    damage: list[Damage] = []
    for rank, part in parts.items():
        needed = sorted({item.entry for item in plan.items if item.rank == rank})
        if not needed:
            continue
        if not await _files_are_whole(backend, manifest.name, part):
            damage += await read_entries(backend, manifest.name, part, dict.fromkeys(needed))
            continue
        buffers = {i: torch.empty(part.tensors[i].nbytes, dtype=torch.uint8) for i in needed}
        views = {i: buffer.numpy().data for i, buffer in buffers.items()}
        damage += await read_entries(backend, manifest.name, part, views)
        shards.update({(rank, i): buffer for i, buffer in buffers.items()})
    if damage:
        raise CorruptCheckpoint(
            f"step {manifest.step} of {manifest.name} is damaged: {'; '.join(map(str, damage))}", damage
        )
    return shards


async def _files_are_whole(backend: StorageBackend, name: str, part: Part) -> bool:
    """Whether the files are as long as the part says, so that room for its tensors may be made."""
    try:
        sizes = [await backend.size(f"{name}/{file.path}") for file in part.files]
    except NotFound:
        return False
    return sizes == [file.length for file in part.files]


def _assemble(
    spec: TensorSpec,
    items: Sequence[ReadItem],
    parts: Mapping[int, Part],
    shards: Mapping[tuple[int, int], torch.Tensor],
) -> torch.Tensor:
    """Puts together a wanted shard; one that is stored as it is wanted is not copied."""
    dtype = getattr(torch, spec.dtype)
    if len(items) == 1 and parts[items[0].rank].tensors[items[0].entry].shape == spec.shape:
        return shards[items[0].rank, items[0].entry].view(dtype).view(spec.shape)
    tensor = torch.empty(spec.shape, dtype=dtype)
    for item in items:
        stored = shards[item.rank, item.entry].view(dtype).view(parts[item.rank].tensors[item.entry].shape)
        tensor[_box(item.target, item.shape)] = stored[_box(item.source, item.shape)]
    return tensor


def _box(offsets: Shape, shape: Shape) -> tuple[slice, ...]:
    return tuple(slice(start, start + size) for start, size in zip(offsets, shape, strict=True))
