"""Whole checkpoints on a storage, written through the real plan, layout and shard file, without torch."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from dtruntime_torch.checkpoint.format.records import Commit, Manifest, PartRef
from dtruntime_torch.checkpoint.manifest import decode_commit, encode_commit, encode_manifest
from dtruntime_torch.checkpoint.names import Attempt, CommitKey, commit_path, manifest_path
from dtruntime_torch.checkpoint.objects import Json
from dtruntime_torch.checkpoint.saving.layout import Layout, make_layout
from dtruntime_torch.checkpoint.saving.shard_file import write_shard
from dtruntime_torch.checkpoint.specs import SavePlan, TensorSpec
from dtruntime_torch.storage import run_sync
from dtruntime_torch.storage.backend import StorageBackend
from tests.checkpoint.plan_builders import flat, obj, plans_of, tensor

CHUNK = 16

Arrays = Mapping[str, NDArray[np.generic]]


@dataclass(frozen=True)
class Image:
    """What a rank has in its arena when it has staged."""

    plan: SavePlan
    layout: Layout
    data: bytes
    digests: bytes
    values: dict[str, Json]

    def place(self, fqn: str) -> tuple[int, int]:
        """The range of a tensor in the file."""
        (slot,) = [slot for slot in self.layout.slots if slot.item.spec.fqn == fqn]
        return slot.offset, slot.offset + slot.nbytes


def spec_of(fqn: str, array: NDArray[np.generic]) -> TensorSpec:
    """A plain tensor like that array."""
    return tensor(fqn, *array.shape, dtype=str(array.dtype))


def stage(plan: SavePlan, arrays: Arrays, values: Mapping[str, Json] | None = None) -> Image:
    """Makes an image by NumPy and xxhash."""
    layout = make_layout(plan)
    data = [arrays[slot.item.spec.fqn].tobytes() for slot in layout.slots]
    digests = b"".join(
        xxhash.xxh3_128_digest(one[at : at + CHUNK]) for one in data for at in range(0, len(one), CHUNK)
    )
    kept = {spec.fqn: (values or {})[spec.fqn] for spec in plan.objects}
    return Image(plan, layout, layout.header + b"".join(data), digests, kept)


def write(backend: StorageBackend, name: str, attempt: Attempt, image: Image) -> PartRef:
    """Writes what a rank staged."""
    return run_sync(
        write_shard(
            backend,
            name,
            attempt,
            image.plan,
            image.layout,
            memoryview(image.data),
            image.digests,
            CHUNK,
            image.values,
        )
    ).ref


def arrays_for(world_size: int, step: int = 0) -> list[dict[str, NDArray[np.generic]]]:
    """What each rank holds: one tensor that only it has, one that all have and the lowest writes."""
    shared = np.arange(10, dtype=np.int16) + step
    return [
        {f"layer{rank}": np.arange(25, dtype=np.float32) + rank, "shared": shared}
        for rank in range(world_size)
    ]


@dataclass(frozen=True)
class Saved:
    """A checkpoint as it was committed."""

    manifest: Manifest
    sha256: str
    images: list[Image]

    @property
    def key(self) -> CommitKey:
        return self.manifest.key

    def data_path(self, rank: int) -> str:
        return self.part_path(rank).removesuffix(".json") + ".safetensors"

    def part_path(self, rank: int) -> str:
        return f"{self.manifest.name}/{self.manifest.attempt}/{self.manifest.parts[rank].path}"

    @property
    def manifest_path(self) -> str:
        return f"{self.manifest.name}/{self.manifest.attempt}/manifest.json"

    @property
    def commit_path(self) -> str:
        return commit_path(self.manifest.name, self.key)


def save(
    backend: StorageBackend,
    name: str = "model",
    step: int = 100,
    generation: int = 1,
    held: Sequence[Arrays] | None = None,
) -> Saved:
    """Commits a checkpoint; two ranks save it unless `held` says what each of how many ranks holds."""
    held = arrays_for(2, step) if held is None else held
    attempt = Attempt(generation, step, 1)
    states = [flat(*(spec_of(fqn, array) for fqn, array in arrays.items()), obj("epoch")) for arrays in held]
    images = [stage(plan, arrays, {"epoch": 3}) for plan, arrays in zip(plans_of(states), held, strict=True)]
    parts = tuple(write(backend, name, attempt, image) for image in images)
    manifest = Manifest(
        name=name,
        generation=generation,
        step=step,
        attempt=attempt.path,
        run_id="0123456789abcdef" * 2,
        parent=None,
        world_size=len(held),
        full=True,
        uses=(attempt.path,),
        requires=(),
        created="2026-01-02T03:04:05+00:00",
        versions={"dtruntime_torch": "0.1.0"},
        metadata=None,
        nbytes=sum(slot.nbytes for image in images for slot in image.layout.slots),
        written=sum(part.data_length for part in parts),
        parts=parts,
    )
    return commit(backend, manifest, images)


def commit(backend: StorageBackend, manifest: Manifest, images: list[Image]) -> Saved:
    """Writes the manifest and the commit that names it."""
    encoded = encode_manifest(manifest)
    saved = Saved(manifest, hashlib.sha256(encoded).hexdigest(), images)
    record = Commit(manifest.name, *manifest.key, manifest.attempt, saved.sha256)
    run_sync(backend.write(saved.manifest_path, encoded))
    run_sync(backend.write(saved.commit_path, encode_commit(record)))
    return saved


def void(backend: StorageBackend, saved: Saved) -> None:
    """Gives a checkpoint up, as a sweep or a prune does."""
    record = Commit(saved.manifest.name, *saved.key, "", "", void=True)
    run_sync(backend.write(saved.commit_path, encode_commit(record)))


def make_newer(backend: StorageBackend, name: str, key: CommitKey) -> None:
    """Makes a checkpoint a sound one of a later version, which uses a feature that this one does not know."""
    path = commit_path(name, key)
    record = decode_commit(bytes(run_sync(backend.read(path))), path)
    manifest = manifest_path(name, record.attempt)
    data = bytes(run_sync(backend.read(manifest))).replace(b'"requires":[]', b'"requires":["chains"]')
    newer = dataclasses.replace(record, manifest_sha256=hashlib.sha256(data).hexdigest())
    run_sync(backend.write(manifest, data))
    run_sync(backend.write(path, encode_commit(newer)))


def flip(backend: StorageBackend, path: str, at: int) -> None:
    """Flips one bit of a file; `at` may count from its end."""
    data = bytearray(run_sync(backend.read(path)))
    data[at] ^= 1
    run_sync(backend.write(path, data))


def grow(backend: StorageBackend, saved: Saved, rank: int, by: int) -> None:
    """Adds bytes to the end of a data file, or takes some away where `by` is negative."""
    path = saved.data_path(rank)
    data = bytes(run_sync(backend.read(path)))
    run_sync(backend.write(path, data + bytes(by) if by > 0 else data[:by]))
