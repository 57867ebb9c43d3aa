"""What attempts leave behind that are not committed: made impossible to commit, then deleted.

As with a prune the files go last, once a look has shown that nothing names them: an attempt may have been
committed, used by a delta, and pruned.
"""

from __future__ import annotations

from dataclasses import dataclass

from dtruntime_torch.checkpoint import names
from dtruntime_torch.checkpoint.commit import Patience, forbid
from dtruntime_torch.checkpoint.names import Attempt
from dtruntime_torch.storage.backend import StorageBackend


@dataclass(slots=True)
class Sweep:
    """Takes an attempt of an older generation.

    Attributes:
        name: of the checkpoint.
        attempt: which one. Its leader may be alive.
    """

    name: str
    attempt: Attempt

    @property
    def victims(self) -> frozenset[str]:
        """The attempt itself."""
        return frozenset({self.attempt.path})

    async def clear(self, backend: StorageBackend, patience: Patience) -> bool:
        """Voids its commit if there is none, then deletes its manifest; False if it is committed."""
        there = await forbid(backend, self.name, self.attempt.key, patience)
        if there.attempt == self.attempt.path:
            return False
        await backend.delete(names.manifest_path(self.name, self.attempt.path))
        return True


@dataclass(slots=True)
class GivenUp:
    """Takes an attempt that its own leader knows will never be committed, or no longer is.

    Attributes:
        name: of the checkpoint.
        attempt: which one.
    """

    name: str
    attempt: Attempt

    @property
    def victims(self) -> frozenset[str]:
        """The attempt itself."""
        return frozenset({self.attempt.path})

    async def clear(self, backend: StorageBackend, patience: Patience) -> bool:
        """Deletes its manifest; always True."""
        await backend.delete(names.manifest_path(self.name, self.attempt.path))
        return True


async def delete_files(backend: StorageBackend, name: str, attempt: str) -> None:
    """Deletes all that lies in the folder of an attempt, also what was never finished.

    Args:
        backend: where it lies.
        name: of the checkpoint.
        attempt: the path of the folder, relative to the checkpoint's.
    """
    folder = f"{name}/{attempt}/"
    for entry in await backend.list(folder):
        await backend.delete(entry.path)
    await backend.discard_unfinished(folder)
