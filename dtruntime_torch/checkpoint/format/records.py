"""The frozen records of which a checkpoint's JSON files consist; `manifest` turns them into bytes and back.

Paths in them are relative to `<root>/<name>/`. docs/FORMAT.md says the same for readers in other languages.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from dtruntime_torch.checkpoint.dtypes import itemsize
from dtruntime_torch.checkpoint.names import CommitKey
from dtruntime_torch.checkpoint.objects import Json
from dtruntime_torch.checkpoint.specs import Extent, Path, Shape


@dataclass(frozen=True, slots=True)
class FileRef:
    """A data file from which a part takes bytes.

    Attributes:
        path: "step-00000100/0007-1/shard-00000-of-00002.safetensors".
        length: bytes of the file.
        header_length: bytes before the tensors' data, a multiple of 64.
        header_digest: XXH3-128 of those bytes as one piece, 16 bytes, canonical (big-endian).
    """

    path: str
    length: int
    header_length: int
    header_digest: bytes


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor, or the shard of one, as a part stores it.

    Attributes:
        fqn: its name in the state, unique in the part.
        path: the way to it in the state.
        index: its position among all leaves of the state, in the order of the state.
        name: its name in the safetensors file, unique in the part.
        dtype: torch's name of it, without "torch.".
        global_shape: the shape of the whole tensor.
        offsets: where this shard starts in the whole tensor.
        shape: the shape of this shard.
        per_rank: it differs by rank by design: a rank reads only its own.
        alias: fqn of the tensor that it is tied to, or None.
        is_bytes: the leaf is `bytes`, kept as a 1-d uint8 tensor.
        extents: where its bytes lie, in their order, each of at least one byte; all but the last are whole
            chunks. None for an empty tensor.
        digests: XXH3-128 of each chunk, 16 bytes each, canonical, concatenated. Chunks are counted from the
            tensor's first byte.
    """

    fqn: str
    path: Path
    index: int
    name: str
    dtype: str
    global_shape: Shape
    offsets: Shape
    shape: Shape
    per_rank: bool
    alias: str | None
    is_bytes: bool
    extents: tuple[Extent, ...]
    digests: bytes

    @property
    def nbytes(self) -> int:
        """Bytes of this shard."""
        return math.prod(self.shape) * itemsize(self.dtype)


@dataclass(frozen=True, slots=True)
class ObjectEntry:
    """A leaf that is no tensor.

    Attributes:
        fqn: its name in the state, unique in the part.
        path: the way to it in the state.
        index: its position among all leaves of the state.
        per_rank: it differs by rank by design: a rank reads only its own.
        value: as `objects.encode` gives it.
    """

    fqn: str
    path: Path
    index: int
    per_rank: bool
    value: Json


@dataclass(frozen=True, slots=True)
class Part:
    """What one rank saved.

    Attributes:
        rank: who saved it.
        world_size: of how many.
        generation: of the attempt.
        step: of the attempt.
        attempt: path of the attempt.
        chunk_bytes: bytes of a chunk; the last of a tensor may be shorter.
        files: the data files that the extents are in.
        tensors: in the order of the state.
        objects: in the order of the state.
        completed_by: other ranks, ascending. Together with this part theirs hold all that this rank held, and of every
            other tensor and object that is not `per_rank` at least something.
    """

    rank: int
    world_size: int
    generation: int
    step: int
    attempt: str
    chunk_bytes: int
    files: tuple[FileRef, ...]
    tensors: tuple[TensorEntry, ...]
    objects: tuple[ObjectEntry, ...]
    completed_by: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PartRef:
    """How the manifest knows a part.

    Attributes:
        rank: whose part it is.
        path: name of the part manifest in the attempt's folder.
        length: bytes of the part manifest.
        sha256: of the part manifest, in hex.
        data_length: bytes of the data file that this rank wrote in this attempt; 0 if it wrote none.
    """

    rank: int
    path: str
    length: int
    sha256: str
    data_length: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """A whole checkpoint: what its ranks saved, and where it comes from.

    Attributes:
        name: of the checkpoint.
        generation: of the attempt.
        step: of the attempt.
        attempt: path of the attempt.
        run_id: of the incarnation that saved.
        parent: the commit that this one goes on from; a delta takes bytes of it.
        world_size: number of ranks that saved.
        full: all bytes lie in this attempt's own folder.
        uses: paths of every attempt whose files the parts name, this one among them; none of those may be deleted.
        requires: features that a reader must know; one that it does not know must make it give up.
        created: when, in ISO 8601 with a zone. Says nothing about order.
        versions: of the software that saved: name -> version.
        metadata: whatever the user adds: JSON, and any float in it.
        nbytes: bytes of all tensors.
        written: bytes that this save wrote.
        parts: one for each rank, in the order of ranks.
    """

    name: str
    generation: int
    step: int
    attempt: str
    run_id: str
    parent: CommitKey | None
    world_size: int
    full: bool
    uses: tuple[str, ...]
    requires: tuple[str, ...]
    created: str
    versions: Mapping[str, str]
    metadata: Json
    nbytes: int
    written: int
    parts: tuple[PartRef, ...]

    @property
    def key(self) -> CommitKey:
        """Its place in the order of checkpoints."""
        return CommitKey(self.generation, self.step)


@dataclass(frozen=True, slots=True)
class Commit:
    """The file that makes a checkpoint exist, or says that it never will.

    Attributes:
        name: of the checkpoint.
        generation: of the attempt.
        step: of the attempt.
        attempt: path of the attempt; "" for a void.
        manifest_sha256: of the attempt's manifest, in hex; "" for a void.
        void: this step was given up for good in this generation; there is no checkpoint.
    """

    name: str
    generation: int
    step: int
    attempt: str
    manifest_sha256: str
    void: bool = False

    @property
    def key(self) -> CommitKey:
        """Its place in the order of checkpoints."""
        return CommitKey(self.generation, self.step)


@dataclass(frozen=True, slots=True)
class Generation:
    """Which incarnation a generation is.

    Attributes:
        generation: its number.
        run_id: of the incarnation.
        host: name of the machine of its leader.
        pid: process id of its leader.
        created: when, in ISO 8601 with a zone.
    """

    generation: int
    run_id: str
    host: str
    pid: int
    created: str
