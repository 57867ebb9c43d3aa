"""What must hold in a record that was decoded or is about to be encoded, beyond the types of its fields.

A reader may rely on all of it: after these checks every offset lies in its file, every length is bounded by
what a file holds, and no path leaves the checkpoint's folder. What a reader would refuse is never written.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from dtruntime_torch.checkpoint import names
from dtruntime_torch.checkpoint.dtypes import is_known, itemsize
from dtruntime_torch.checkpoint.format.records import (
    Commit,
    FileRef,
    Generation,
    Manifest,
    ObjectEntry,
    Part,
    PartRef,
    TensorEntry,
)
from dtruntime_torch.checkpoint.format.strict_json import Newer, Refused
from dtruntime_torch.checkpoint.names import MAX_INTEGER
from dtruntime_torch.checkpoint.objects import MAX_DEPTH, is_text
from dtruntime_torch.checkpoint.specs import DIGEST_BYTES, MAX_DIMENSIONS, digest_length
from dtruntime_torch.errors import InvalidArgument

HEADER_ALIGNMENT = 64
FEATURES: frozenset[str] = frozenset()  # that this version knows of those in `requires`: none are needed yet

_SHA256 = re.compile(r"[0-9a-f]{64}")
_RUN_ID = re.compile(r"[A-Za-z0-9._-]{1,100}")
_TIME = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,9})?(Z|[+-][0-9]{2}:[0-9]{2})"
)


def check_features(requires: Iterable[str]) -> None:
    """Refuses a feature that this version does not know; ask before anything else of a manifest is read."""
    unknown = sorted(set(requires) - FEATURES)
    if unknown:
        raise Newer(
            f"it needs features that this version lacks ({', '.join(unknown)}); upgrade dtruntime_torch"
        )


def check_generation(record: Generation) -> None:
    """Refuses a generation record whose texts are not what they should be."""
    _require(bool(_RUN_ID.fullmatch(record.run_id)), "its run id is no run id")
    _require(bool(_TIME.fullmatch(record.created)), "its time of creation is not ISO 8601 with a zone")
    _require(_is_line(record.host), "its host is not one printable line")


def check_commit(commit: Commit) -> None:
    """Refuses a commit that names no attempt of its own, and a void that names one."""
    _check_name(commit.name)
    if commit.void:
        _require(commit.attempt == commit.manifest_sha256 == "", "it is void and names an attempt")
        return
    _check_attempt(commit.attempt, commit.generation, commit.step)
    _require(bool(_SHA256.fullmatch(commit.manifest_sha256)), "it holds no SHA-256 of a manifest")


def check_manifest(manifest: Manifest) -> None:
    """Refuses a manifest that contradicts itself."""
    check_features(manifest.requires)
    _check_name(manifest.name)
    _check_attempt(manifest.attempt, manifest.generation, manifest.step)
    _require(bool(_RUN_ID.fullmatch(manifest.run_id)), "its run id is no run id")
    _require(bool(_TIME.fullmatch(manifest.created)), "its time of creation is not ISO 8601 with a zone")
    versions = [*manifest.versions, *manifest.versions.values()]
    _require(all(map(_is_line, versions)), "a version in it is not one printable line")
    _check_lineage(manifest)
    _require(len(manifest.parts) == manifest.world_size > 0, "it does not have one part for each rank")
    for rank, ref in enumerate(manifest.parts):
        _check_part_ref(ref, rank, manifest.world_size)


def check_part(part: Part) -> None:
    """Refuses a part whose entries contradict each other, their shapes or their files."""
    _check_attempt(part.attempt, part.generation, part.step)
    _require(part.rank < part.world_size, f"rank {part.rank} is none of {part.world_size}")
    others = part.completed_by
    _require(part.rank not in others, "it is completed by itself")
    _require(sorted({*others}) == list(others), "it is completed by ranks out of order")
    _require(max(others, default=0) < part.world_size, "it is completed by a rank that there is not")
    _require(part.chunk_bytes > 0, "its chunks have no bytes")
    for file in part.files:
        _check_file(file, part)
    _check_distinct("file", (file.path for file in part.files))
    own = [file for file in part.files if is_own(file, part.attempt)]
    _require(len(own) <= 1, "it has two files in its own attempt")
    leaves: list[TensorEntry | ObjectEntry] = [*part.tensors, *part.objects]
    for leaf in leaves:
        if len(leaf.path) > MAX_DEPTH:
            raise Refused(f"{leaf.fqn!r} lies more than {MAX_DEPTH} deep")
    for tensor in part.tensors:
        _check_tensor(tensor, part)
    _check_distinct("fqn", (leaf.fqn for leaf in leaves))
    _check_distinct("name", (tensor.name for tensor in part.tensors))
    _check_extents(part)


def is_own(file: FileRef, attempt: str) -> bool:
    """Whether the file lies in the folder of that attempt."""
    return file.path.rpartition("/")[0] == attempt


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Refused(otherwise)


def _is_line(text: str) -> bool:
    # It is printed: no control characters that a terminal would obey.
    return text.isprintable() and len(text) <= 255


def _check_name(name: str) -> None:
    try:
        names.check_name(name)
    except InvalidArgument as error:
        raise Refused(str(error)) from None


def _check_attempt(path: str, generation: int, step: int) -> None:
    attempt = names.parse_attempt(path)
    if attempt is None or (attempt.generation, attempt.step) != (generation, step):
        raise Refused(f"{path!r} is no attempt at step {step} in generation {generation}")


def _check_distinct(what: str, values: Iterable[str]) -> None:
    seen: set[str] = set()
    for value in values:
        if value in seen:
            raise Refused(f"the {what} {value!r} occurs twice")
        seen.add(value)


def _check_lineage(manifest: Manifest) -> None:
    for path in manifest.uses:
        _require(names.parse_attempt(path) is not None, f"{path!r} is no attempt")
    _check_distinct("attempt", manifest.uses)
    _require(manifest.attempt in manifest.uses, "it does not use its own attempt")
    _require(not manifest.full or len(manifest.uses) == 1, "it is full and uses another attempt")
    _require(manifest.full or manifest.parent is not None, "it is not full and has no parent")
    _require(manifest.parent is None or manifest.parent < manifest.key, "its parent comes after it")


def _check_part_ref(ref: PartRef, rank: int, world_size: int) -> None:
    _require(ref.rank == rank, f"the part of rank {rank} is out of place")
    expected = names.shard_file_name(rank, world_size, names.PART_SUFFIX)
    _require(ref.path == expected, f"the part of rank {rank} is called {ref.path!r}, not {expected!r}")
    _require(bool(_SHA256.fullmatch(ref.sha256)), f"the part of rank {rank} has no SHA-256")
    _require(ref.length > 0, f"the part of rank {rank} has no bytes")


def _check_file(file: FileRef, part: Part) -> None:
    folder, _, file_name = file.path.rpartition("/")
    shard = names.parse_shard_file(file_name)
    sound = shard is not None and shard.suffix in (names.DATA_SUFFIX, names.DELTA_SUFFIX)
    _require(sound and names.parse_attempt(folder) is not None, f"{file.path!r} is no data file")
    if is_own(file, part.attempt) and shard is not None:
        _require(shard[:2] == (part.rank, part.world_size), f"{file.path!r} is another rank's")
    aligned = file.header_length > 0 and file.header_length % HEADER_ALIGNMENT == 0
    _require(aligned, f"the header of {file.path!r} is no positive multiple of {HEADER_ALIGNMENT} bytes")
    _require(file.header_length <= file.length, f"{file.path!r} is shorter than its header")
    _require(len(file.header_digest) == DIGEST_BYTES, f"{file.path!r} has no digest of its header")


# Run for each tensor of each save: a message is only made where it is needed, other than for `_require`.


def _check_tensor(tensor: TensorEntry, part: Part) -> None:
    fqn = tensor.fqn
    if not is_known(tensor.dtype):
        raise Newer(f"{fqn!r} has an unknown dtype {tensor.dtype!r}; upgrade dtruntime_torch")
    if not is_text(tensor.name) or tensor.name == "__metadata__":
        raise Refused(f"{tensor.name!r} cannot name a tensor in a safetensors file")
    if tensor.alias == fqn:
        raise Refused(f"{fqn!r} is tied to itself")
    _check_box(tensor)
    if tensor.is_bytes and not (tensor.dtype == "uint8" and len(tensor.shape) == 1):
        raise Refused(f"{fqn!r} is bytes and no 1-d uint8")
    nbytes = tensor.nbytes
    expected = digest_length(nbytes, part.chunk_bytes)
    if len(tensor.digests) != expected:
        chunks = expected // DIGEST_BYTES
        raise Refused(f"{fqn!r} has {chunks} chunks and {len(tensor.digests)} bytes of digests")
    _check_extents_of(tensor, nbytes, part)


def _check_box(tensor: TensorEntry) -> None:
    fqn, whole, offsets, shape = tensor.fqn, tensor.global_shape, tensor.offsets, tensor.shape
    if len(whole) > MAX_DIMENSIONS:
        raise Refused(f"{fqn!r} has more than {MAX_DIMENSIONS} dimensions")
    if not len(whole) == len(offsets) == len(shape):
        raise Refused(f"{fqn!r} is not in the whole: it has other dimensions")
    if shape != whole or any(offsets):
        for start, size, full in zip(offsets, shape, whole, strict=True):
            if start + size > full:
                raise Refused(f"{fqn!r}: [{start}, {start + size}) is not in the whole of {full}")
    # Empty dimensions count as 1, for strides are computed from the others.
    elements = math.prod(whole) or math.prod(max(size, 1) for size in whole)
    if elements * itemsize(tensor.dtype) > MAX_INTEGER:
        raise Refused(f"{fqn!r} is too large to exist")


def _check_extents_of(tensor: TensorEntry, nbytes: int, part: Part) -> None:
    fqn, length = tensor.fqn, 0
    for extent in tensor.extents:
        if extent.file >= len(part.files):
            raise Refused(f"{fqn!r} lies in a file that is not listed")
        if length % part.chunk_bytes:
            raise Refused(f"{fqn!r}: a chunk spans two extents")
        file, end = part.files[extent.file], extent.offset + extent.length
        if not file.header_length <= extent.offset < end <= file.length:
            raise Refused(f"{fqn!r}: bytes [{extent.offset}, {end}) are no data of {file.path}")
        length += extent.length
    if length != nbytes:
        raise Refused(f"{fqn!r} has {nbytes} bytes and {length} in extents")


def _check_extents(part: Part) -> None:
    """No two share a byte, and in the part's own file no byte is in none: so all is digested."""
    ends = [file.header_length for file in part.files]
    data = [0] * len(part.files)
    for file, offset, length, fqn in sorted(
        (extent.file, extent.offset, extent.length, tensor.fqn)
        for tensor in part.tensors
        for extent in tensor.extents
    ):
        if offset < ends[file]:
            raise Refused(f"{fqn!r} overlaps another tensor in {part.files[file].path}")
        ends[file] = offset + length
        data[file] += length
    for ref, nbytes in zip(part.files, data, strict=True):
        if is_own(ref, part.attempt):
            covered = ref.header_length + nbytes == ref.length
            _require(covered, f"{ref.path} has bytes that belong to no tensor")
