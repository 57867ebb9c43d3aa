"""A rank's part on storage: the data file as it lies in the arena, and the part manifest that describes it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from dtruntime_torch import _C
from dtruntime_torch.checkpoint.format.records import FileRef, ObjectEntry, Part, PartRef, TensorEntry
from dtruntime_torch.checkpoint.layout import Layout, Slot
from dtruntime_torch.checkpoint.manifest import encode_part
from dtruntime_torch.checkpoint.names import (
    DATA_SUFFIX,
    PART_SUFFIX,
    Attempt,
    attempt_path,
    shard_file_name,
)
from dtruntime_torch.checkpoint.objects import Json
from dtruntime_torch.checkpoint.specs import Extent, SavePlan, digest_length
from dtruntime_torch.errors import InvalidArgument
from dtruntime_torch.storage.backend import StorageBackend


async def write_shard(
    backend: StorageBackend,
    name: str,
    attempt: Attempt,
    plan: SavePlan,
    layout: Layout,
    image: memoryview,
    digests: bytes,
    chunk_bytes: int,
    values: Mapping[str, Json],
) -> PartRef:
    """Writes what one rank saves. Both files are durable when it returns.

    Args:
        backend: where to.
        name: of the checkpoint.
        attempt: whose folder gets the files; nobody else writes this rank's there.
        plan: what is written.
        layout: where it lies in `image`.
        image: all bytes of the data file, its header included; may not change meanwhile.
        digests: XXH3-128 of each chunk of each tensor, 16 bytes each, in the order of `layout.slots`.
        chunk_bytes: bytes of a chunk.
        values: fqn -> encoded value, for each object of the plan.

    Returns:
        What the manifest says of this part.

    Raises:
        InvalidArgument: image, digests and layout do not belong together; nothing was written.
        StorageError: a file could not be written; `delete_shard` takes away what is there.
    """
    _check(layout, image, digests, chunk_bytes)
    folder = attempt_path(name, attempt)
    data_name = shard_file_name(plan.rank, plan.world_size, DATA_SUFFIX)
    part_name = shard_file_name(plan.rank, plan.world_size, PART_SUFFIX)
    file = FileRef(
        path=f"{attempt.path}/{data_name}",
        length=layout.length,
        header_length=len(layout.header),
        header_digest=_C.digest(layout.header, len(layout.header)),
    )
    part = Part(
        rank=plan.rank,
        world_size=plan.world_size,
        generation=attempt.generation,
        step=attempt.step,
        attempt=attempt.path,
        chunk_bytes=chunk_bytes,
        files=(file,),
        tensors=_tensor_entries(layout, digests, chunk_bytes),
        objects=tuple(
            ObjectEntry(spec.fqn, spec.path, spec.index, spec.per_rank, values[spec.fqn])
            for spec in plan.objects
        ),
    )
    encoded = encode_part(part)
    await backend.write(f"{folder}/{data_name}", image)
    await backend.write(f"{folder}/{part_name}", encoded)
    return PartRef(
        rank=plan.rank,
        path=part_name,
        length=len(encoded),
        sha256=hashlib.sha256(encoded).hexdigest(),
        data_length=layout.length,
    )


async def delete_shard(
    backend: StorageBackend, name: str, attempt: Attempt, rank: int, world_size: int
) -> None:
    """Takes away what `write_shard` wrote or began to write. What is not there is no error.

    Raises:
        StorageError: a file could not be deleted; call it again later.
    """
    folder = attempt_path(name, attempt)
    for suffix in (PART_SUFFIX, DATA_SUFFIX):
        await backend.delete(f"{folder}/{shard_file_name(rank, world_size, suffix)}")


def _check(layout: Layout, image: memoryview, digests: bytes, chunk_bytes: int) -> None:
    expected = sum(digest_length(slot.nbytes, chunk_bytes) for slot in layout.slots)
    if image.nbytes != layout.length or len(digests) != expected:
        raise InvalidArgument(
            f"an image of {image.nbytes} bytes with {len(digests)} bytes of digests does not fit a layout of "
            f"{layout.length} bytes that needs {expected}"
        )
    if image[: len(layout.header)] != layout.header:
        raise InvalidArgument("the image does not start with the header of its layout")


def _tensor_entries(layout: Layout, digests: bytes, chunk_bytes: int) -> tuple[TensorEntry, ...]:
    """One entry for each slot, in the order of the state."""
    entries, start = [], 0
    for slot in layout.slots:
        stop = start + digest_length(slot.nbytes, chunk_bytes)
        entries.append(_tensor_entry(slot, digests[start:stop]))
        start = stop
    return tuple(sorted(entries, key=lambda entry: entry.index))


def _tensor_entry(slot: Slot, digests: bytes) -> TensorEntry:
    spec = slot.item.spec
    return TensorEntry(
        fqn=spec.fqn,
        path=spec.path,
        index=spec.index,
        name=slot.item.name,
        dtype=spec.dtype,
        global_shape=spec.global_shape,
        offsets=spec.offsets,
        shape=spec.shape,
        per_rank=spec.per_rank,
        alias=spec.alias,
        is_bytes=spec.is_bytes,
        extents=(Extent(0, slot.offset, slot.nbytes),) if slot.nbytes else (),
        digests=digests,
    )
