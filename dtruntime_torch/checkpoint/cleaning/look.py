"""What is still needed: the look that precedes every deletion of files.

A manifest protects the files of every attempt that it names, whether it is committed or about to be. So before
files go, all manifests are listed and read, until nothing moved in between: one that came meanwhile might name
what one that went had named before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container
from dataclasses import dataclass

from dtruntime_torch.checkpoint import catalog, names
from dtruntime_torch.checkpoint.manifest import Commit, Manifest, decode_manifest
from dtruntime_torch.checkpoint.objects import Json
from dtruntime_torch.errors import CleaningBlocked, CorruptCheckpoint, NewerFormat, NotFound, StorageError
from dtruntime_torch.storage.backend import StorageBackend

# Manifests come and go once in a save: that they move each time is not plausible.
MAX_LISTINGS = 100


@dataclass(frozen=True, slots=True)
class Noted:
    """What a manifest says.

    Attributes:
        uses: the paths of the attempts whose files may not go while it is there.
        metadata: the user's.
        sha256: of the manifest, in hex.
    """

    uses: frozenset[str]
    metadata: Json
    sha256: str


class Manifests:
    """The manifests of a checkpoint, each read once: none is ever changed. Whether it is there, a listing tells.

    Args:
        backend: where the checkpoint lies.
        name: of the checkpoint.
    """

    def __init__(self, backend: StorageBackend, name: str) -> None:
        self._backend = backend
        self._name = name
        self._noted: dict[str, Noted] = {}

    async def read(self, attempt: str, committed: str | None = None) -> Noted | None:
        """Returns what the manifest of an attempt says; None if there is none, or no longer.

        Args:
            attempt: its path.
            committed: the SHA-256 of the manifest that its commit names, if that is known: what only looks like one
                of a later version is damaged.

        Raises:
            CleaningBlocked: it cannot be understood.
        """
        if attempt not in self._noted:
            path = names.manifest_path(self._name, attempt)
            try:
                data = await catalog.read_record(self._backend, path)
                manifest = decode_manifest(data, path)
            except NotFound:
                return None
            except CorruptCheckpoint as error:
                raise self.blocked(attempt, str(error)) from error
            except NewerFormat as error:
                if committed not in (None, hashlib.sha256(data).hexdigest()):
                    raise self.blocked(attempt, f"{path} is damaged: it is not what was committed") from error
                raise CleaningBlocked(f"{_why(self._name, str(error))}; nothing of it is damaged") from error
            if (manifest.name, manifest.attempt) != (self._name, attempt):
                raise self.blocked(attempt, f"{path} is the manifest of {manifest.name}/{manifest.attempt}")
            self._noted[attempt] = _note(manifest, hashlib.sha256(data).hexdigest())
        return self._noted[attempt]

    async def check(self, commit: Commit) -> Noted | None:
        """Returns what the manifest of a commit says; None if there is none.

        Raises:
            CleaningBlocked: it cannot be understood, or is not the one that was committed.
        """
        noted = await self.read(commit.attempt)
        if noted is not None and noted.sha256 != commit.manifest_sha256:
            path = names.manifest_path(self._name, commit.attempt)
            raise self.blocked(
                commit.attempt,
                f"{path} is damaged: expected SHA-256 {commit.manifest_sha256}, found {noted.sha256}",
            )
        return noted

    def forget_others(self, attempts: Container[str]) -> None:
        """Forgets all manifests but those of these attempts."""
        self._noted = {attempt: noted for attempt, noted in self._noted.items() if attempt in attempts}

    def blocked(self, attempt: str, why: str) -> CleaningBlocked:
        """The error that names what is damaged, and how to give it up."""
        return CleaningBlocked(
            f"{_why(self._name, why)}. Repair it, or give that attempt up with "
            f"`dtruntime drop PATH {self._name} {attempt}`"
        )


def _why(name: str, why: str) -> str:
    return f"nothing of {name} is deleted, for it is not known what is still needed: {why}"


def _note(manifest: Manifest, sha256: str) -> Noted:
    return Noted(frozenset(manifest.uses), manifest.metadata, sha256)


async def needed(backend: StorageBackend, name: str, manifests: Manifests) -> frozenset[str]:
    """Looks until nothing moves, and returns the paths of the attempts whose files may not go.

    Files of other attempts may go if before this was called nothing was committed, or can be any more, that
    names them.

    Raises:
        CleaningBlocked: a manifest cannot be understood.
        StorageError: the storage failed, or manifests never stopped moving.
    """
    listed = await catalog.manifests(backend, name)
    for _ in range(MAX_LISTINGS):
        noted = await _read_all(manifests, listed)
        again = await catalog.manifests(backend, name)
        if noted is not None and again == listed:
            return frozenset(attempt for one in noted for attempt in one.uses)
        listed = again
    raise StorageError(
        f"the manifests of {name} changed during each of {MAX_LISTINGS} listings; try again later"
    )


async def _read_all(manifests: Manifests, attempts: list[str]) -> list[Noted] | None:
    """All of them; None if one vanished."""
    found = []
    for attempt in attempts:
        noted = await manifests.read(attempt)
        if noted is None:
            return None
        found.append(noted)
    return found
