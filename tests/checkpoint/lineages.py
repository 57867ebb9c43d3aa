"""Checkpoints at their shortest, full ones and deltas, for the tests of what is deleted: one rank, one data file."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable

from dtruntime_torch.checkpoint import catalog, names
from dtruntime_torch.checkpoint.manifest import (
    Commit,
    Manifest,
    decode_manifest,
    encode_commit,
    encode_manifest,
)
from dtruntime_torch.checkpoint.names import Attempt, CommitKey
from dtruntime_torch.checkpoint.objects import Json
from dtruntime_torch.storage import StorageBackend, run_sync
from tests.checkpoint.commits import NAME, data_path, generation_path, manifest_of, manifest_path

DATA = b"data"


def manifest_for(attempt: Attempt, uses: Iterable[Attempt] = (), metadata: Json = None) -> Manifest:
    """Of a save that takes bytes of the attempts in `uses`, if there are any."""
    manifest = manifest_of(attempt.generation, attempt.step, attempt.number)
    others = tuple(dict.fromkeys(used.path for used in uses if used != attempt))
    if others:
        manifest = dataclasses.replace(
            manifest, full=False, parent=CommitKey(0, 0), uses=(attempt.path, *others)
        )
    return dataclasses.replace(manifest, metadata=metadata)


class Shelf:
    """A storage, and short ways to put there what saves leave behind.

    Args:
        backend: the storage.
    """

    def __init__(self, backend: StorageBackend) -> None:
        self.backend = backend

    def write(self, path: str, data: bytes) -> None:
        run_sync(self.backend.write(path, data))

    def put_data(self, attempt: Attempt) -> Attempt:
        """What is left of a save that died before its manifest."""
        self.write(data_path(attempt.path), DATA)
        self.write(data_path(attempt.path).replace(".safetensors", ".json"), DATA)
        return attempt

    def put_intent(self, attempt: Attempt, *uses: Attempt, metadata: Json = None) -> Attempt:
        """What is left of a save that died before its commit."""
        self.put_data(attempt)
        manifest = manifest_for(attempt, uses, metadata)
        self.write(manifest_path(manifest), encode_manifest(manifest))
        return attempt

    def put(
        self, generation: int, step: int, *uses: Attempt, number: int = 1, metadata: Json = None
    ) -> Attempt:
        """A checkpoint."""
        attempt = self.put_intent(Attempt(generation, step, number), *uses, metadata=metadata)
        sha256 = hashlib.sha256(encode_manifest(manifest_for(attempt, uses, metadata))).hexdigest()
        commit = Commit(NAME, generation, step, attempt.path, sha256)
        self.write(names.commit_path(NAME, attempt.key), encode_commit(commit))
        return attempt

    def put_void(self, generation: int, step: int) -> None:
        void = Commit(NAME, generation, step, "", "", void=True)
        self.write(names.commit_path(NAME, void.key), encode_commit(void))

    def claim(self, generation: int) -> None:
        """Somebody has claimed this generation; what its record says is not read."""
        self.write(generation_path(generation), b"{}")

    def files(self) -> list[str]:
        """The paths of all files, without the name of the checkpoint."""
        return [entry.path.removeprefix(f"{NAME}/") for entry in run_sync(self.backend.list(f"{NAME}/"))]

    def attempts(self) -> set[str]:
        """The folders in which there is something."""
        return {path.rpartition("/")[0] for path in self.files() if path.startswith("step-")}

    def commits(self) -> dict[CommitKey, Commit]:
        """All commits, also the void ones."""
        keys = run_sync(catalog.commit_keys(self.backend, NAME))
        return {key: run_sync(catalog.read_commit(self.backend, NAME, key)) for key in keys}

    def steps(self) -> list[int]:
        """The steps that are committed."""
        return [key.step for key, commit in self.commits().items() if not commit.void]

    def broken(self) -> list[str]:
        """Which commits name what is not there."""
        there = set(self.files())
        found = []
        for key, commit in self.commits().items():
            if commit.void:
                continue
            path = f"{commit.attempt}/{names.MANIFEST}"
            if path not in there:
                found.append(f"{key} has no manifest")
                continue
            manifest = decode_manifest(bytes(run_sync(self.backend.read(f"{NAME}/{path}"))), path)
            needed = {data_path(used).removeprefix(f"{NAME}/") for used in manifest.uses}
            found += [f"{key} needs {gone}" for gone in sorted(needed - there)]
        return found
