"""Describes the checkpoints that there are, as far as their manifests can be read; no data is."""

from __future__ import annotations

from dtruntime_torch.checkpoint import catalog
from dtruntime_torch.checkpoint.info import CheckpointInfo
from dtruntime_torch.checkpoint.names import CommitKey
from dtruntime_torch.errors import CorruptCheckpoint, NewerFormat
from dtruntime_torch.storage import StorageBackend


async def describe_all(backend: StorageBackend, name: str) -> list[CheckpointInfo]:
    """Describes the checkpoints of one name, oldest first.

    Args:
        backend: where they lie.
        name: their name.
    """
    found = []
    for key in await catalog.commit_keys(backend, name):
        info = await _describe(backend, name, key)
        found += [info] if info is not None else []
    return found


async def _describe(backend: StorageBackend, name: str, key: CommitKey) -> CheckpointInfo | None:
    try:
        commit = await catalog.read_commit(backend, name, key)
        if commit.void:
            return None
        return CheckpointInfo.of(await catalog.read_manifest(backend, commit), commit.manifest_sha256)
    except (CorruptCheckpoint, NewerFormat, FileNotFoundError):
        # Damaged, of a later version, or pruned since it was listed: there is nothing here that can be described.
        return None
