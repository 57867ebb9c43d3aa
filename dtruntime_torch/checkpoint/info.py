"""What a user is told of one committed checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dtruntime_torch.checkpoint.manifest import Manifest, PartRef
from dtruntime_torch.checkpoint.names import CommitKey
from dtruntime_torch.checkpoint.objects import Json


@dataclass(frozen=True, slots=True, eq=False)
class CheckpointInfo:
    """One committed checkpoint. Two are equal if they are of the same one.

    Attributes:
        name: the name that it was saved under.
        step: the training step.
        generation: the incarnation that saved it; of two the higher is the newer.
        path: its folder, relative to the root of the storage.
        nbytes: bytes of all its tensors.
        written: bytes of data files that this save wrote.
        full: whether it needs no other checkpoint's files.
        sha256: of its manifest, in hex; with it every byte is pinned.
        world_size: the number of ranks that saved it.
        run_id: of the incarnation of the job that saved it.
        parent: the commit that its saver went on from, (generation, step); None for the first one. It may have been
            deleted since.
        created: when its manifest was made, ISO 8601, by the clock of rank 0.
        versions: of the packages that wrote it.
        metadata: what the user gave to `save`.
        parts: one for each rank: `path` of its part manifest, in the folder `path` above, with that one's `length` and
            `sha256`; and `data_length`, bytes of the data file that the rank wrote. The digests of all data are in the
            part manifests. Not shown by `repr`.

    Example:
        info = manager.latest()
        print(info.run_id, info.parent, [part.data_length for part in info.parts])
    """

    name: str
    step: int
    generation: int
    path: str
    nbytes: int
    written: int
    full: bool
    sha256: str
    world_size: int
    run_id: str
    parent: CommitKey | None
    created: str
    versions: dict[str, str]
    metadata: Json
    parts: tuple[PartRef, ...] = field(repr=False)

    @property
    def key(self) -> CommitKey:
        """What orders checkpoints: (generation, step)."""
        return CommitKey(self.generation, self.step)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CheckpointInfo) and (self.path, self.sha256) == (other.path, other.sha256)

    def __hash__(self) -> int:
        return hash((self.path, self.sha256))

    @classmethod
    def of(cls, manifest: Manifest, sha256: str) -> CheckpointInfo:
        """Describes the checkpoint of a manifest whose SHA-256 is given in hex."""
        return cls(**_fields(manifest, sha256))


@dataclass(frozen=True, slots=True, eq=False)
class LoadedCheckpoint(CheckpointInfo):
    """The checkpoint that a load took, and what it did not; the same on all ranks.

    Attributes:
        missing_keys: names of the state, of any rank's, that the checkpoint does not have; not filled.
        unexpected_keys: names of the checkpoint for which no rank's state has a place.
    """

    missing_keys: list[str] = field(default_factory=list)
    unexpected_keys: list[str] = field(default_factory=list)

    @classmethod
    def from_load(
        cls, manifest: Manifest, sha256: str, missing: Sequence[str], unexpected: Sequence[str]
    ) -> LoadedCheckpoint:
        """Describes a load of the checkpoint of a manifest whose SHA-256 is given in hex."""
        return cls(**_fields(manifest, sha256), missing_keys=list(missing), unexpected_keys=list(unexpected))


def _fields(manifest: Manifest, sha256: str) -> dict[str, Any]:
    return {
        "name": manifest.name,
        "step": manifest.step,
        "generation": manifest.generation,
        "path": f"{manifest.name}/{manifest.attempt}",
        "nbytes": manifest.nbytes,
        "written": manifest.written,
        "full": manifest.full,
        "sha256": sha256,
        "world_size": manifest.world_size,
        "run_id": manifest.run_id,
        "parent": manifest.parent,
        "created": manifest.created,
        "versions": dict(manifest.versions),
        "metadata": manifest.metadata,
        "parts": manifest.parts,
    }
