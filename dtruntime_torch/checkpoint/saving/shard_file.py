"""A rank's part on storage: the data file as it lies in the arena, and the part manifest that describes it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dtruntime_torch import _C
from dtruntime_torch.checkpoint.format import strict_json
from dtruntime_torch.checkpoint.format.checks import is_own
from dtruntime_torch.checkpoint.format.records import FileRef, ObjectEntry, Part, PartRef, TensorEntry
from dtruntime_torch.checkpoint.manifest import VERSION, encode_part
from dtruntime_torch.checkpoint.names import (
    DATA_SUFFIX,
    DELTA_SUFFIX,
    PART_SUFFIX,
    Attempt,
    attempt_path,
    shard_file_name,
)
from dtruntime_torch.checkpoint.objects import Json
from dtruntime_torch.checkpoint.saving.delta import Delta
from dtruntime_torch.checkpoint.saving.layout import ALIGNMENT, Layout, Slot
from dtruntime_torch.checkpoint.specs import Extent, SavePlan, digest_length
from dtruntime_torch.errors import InvalidArgument
from dtruntime_torch.storage.backend import StorageBackend


def _delta_header() -> bytes:
    text = strict_json.dump({"format": "dtruntime.delta", "version": VERSION})
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


DELTA_HEADER = _delta_header()
"""The first bytes of each delta file: length, JSON, spaces. What follows is found by extents alone."""


@dataclass(frozen=True, slots=True)
class Shard:
    """What one rank wrote.

    Attributes:
        part: its part manifest.
        ref: what the manifest says of that.
    """

    part: Part
    ref: PartRef


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
    delta: Delta | None = None,
) -> Shard:
    """Writes what one rank saves. Both files are durable when it returns.

    Args:
        backend: where to.
        name: of the checkpoint.
        attempt: whose folder gets the files; nobody else writes this rank's there.
        plan: what is written.
        layout: where it lies in `image`.
        image: all bytes of a full save's data file, its header included; may not change meanwhile.
        digests: XXH3-128 of each chunk of each tensor, 16 bytes each, in the order of `layout.slots`.
        chunk_bytes: bytes of a chunk.
        values: fqn -> encoded value, for each object of the plan.
        delta: writes only what changed in that one, made for `DELTA_HEADER`; without any change no data file at
            all. None writes everything.

    Raises:
        InvalidArgument: image, digests and layout do not belong together; nothing was written.
        StorageError: a file could not be written; `delete_shard` takes away what is there.
    """
    _check(layout, image, digests, chunk_bytes)
    part = describe_part(attempt, plan, layout, digests, chunk_bytes, values, delta)
    data = [image] if delta is None else _delta_file(image, delta)
    if data:
        suffix = DATA_SUFFIX if delta is None else DELTA_SUFFIX
        data_name = shard_file_name(plan.rank, plan.world_size, suffix)
        await backend.write(f"{attempt_path(name, attempt)}/{data_name}", data)
    return await write_part(backend, name, attempt, part)


def describe_part(
    attempt: Attempt,
    plan: SavePlan,
    layout: Layout,
    digests: bytes,
    chunk_bytes: int,
    values: Mapping[str, Json],
    delta: Delta | None = None,
) -> Part:
    """The part manifest of what a rank writes; the arguments are those of `write_shard`."""
    suffix = DATA_SUFFIX if delta is None else DELTA_SUFFIX
    header = layout.header if delta is None else DELTA_HEADER
    length = layout.length if delta is None else _delta_length(delta)
    path = f"{attempt.path}/{shard_file_name(plan.rank, plan.world_size, suffix)}"
    own = FileRef(path, length, len(header), _C.digest(header, len(header)))
    extents = [slot.extents for slot in layout.slots] if delta is None else delta.extents
    return Part(
        rank=plan.rank,
        world_size=plan.world_size,
        generation=attempt.generation,
        step=attempt.step,
        attempt=attempt.path,
        chunk_bytes=chunk_bytes,
        files=(*(() if delta is None else delta.files), *((own,) if length else ())),
        tensors=_tensor_entries(layout, digests, chunk_bytes, extents),
        objects=tuple(
            ObjectEntry(spec.fqn, spec.path, spec.index, spec.per_rank, values[spec.fqn])
            for spec in plan.objects
        ),
        completed_by=plan.completed_by,
    )


async def write_part(backend: StorageBackend, name: str, attempt: Attempt, part: Part) -> Shard:
    """Writes a part manifest, whose data file is durable already.

    Args:
        backend: where to.
        name: of the checkpoint.
        attempt: whose folder gets the file.
        part: as `describe_part` gave it.

    Raises:
        StorageError: it could not be written.
    """
    encoded = encode_part(part)
    part_name = shard_file_name(part.rank, part.world_size, PART_SUFFIX)
    await backend.write(f"{attempt_path(name, attempt)}/{part_name}", encoded)
    written = sum(file.length for file in part.files if is_own(file, attempt.path))
    sha256 = hashlib.sha256(encoded).hexdigest()
    return Shard(part, PartRef(part.rank, part_name, len(encoded), sha256, written))


async def delete_shard(
    backend: StorageBackend, name: str, attempt: Attempt, rank: int, world_size: int
) -> None:
    """Takes away what `write_shard` wrote or began to write. What is not there is no error.

    Raises:
        StorageError: a file could not be deleted; call it again later.
    """
    folder = attempt_path(name, attempt)
    for suffix in (PART_SUFFIX, DELTA_SUFFIX, DATA_SUFFIX):
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


def _delta_file(image: memoryview, delta: Delta) -> list[memoryview]:
    if not delta.runs:
        return []
    return [memoryview(DELTA_HEADER), *(image[start : start + nbytes] for start, nbytes in delta.runs)]


def _delta_length(delta: Delta) -> int:
    return len(DELTA_HEADER) + sum(nbytes for _, nbytes in delta.runs) if delta.runs else 0


def _tensor_entries(
    layout: Layout, digests: bytes, chunk_bytes: int, extents: Sequence[tuple[Extent, ...]]
) -> tuple[TensorEntry, ...]:
    """One entry for each slot, in the order of the state."""
    entries, start = [], 0
    for slot, places in zip(layout.slots, extents, strict=True):
        stop = start + digest_length(slot.nbytes, chunk_bytes)
        entries.append(_tensor_entry(slot, digests[start:stop], places))
        start = stop
    return tuple(sorted(entries, key=lambda entry: entry.index))


def _tensor_entry(slot: Slot, digests: bytes, extents: tuple[Extent, ...]) -> TensorEntry:
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
        extents=extents,
        digests=digests,
    )
