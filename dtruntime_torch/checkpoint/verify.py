"""Whether a checkpoint is what was committed: every byte is read along the chain of hashes, and nothing kept.

All damage is gathered, not only the first: what is sound below a damaged manifest cannot be told, and is not read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from dtruntime_torch.checkpoint import catalog
from dtruntime_torch.checkpoint.format.records import Manifest, Part
from dtruntime_torch.checkpoint.loading.chunk_reader import check_part
from dtruntime_torch.checkpoint.names import CommitKey
from dtruntime_torch.checkpoint.specs import DIGEST_BYTES
from dtruntime_torch.errors import CheckpointNotFound, CorruptCheckpoint, Damage, NotFound
from dtruntime_torch.storage.backend import StorageBackend

# Each time the newest vanishes a newer one was committed before: that it always does is not plausible.
MAX_TRIES = 10

Progress = Callable[[int, int], object]


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What was found.

    Attributes:
        name: of the checkpoint.
        step: of the checkpoint.
        generation: of the checkpoint.
        damage: every damaged range, by rank, file and position.
        tensors: tensors, or shards of them, that were to be checked.
        chunks: their chunks.
        nbytes: their bytes.
    """

    name: str
    step: int
    generation: int
    damage: tuple[Damage, ...]
    tensors: int
    chunks: int
    nbytes: int

    @property
    def ok(self) -> bool:
        """Whether every byte is what was committed."""
        return not self.damage


@dataclass(slots=True)
class _Findings:
    damage: list[Damage] = field(default_factory=list)
    tensors: int = 0
    chunks: int = 0
    nbytes: int = 0


async def find_commit(backend: StorageBackend, name: str, step: int | None = None) -> CommitKey:
    """Returns the key of the newest commit, or of the newest of `step`; a damaged one counts.

    Args:
        backend: where the checkpoint lies.
        name: of the checkpoint.
        step: None for any.

    Raises:
        CheckpointNotFound: there is none.
    """
    if step is None:
        newest = await catalog.newest_key(backend, name)
        if newest is not None:
            return newest
    else:
        for key in reversed(await catalog.commit_keys(backend, name)):
            if key.step == step and await is_committed(backend, name, key):
                return key
    which = "" if step is None else f" of step {step}"
    raise CheckpointNotFound(f"there is no checkpoint {name}{which}; `dtruntime ls` lists what there is")


async def verify(
    backend: StorageBackend, name: str, key: CommitKey | None, on_progress: Progress | None = None
) -> VerifyReport:
    """Reads every byte of a checkpoint and compares it with its digests.

    Args:
        backend: where the checkpoint lies.
        name: of the checkpoint.
        key: which one; None for the newest.
        on_progress: called with the bytes of tensors that were checked so far, and with how many there are.

    Returns:
        All damage that was found. A file that is missing is damage.

    Raises:
        CheckpointNotFound: there is no such checkpoint, or it was removed while it was read.
        StorageError: the storage failed otherwise; nothing is known.
    """
    for _ in range(MAX_TRIES if key is None else 1):
        looked_at = await find_commit(backend, name) if key is None else key
        findings = await _check(backend, name, looked_at, on_progress)
        # What a prune takes away while it is read is not damaged.
        if findings is not None and (not findings.damage or await is_committed(backend, name, looked_at)):
            return VerifyReport(
                name=name,
                step=looked_at.step,
                generation=looked_at.generation,
                damage=tuple(findings.damage),
                tensors=findings.tensors,
                chunks=findings.chunks,
                nbytes=findings.nbytes,
            )
    raise CheckpointNotFound(
        f"there is no checkpoint {name} of step {looked_at.step} in generation {looked_at.generation}: "
        f"it was removed or given up"
    )


async def is_committed(backend: StorageBackend, name: str, key: CommitKey) -> bool:
    """Whether something is committed there, be it damaged."""
    try:
        return not (await catalog.read_commit(backend, name, key)).void
    except NotFound:
        return False
    except CorruptCheckpoint:
        return True


async def _check(
    backend: StorageBackend, name: str, key: CommitKey, on_progress: Progress | None
) -> _Findings | None:
    """Checks one commit and all below it; None if nothing is committed there."""
    findings = _Findings()
    try:
        commit = await catalog.read_commit(backend, name, key)
        if commit.void:
            return None
        manifest = await catalog.read_manifest(backend, commit)
    except NotFound:
        return None
    except CorruptCheckpoint as error:
        findings.damage += error.damage
        return findings
    for rank in range(manifest.world_size):
        try:
            part = await catalog.read_part(backend, manifest, rank)
        except CorruptCheckpoint as error:
            findings.damage += error.damage
        else:
            await _check_data(backend, manifest, part, findings, on_progress)
    return findings


async def _check_data(
    backend: StorageBackend, manifest: Manifest, part: Part, findings: _Findings, on_progress: Progress | None
) -> None:
    done = findings.nbytes

    def on_bytes(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if on_progress is not None:
            on_progress(done, manifest.nbytes)

    findings.damage += await check_part(backend, manifest.name, part, on_bytes)
    findings.tensors += len(part.tensors)
    findings.chunks += sum(len(tensor.digests) // DIGEST_BYTES for tensor in part.tensors)
    findings.nbytes += sum(tensor.nbytes for tensor in part.tensors)
