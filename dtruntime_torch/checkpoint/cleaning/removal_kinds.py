"""The four reasons why something goes, and how each makes sure that it is not committed and has no manifest any more.

`Prune`: retention does not keep it. `Sweep`: an older generation left it. `GivenUp`: its own leader lost it. `Drop`: a
user names it. The order is that of the commit's protocol: the commit, then the manifest. A commit whose creation may
still be under way is not removed, since it would come back: a void takes its place. The files go later, in `removals`,
once a look has shown that nothing names them: any of these may have been committed, used by a delta, and pruned.
"""

from __future__ import annotations

from dataclasses import dataclass

from dtruntime_torch.checkpoint import catalog, names
from dtruntime_torch.checkpoint.commit import Patience, forbid
from dtruntime_torch.checkpoint.manifest import Commit, encode_commit
from dtruntime_torch.checkpoint.names import Attempt
from dtruntime_torch.errors import CorruptCheckpoint
from dtruntime_torch.storage.backend import StorageBackend


@dataclass(slots=True)
class Prune:
    """Takes away what retention does not keep.

    Attributes:
        commit: which one.
        victims: the attempts that its manifest names.
        removable: no create of it can take effect any more.
        begun: whether it may be gone already.
    """

    commit: Commit
    victims: frozenset[str]
    removable: bool
    begun: bool = False

    async def clear(self, backend: StorageBackend, patience: Patience) -> bool:
        """Removes or voids the commit, then deletes the manifest; again where that failed before.

        Returns:
            False if it was no longer committed: whoever took it away cleans up.
        """
        if not self.begun and not await catalog.is_still_committed(backend, self.commit):
            return False
        self.begun = True
        if self.removable:
            await backend.delete(names.commit_path(self.commit.name, self.commit.key))
        else:
            await write_void(backend, self.commit.name, self.commit)
        await backend.delete(names.manifest_path(self.commit.name, self.commit.attempt))
        return True


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


@dataclass(slots=True)
class Drop:
    """Gives up an attempt that a user names, committed or not, damaged or not.

    Attributes:
        name: of the checkpoint.
        attempt: which one.
        victims: the attempts whose files it may have used.
        was_committed: whether there was a commit of it, or one that cannot be read.
    """

    name: str
    attempt: Attempt
    victims: frozenset[str]
    was_committed: bool = False

    async def clear(self, backend: StorageBackend, patience: Patience) -> bool:
        """Voids the commit, unless it is that of another attempt, then deletes the manifest; always True."""
        try:
            there = await forbid(backend, self.name, self.attempt.key, patience)
            ours = there.attempt == self.attempt.path
        except CorruptCheckpoint:
            ours = True
        if ours:
            self.was_committed = True
            await write_void(backend, self.name, self.attempt)
        await backend.delete(names.manifest_path(self.name, self.attempt.path))
        return True


async def write_void(backend: StorageBackend, name: str, what: Commit | Attempt) -> None:
    """Puts a void in the place of a commit."""
    void = Commit(name, *what.key, "", "", void=True)
    await backend.write(names.commit_path(name, what.key), encode_commit(void))
