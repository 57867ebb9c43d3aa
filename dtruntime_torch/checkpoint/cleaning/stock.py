"""What lies under a name: read and understood once, before anything is deleted."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from dtruntime_torch.checkpoint import catalog, names
from dtruntime_torch.checkpoint.cleaning.look import Manifests, Noted
from dtruntime_torch.checkpoint.format.strict_json import Newer
from dtruntime_torch.checkpoint.manifest import Commit
from dtruntime_torch.checkpoint.names import Attempt, CommitKey
from dtruntime_torch.errors import CleaningBlocked, CorruptCheckpoint, NotFound
from dtruntime_torch.storage.backend import StorageBackend


@dataclass(frozen=True, slots=True)
class Stock:
    """What lies under a name.

    Attributes:
        commits: those that are not void.
        manifests: attempt -> what its manifest says, of all that have one, committed or not.
        nbytes: attempt -> bytes in its folder.
        blocked: why nothing of it may be deleted.
    """

    commits: dict[CommitKey, Commit]
    manifests: dict[str, Noted]
    nbytes: dict[str, int]
    blocked: tuple[str, ...]


async def take_stock(
    backend: StorageBackend, name: str, manifests: Manifests, voids: set[CommitKey]
) -> Stock:
    """Reads what is committed, lists what is there, and finds out whether all of it is understood.

    Args:
        backend: where it lies.
        name: of the checkpoint.
        manifests: those that were read before.
        voids: commits that are known to be void, which they stay; more are added.

    Raises:
        StorageError: the storage failed.
    """
    # In this order: whoever commits meanwhile has written what it names before.
    commits, unreadable = await _read_commits(backend, name, voids)
    files = await catalog.attempt_files(backend, name)
    unfinished = await catalog.unfinished_files(backend, name)
    blocked = [_advise(name, key, why, files.keys() | unfinished.keys()) for key, why in unreadable.items()]
    manifests.forget_others(files)
    noted: dict[str, Noted] = {}
    hidden: set[str] = set()
    committed = {commit.attempt: commit.manifest_sha256 for commit in commits.values()}
    for attempt in (attempt for attempt, listed in files.items() if catalog.has_manifest(listed)):
        try:
            one = await manifests.read(attempt, committed.get(attempt))
        except CleaningBlocked as error:
            blocked.append(str(error))
            hidden.add(attempt)
        else:
            noted |= {} if one is None else {attempt: one}
    for commit in commits.values():
        if commit.attempt not in hidden:
            blocked += await _check(backend, manifests, commit, commit.attempt in noted)
    nbytes = {
        attempt: sum(entry.size for entry in (*files.get(attempt, ()), *unfinished.get(attempt, ())))
        for attempt in sorted(files.keys() | unfinished.keys())
    }
    return Stock(commits, noted, nbytes, tuple(dict.fromkeys(blocked)))


async def _read_commits(
    backend: StorageBackend, name: str, voids: set[CommitKey]
) -> tuple[dict[CommitKey, Commit], dict[CommitKey, str]]:
    """Those that can be read, and why the others cannot, as the beginning of an advice."""
    commits, unreadable = {}, {}
    for key in await catalog.commit_keys(backend, name):
        if key in voids:
            continue
        try:
            commit = await catalog.read_commit(backend, name, key)
        except NotFound:
            continue
        except CorruptCheckpoint as error:
            # A commit has no digest, so that one of a later version cannot be told from a damaged one.
            newer = isinstance(error.__cause__, Newer)
            unreadable[key] = f"{error}. If that does not help, give" if newer else f"{error}. Give"
            continue
        if commit.void:
            voids.add(key)
        else:
            commits[key] = commit
    return commits, unreadable


def _advise(name: str, key: CommitKey, why: str, attempts: Collection[str]) -> str:
    """What to do about a commit that cannot be read: which try it is of, it does not tell."""
    parsed = [attempt for attempt in map(names.parse_attempt, attempts) if attempt is not None]
    tries = sorted(attempt.number for attempt in parsed if attempt.key == key) or [1]
    drops = ", or ".join(f"`dtruntime drop PATH {name} {Attempt(*key, number).path}`" for number in tries)
    return f"nothing of {name} is deleted, for a commit cannot be read: {why} its attempt up with {drops}"


async def _check(backend: StorageBackend, manifests: Manifests, commit: Commit, is_there: bool) -> list[str]:
    """What keeps a commit from being understood, whose manifest is missing or could be read."""
    if is_there:
        try:
            await manifests.check(commit)
        except CleaningBlocked as error:
            return [str(error)]
        return []
    if not await catalog.is_still_committed(backend, commit):
        return []
    path = names.manifest_path(commit.name, commit.attempt)
    return [str(manifests.blocked(commit.attempt, f"{path}, which is committed, is missing"))]
