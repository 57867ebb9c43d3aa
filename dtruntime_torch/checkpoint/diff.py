"""Which tensors differ between two checkpoints, and by how many bytes: from the manifests alone, no data is read.

Two chunks with one digest are taken for equal, as everywhere here. What is cut otherwise (another number of ranks,
another size of chunks) has no digests that could be compared; that is said, not guessed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from dtruntime_torch.checkpoint import catalog
from dtruntime_torch.checkpoint.format.records import ObjectEntry, Part, TensorEntry
from dtruntime_torch.checkpoint.names import CommitKey
from dtruntime_torch.checkpoint.specs import DIGEST_BYTES, Shape
from dtruntime_torch.errors import CheckpointNotFound, NotFound
from dtruntime_torch.storage.backend import StorageBackend

Kind = Literal["changed", "added", "removed", "reshaped", "recut"]


@dataclass(frozen=True, slots=True)
class Difference:
    """How one leaf of a state differs.

    Attributes:
        fqn: its name in the state.
        kind: "changed" in value; "added" or "removed"; "reshaped": another dtype or shape, or a tensor here and an
            object there; "recut": stored in other shards or chunks, so that nobody can tell without reading it.
        changed: bytes of the chunks that differ; of an object, and where it is unknown, 0.
        nbytes: bytes of the tensor where it is newer, or where there is one; of an object 0.
        is_object: it is no tensor.
    """

    fqn: str
    kind: Kind
    changed: int
    nbytes: int
    is_object: bool


class _Box(NamedTuple):
    offsets: Shape
    shape: Shape
    rank: int | None


@dataclass(frozen=True, slots=True)
class _Leaf:
    """A leaf by all that was stored of it.

    Attributes:
        nature: what it is: dtype and shape, or that it is no tensor.
        shards: where -> digests of its chunks, and its bytes; of an object its value.
        chunk_bytes: bytes of a chunk.
    """

    nature: tuple[object, ...]
    shards: dict[_Box, TensorEntry | ObjectEntry]
    chunk_bytes: int

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.shards.values() if isinstance(entry, TensorEntry))

    @property
    def is_object(self) -> bool:
        return self.nature == ("object",)


async def diff(backend: StorageBackend, name: str, old: CommitKey, new: CommitKey) -> list[Difference]:
    """Compares two checkpoints of one name.

    Args:
        backend: where they lie.
        name: of both.
        old: the one that is compared with.
        new: the other.

    Returns:
        What differs, in the order of the newer state, then what is only in the older.

    Raises:
        CheckpointNotFound: one of them is not there, or no longer.
        CorruptCheckpoint: a manifest is damaged.
    """
    before, after = await _read(backend, name, old), await _read(backend, name, new)
    found = [_compare(fqn, before.get(fqn), leaf) for fqn, leaf in after.items()]
    gone = [
        Difference(fqn, "removed", 0, leaf.nbytes, leaf.is_object)
        for fqn, leaf in before.items()
        if fqn not in after
    ]
    return [difference for difference in found if difference is not None] + gone


async def _read(backend: StorageBackend, name: str, key: CommitKey) -> dict[str, _Leaf]:
    try:
        commit = await catalog.read_commit(backend, name, key)
    except NotFound as error:
        raise _absent(name, key) from error
    if commit.void:
        raise _absent(name, key)
    manifest = await catalog.read_manifest(backend, commit)
    parts = [await catalog.read_part(backend, manifest, rank) for rank in range(manifest.world_size)]
    return _leaves(parts)


def _absent(name: str, key: CommitKey) -> CheckpointNotFound:
    return CheckpointNotFound(
        f"there is no checkpoint {name} of step {key.step} in generation {key.generation}, or no longer; "
        f"`dtruntime ls` lists what there is"
    )


def _leaves(parts: list[Part]) -> dict[str, _Leaf]:
    shards: dict[str, dict[_Box, TensorEntry | ObjectEntry]] = defaultdict(dict)
    for part in parts:
        entries: list[TensorEntry | ObjectEntry] = [*part.tensors, *part.objects]
        for entry in entries:
            shards[entry.fqn][_box_of(entry, part.rank)] = entry
    chunk_bytes = parts[0].chunk_bytes
    first = {fqn: next(iter(boxes.values())) for fqn, boxes in shards.items()}
    order = sorted(shards, key=lambda fqn: first[fqn].index)
    return {fqn: _Leaf(_nature(first[fqn]), shards[fqn], chunk_bytes) for fqn in order}


def _box_of(entry: TensorEntry | ObjectEntry, rank: int) -> _Box:
    own = rank if entry.per_rank else None
    return _Box(entry.offsets, entry.shape, own) if isinstance(entry, TensorEntry) else _Box((), (), own)


def _nature(entry: TensorEntry | ObjectEntry) -> tuple[object, ...]:
    if isinstance(entry, ObjectEntry):
        return ("object",)
    # A tensor that differs by rank may have another shape on each.
    return ("tensor", entry.dtype, None if entry.per_rank else entry.global_shape)


def _compare(fqn: str, before: _Leaf | None, after: _Leaf) -> Difference | None:
    if before is None:
        return Difference(fqn, "added", after.nbytes, after.nbytes, after.is_object)
    if before.nature != after.nature:
        return Difference(fqn, "reshaped", after.nbytes, after.nbytes, after.is_object)
    if after.is_object:
        equal = _values(before) == _values(after)
        return None if equal else Difference(fqn, "changed", 0, 0, True)
    if before.shards.keys() != after.shards.keys() or before.chunk_bytes != after.chunk_bytes:
        return Difference(fqn, "recut", 0, after.nbytes, False)
    changed = sum(_changed_bytes(before, after))
    return Difference(fqn, "changed", changed, after.nbytes, False) if changed else None


def _values(leaf: _Leaf) -> dict[_Box, str]:
    # As text, for in Python True equals 1, and 1 equals 1.0.
    return {box: repr(entry.value) for box, entry in leaf.shards.items() if isinstance(entry, ObjectEntry)}


def _changed_bytes(before: _Leaf, after: _Leaf) -> Iterator[int]:
    for box, new in after.shards.items():
        old = before.shards[box]
        if not isinstance(old, TensorEntry) or not isinstance(new, TensorEntry) or old.digests == new.digests:
            continue
        rows = [
            np.frombuffer(entry.digests, dtype=np.uint8).reshape(-1, DIGEST_BYTES) for entry in (old, new)
        ]
        differ = (rows[0] != rows[1]).any(axis=1)
        short = len(differ) * after.chunk_bytes - new.nbytes if differ[-1] else 0
        yield int(differ.sum()) * after.chunk_bytes - short
