"""What is committed under a name, read and checked along the chain of hashes: commit, manifest, part.

Nothing is decoded before its hash was compared, except the commit itself: that one is bound to its own name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import NoReturn, TypeVar

from dtruntime_torch.checkpoint import names
from dtruntime_torch.checkpoint.format.checks import is_own
from dtruntime_torch.checkpoint.manifest import (
    Commit,
    Manifest,
    Part,
    decode_commit,
    decode_generation,
    decode_manifest,
    decode_part,
)
from dtruntime_torch.checkpoint.names import Attempt, CommitKey
from dtruntime_torch.errors import (
    CheckpointNotFound,
    CorruptCheckpoint,
    Damage,
    NewerFormat,
    NotFound,
    StorageError,
)
from dtruntime_torch.storage.backend import Entry, StorageBackend
from dtruntime_torch.storage.rereads import UNREADABLE, is_unreadable, reread

R = TypeVar("R")

# Between a listing and a read a prune may take a commit; that it does so each time is not plausible.
MAX_LISTINGS = 10


async def commit_keys(backend: StorageBackend, name: str) -> list[CommitKey]:
    """Lists the commits of a checkpoint, the void ones among them, in ascending order.

    Args:
        backend: where it lies.
        name: of the checkpoint.
    """
    listed = await backend.list(names.commits_folder(name))
    found = (names.parse_commit(entry.path) for entry in listed)
    return sorted(key for key in found if key is not None)


async def generations(backend: StorageBackend, name: str) -> list[int]:
    """Lists the numbers of the generations that were claimed, in ascending order.

    Args:
        backend: where the checkpoint lies.
        name: of the checkpoint.
    """
    listed = await backend.list(names.generations_folder(name))
    found = (names.parse_generation(entry.path) for entry in listed)
    return sorted(number for number in found if number is not None)


async def attempt_files(backend: StorageBackend, name: str) -> dict[str, list[Entry]]:
    """Lists what lies in the folder of each attempt: its path, relative to the checkpoint's -> its files.

    Args:
        backend: where the checkpoint lies.
        name: of the checkpoint.
    """
    return _by_attempt(name, await backend.list(names.attempts_prefix(name)))


async def last_try(backend: StorageBackend, name: str, key: CommitKey) -> int:
    """The highest number of an attempt to save this step of this generation that has files; 0 if none has."""
    folder = names.attempt_path(name, Attempt(*key, 1)).rpartition("/")[0]
    listed = _by_attempt(name, await backend.list(f"{folder}/"))
    attempts = [attempt for attempt in map(names.parse_attempt, listed) if attempt is not None]
    return max((attempt.number for attempt in attempts if attempt.key == key), default=0)


async def unfinished_files(backend: StorageBackend, name: str) -> dict[str, list[Entry]]:
    """Lists what writes left behind that never ended, as `attempt_files` does."""
    return _by_attempt(name, await backend.unfinished(names.attempts_prefix(name)))


async def manifests(backend: StorageBackend, name: str) -> list[str]:
    """Lists the attempts that have a manifest, committed or not, by their paths and in their order."""
    listed = await attempt_files(backend, name)
    return [attempt for attempt, files in listed.items() if has_manifest(files)]


def has_manifest(files: Sequence[Entry]) -> bool:
    """Whether there is a manifest among the files of an attempt."""
    return any(file.path.endswith(f"/{names.MANIFEST}") for file in files)


async def read_commit(backend: StorageBackend, name: str, key: CommitKey) -> Commit:
    """Reads a commit; it may be void.

    Raises:
        NotFound: there is no such commit, or no longer.
        CorruptCheckpoint: it is no commit, or that of another place.
    """
    path = names.commit_path(name, key)
    data = await read_record(backend, path)
    commit = decode_commit(data, path)
    _check_repeats(path, len(data), (name, *key), (commit.name, *commit.key))
    return commit


async def read_record(backend: StorageBackend, path: str) -> bytes:
    """Reads a whole commit, manifest, part or generation.

    Raises:
        NotFound: it is not there, or no longer.
        CorruptCheckpoint: it is, but the device cannot read it.
    """
    try:
        return bytes(await reread(partial(backend.read, path)))
    except StorageError as error:
        if not is_unreadable(backend, error):
            raise
        raise _damaged(Damage(path, None, 0, await _size(backend, path), "a file", UNREADABLE)) from error


async def is_still_committed(backend: StorageBackend, commit: Commit) -> bool:
    """Whether what was read as this commit is there yet: not removed, void or another's.

    Raises:
        CorruptCheckpoint: what is there now is damaged; what that means, the caller knows.
    """
    try:
        return await read_commit(backend, commit.name, commit.key) == commit
    except NotFound:
        return False


async def read_manifest(backend: StorageBackend, commit: Commit) -> Manifest:
    """Reads the manifest that a commit, not a void one, names.

    Raises:
        CorruptCheckpoint: it is missing, is not the one that was committed, or contradicts itself or the commit.
    """
    path = f"{commit.name}/{commit.attempt}/{names.MANIFEST}"
    data = await _read(backend, path)
    _check_sha256(path, data, commit.manifest_sha256)
    manifest = decode_manifest(data, path)
    _check_repeats(
        path,
        len(data),
        (commit.name, *commit.key, commit.attempt),
        (manifest.name, *manifest.key, manifest.attempt),
    )
    return manifest


async def read_part(backend: StorageBackend, manifest: Manifest, rank: int) -> Part:
    """Reads the part manifest of one of the ranks that saved.

    Raises:
        CorruptCheckpoint: it is missing, is not the one that was committed, or contradicts itself or the manifest.
    """
    ref = manifest.parts[rank]
    path = f"{manifest.name}/{manifest.attempt}/{ref.path}"
    await _check_length(backend, path, ref.length)
    data = await _read(backend, path)
    _check_sha256(path, data, ref.sha256)
    part = decode_part(data, path)
    _check_repeats(
        path,
        len(data),
        (*manifest.key, manifest.attempt, manifest.world_size, rank),
        (part.generation, part.step, part.attempt, part.world_size, part.rank),
    )
    _check_files(path, len(data), manifest, part)
    return part


async def newest_key(backend: StorageBackend, name: str) -> CommitKey | None:
    """Returns the key of the greatest commit that is not void; one that cannot be read counts as not void.

    A save orders itself by this: damage may not stop it, nor let it pass for the first one.
    """

    async def choose(keys: Sequence[CommitKey]) -> CommitKey | None:
        return await _newest_of(backend, name, keys)

    return await _look(backend, name, choose)


async def pick(
    backend: StorageBackend,
    name: str,
    step: int | None,
    rejected: Mapping[CommitKey, Sequence[Damage]],
    notes: list[str],
) -> tuple[Commit, CommitKey]:
    """Chooses what to load. A commit that cannot be read, or of a run that is not the generation's, is passed over.

    Args:
        backend: where the checkpoint lies.
        name: of the checkpoint.
        step: None for the newest commit; else the newest generation's of that step, with no falling back.
        rejected: commits that turned out to be damaged, and where.
        notes: where to add, once, what the user has to be warned of.

    Returns:
        The commit, and what `newest_key` returns.

    Raises:
        CheckpointNotFound: nothing is committed, or nothing at that step.
        CorruptCheckpoint: all that is committed is damaged, or what is committed at that step; with that damage.
    """

    async def choose(keys: Sequence[CommitKey]) -> tuple[Commit, CommitKey]:
        top = await _newest_of(backend, name, keys)
        if top is None:
            raise CheckpointNotFound(
                f"there is no checkpoint called {name} in {backend!r}; `dtruntime ls` lists what there is"
            )
        damage: list[Damage] = []
        for key in reversed(keys):
            if key in rejected or step not in (None, key.step):
                damage += rejected.get(key, ())
                continue
            commit = await _read_or_note(backend, name, key, None if step is not None else notes, damage)
            if commit is not None and not commit.void:
                return commit, top
        if step is not None:
            there = sorted({key.step for key in keys})
            steps = f"steps {there}" if len(there) <= 10 else f"{len(there)} steps, the newest {there[-10:]}"
            raise CheckpointNotFound(f"there is no checkpoint {name} of step {step}; there are {steps}")
        told = "`dtruntime verify --all` lists the damage" if damage else "the warnings say why"
        raise CorruptCheckpoint(f"no checkpoint called {name} can be loaded; {told}", damage)

    return await _look(backend, name, choose)


def _by_attempt(name: str, entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        attempt = entry.path.removeprefix(f"{name}/").rpartition("/")[0]
        if names.parse_attempt(attempt) is not None:
            found.setdefault(attempt, []).append(entry)
    return found


async def _look(
    backend: StorageBackend, name: str, choose: Callable[[Sequence[CommitKey]], Awaitable[R]]
) -> R:
    """Lists the commits and chooses among them; again if a prune may have taken one meanwhile.

    What it takes vanishes or turns void, and before that a newer one came: where none came, the choice stands.
    """
    listed = await commit_keys(backend, name)
    for _ in range(MAX_LISTINGS - 1):
        made = await _try(choose, listed)
        again = await commit_keys(backend, name)
        if made is not None and again == listed:
            return made()
        listed = again
    return await choose(listed)


async def _try(
    choose: Callable[[Sequence[CommitKey]], Awaitable[R]], listed: Sequence[CommitKey]
) -> Callable[[], R] | None:
    """What returns the choice, or raises why there is none; None if a commit has vanished."""
    try:
        chosen = await choose(listed)
    except NotFound:
        return None
    except (CheckpointNotFound, CorruptCheckpoint) as error:
        return partial(_raise, error)
    return lambda: chosen


def _raise(error: Exception) -> NoReturn:
    raise error


async def _newest_of(backend: StorageBackend, name: str, keys: Sequence[CommitKey]) -> CommitKey | None:
    for key in reversed(keys):
        try:
            void = (await read_commit(backend, name, key)).void
        except CorruptCheckpoint:
            void = False
        if not void:
            return key
    return None


async def _read_or_note(
    backend: StorageBackend, name: str, key: CommitKey, notes: list[str] | None, damage: list[Damage]
) -> Commit | None:
    """Reads a commit; if it is damaged, which is added, or foreign, there is no falling back without notes."""
    try:
        commit = await read_commit(backend, name, key)
        await _check_run(backend, commit)
        return commit
    except CorruptCheckpoint as error:
        if notes is None:
            raise
        note = f"{error}; it is passed over"
        notes += [note] if note not in notes else []
        damage += error.damage
        return None


async def _check_run(backend: StorageBackend, commit: Commit) -> None:
    """Refuses what is of another run than its generation: copied in from another place, or that record is damaged."""
    if commit.void:
        return
    path = names.generation_path(commit.name, commit.generation)
    try:
        run_id = decode_generation(await read_record(backend, path), path).run_id
        manifest = await read_manifest(backend, commit)
    except (NotFound, CorruptCheckpoint, NewerFormat):
        # No load needs the record, and of a manifest the load will tell.
        return
    if manifest.run_id != run_id:
        raise CorruptCheckpoint(
            f"{names.commit_path(commit.name, commit.key)} is of run {manifest.run_id}, and {path} says run {run_id}: "
            f"either the checkpoint was copied in (copy it to a folder of its own to load it), or {path} is damaged "
            f"(delete that file to load it)"
        )


async def _read(backend: StorageBackend, path: str) -> bytes:
    try:
        return await read_record(backend, path)
    except NotFound as error:
        raise _damaged(Damage(path, None, 0, 0, "a file", "missing")) from error


async def _size(backend: StorageBackend, path: str) -> int:
    """For a report; 0 where it is not known."""
    try:
        return await backend.size(path)
    except StorageError:
        return 0


async def _check_length(backend: StorageBackend, path: str, length: int) -> None:
    """Before a byte is read, so that nothing is allocated for a file that has grown."""
    try:
        size = await reread(partial(backend.size, path))
    except NotFound as error:
        raise _damaged(Damage(path, None, 0, 0, "a file", "missing")) from error
    except StorageError as error:
        if not is_unreadable(backend, error):
            raise
        raise _damaged(Damage(path, None, 0, length, f"{length} bytes", UNREADABLE)) from error
    if size != length:
        start, stop = sorted((size, length))
        raise _damaged(Damage(path, None, start, stop, f"{length} bytes", f"{size} bytes"))


def _check_sha256(path: str, data: bytes, expected: str) -> None:
    actual = hashlib.sha256(data).hexdigest()
    if actual != expected:
        raise _damaged(Damage(path, None, 0, len(data), f"SHA-256 {expected}", f"SHA-256 {actual}"))


def _check_repeats(path: str, length: int, expected: tuple[object, ...], actual: tuple[object, ...]) -> None:
    if actual != expected:
        raise _damaged(Damage(path, None, 0, length, f"that of {expected}", f"that of {actual}"))


def _check_files(path: str, length: int, manifest: Manifest, part: Part) -> None:
    """What a part uses must be what the manifest protects from being deleted, and what it says was written."""
    used = {file.path.rpartition("/")[0] for file in part.files}
    if not used <= set(manifest.uses):
        raise _damaged(Damage(path, None, 0, length, f"files of {manifest.uses}", f"files of {sorted(used)}"))
    written = sum(file.length for file in part.files if is_own(file, part.attempt))
    promised = manifest.parts[part.rank].data_length
    if written != promised:
        raise _damaged(Damage(path, None, 0, length, f"a data file of {promised} bytes", f"of {written}"))


def _damaged(damage: Damage) -> CorruptCheckpoint:
    return CorruptCheckpoint(f"damaged: {damage}", [damage])
