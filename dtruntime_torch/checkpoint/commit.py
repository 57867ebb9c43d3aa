"""The only place that makes a checkpoint exist: generations give incarnations an order, a commit file is the point.

`commit_model.py`, beside the design, walks every interleaving of these calls. What it asks for here: the manifest,
which is the intent, before the commit; and an unknown outcome is never guessed. An unanswered create is sent again:
it succeeds, or finds what is there, and only what a create has found is known to be durable, so that reading our
own commit there means that we won.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Literal, TypeVar

from dtruntime_torch.checkpoint import catalog, names
from dtruntime_torch.checkpoint.manifest import (
    Commit,
    Generation,
    Manifest,
    decode_commit,
    decode_generation,
    encode_commit,
    encode_generation,
    encode_manifest,
)
from dtruntime_torch.checkpoint.names import CommitKey
from dtruntime_torch.errors import (
    AlreadyExists,
    CommitConflict,
    CorruptCheckpoint,
    StorageError,
    UnsuitableStorage,
)
from dtruntime_torch.retry import is_lasting
from dtruntime_torch.storage.backend import StorageBackend

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Patience:
    """How long an outcome is asked for while storage does not tell.

    Attributes:
        seconds: after these no further create is sent.
        call_seconds: after these a call counts as unanswered, whatever becomes of it.
        pause: seconds before the second try; doubles from try to try, up to 2.
        clock: seconds that only rise.
        sleep: waits so many seconds.
    """

    seconds: float = 60.0
    call_seconds: float = 30.0
    pause: float = 0.05
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[object]] = asyncio.sleep


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a commit went.

    Attributes:
        kind: "committed"; "aborted": never, for no create was sent; "stale": never, for the parent of this delta is
            no longer committed, and no create was sent; "lost": never, for something else is there; "unknown":
            storage did not say in time, and the attempt may be committed now or later.
        message: why, "" if committed.
        manifest_sha256: in hex.
        answered: no create that was sent can take effect any more.
    """

    kind: Literal["committed", "aborted", "stale", "lost", "unknown"]
    message: str
    manifest_sha256: str
    answered: bool = True


async def claim_generation(
    backend: StorageBackend,
    name: str,
    run_id: str,
    seen: CommitKey | None,
    loaded: bool,
    step: int,
    patience: Patience = Patience(),
) -> int:
    """Claims the next generation for an incarnation that is about to save.

    Args:
        backend: where the checkpoint lies.
        name: of the checkpoint.
        run_id: of the incarnation.
        seen: what `catalog.newest_key` gave when it loaded.
        loaded: whether it loaded anything. If not, it may only save above the newest step.
        step: that it is about to save.
        patience: with unknown outcomes.

    Returns:
        A number above all that were claimed before.

    Raises:
        CommitConflict: the newest commit is not the one that it goes on from; nothing was written.
        StorageError: the claim could not be made; a number may have been used up.
    """
    refused = 0
    while True:
        # In this order: whoever claims and commits between the two listings takes the number.
        claimed = await catalog.generations(backend, name)
        newest = await catalog.newest_key(backend, name)
        await _check_newest(backend, name, newest, seen, loaded, step)
        generation = max([refused, *claimed, newest.generation if newest else 0]) + 1
        if await _claim(backend, name, generation, run_id, patience):
            return generation
        refused = generation


async def check_not_replaced(backend: StorageBackend, name: str, generation: int) -> None:
    """Refuses to go on once a later incarnation has claimed a generation.

    Raises:
        CommitConflict: it has; the message says who.
    """
    latest = max(await catalog.generations(backend, name), default=generation)
    if latest > generation:
        who = await _describe(backend, name, latest)
        raise CommitConflict(
            f"this job (generation {generation} of {name!r}) was replaced by {who}, which saves there now; stop "
            f"this one, or give one of them another name"
        )


async def commit(
    backend: StorageBackend,
    manifest: Manifest,
    patience: Patience = Patience(),
    parent: Commit | None = None,
) -> Outcome:
    """Writes the manifest, then creates the commit file. Called once for an attempt, when its parts are durable.

    Args:
        backend: where to.
        manifest: of the attempt.
        patience: with unknown outcomes.
        parent: of a delta, the commit whose files it uses: that must still be there once the manifest protects them.

    Returns:
        How it went. Only an aborted attempt has its manifest deleted again.
    """
    data = encode_manifest(manifest)
    sha256 = hashlib.sha256(data).hexdigest()
    path = f"{manifest.name}/{manifest.attempt}/{names.MANIFEST}"
    try:
        await asyncio.wait_for(backend.write(path, data), patience.call_seconds)
    except Exception as error:
        message = f"the manifest {path} could not be written: {error!r}"
        return Outcome("aborted", message + await _delete_again(backend, path, patience), sha256)
    if parent is not None and not await _is_still_committed(backend, parent, patience):
        message = (
            f"step {parent.step}, whose files step {manifest.step} of {manifest.name!r} was to use, is gone"
        )
        return Outcome("stale", message, sha256)
    ours = Commit(manifest.name, *manifest.key, manifest.attempt, sha256)
    path = names.commit_path(manifest.name, manifest.key)
    try:
        there, answered = await _make_sure(backend, path, encode_commit(ours), decode_commit, patience)
    except (StorageError, CorruptCheckpoint) as error:
        message = f"step {manifest.step} of {manifest.name!r} may be committed or not, nothing was deleted"
        return Outcome("unknown", f"{message}: {error}", sha256, answered=False)
    if there == ours:
        return Outcome("committed", "", sha256, answered)
    by = "is void: a later job swept it" if there.void else f"is that of {there.attempt}"
    message = f"step {manifest.step} of {manifest.name!r} cannot be committed, {path} {by}"
    return Outcome("lost", f"{message}; load the newest checkpoint to go on from there", sha256, answered)


async def forbid(
    backend: StorageBackend, name: str, key: CommitKey, patience: Patience = Patience()
) -> Commit:
    """Makes sure that nothing is committed under a key any more, unless something is already.

    Args:
        backend: where the checkpoint lies.
        name: of the checkpoint.
        key: of the commit.
        patience: with unknown outcomes.

    Returns:
        What is there, and durable: a void, or what was committed before.

    Raises:
        StorageError: what is there was not known in time.
        CorruptCheckpoint: what is there is no commit.
    """
    void = Commit(name, *key, "", "", void=True)
    path = names.commit_path(name, key)
    there, _ = await _make_sure(backend, path, encode_commit(void), decode_commit, patience)
    return there


async def _claim(
    backend: StorageBackend, name: str, generation: int, run_id: str, patience: Patience
) -> bool:
    created = datetime.now(timezone.utc).isoformat(timespec="microseconds")
    ours = Generation(generation, run_id, socket.gethostname(), os.getpid(), created)
    path = names.generation_path(name, generation)
    data = encode_generation(ours)
    try:
        # Its time, to the microsecond, tells it from a claim that this very run made before.
        # It promises nothing yet, so a place that refuses it need not be asked again.
        there, _ = await _make_sure(backend, path, data, decode_generation, patience, is_lasting)
        return there == ours
    except CorruptCheckpoint:
        return False


async def _make_sure(
    backend: StorageBackend,
    path: str,
    data: bytes,
    decode: Callable[[bytes, str], R],
    patience: Patience,
    gives_up: Callable[[Exception], bool] = lambda error: isinstance(error, UnsuitableStorage),
) -> tuple[R, bool]:
    """Creates the file unless there is one; returns what is there, and durable, then, and whether all creates ended.

    Args:
        backend: where to.
        path: of the file.
        data: what is in it.
        decode: reads what is there.
        patience: with unknown outcomes.
        gives_up: whether an error ends it at once.

    Raises:
        StorageError: that is not known at the deadline.
        CorruptCheckpoint: what is there cannot be decoded.
        Exception: whatever `gives_up` accepts.
    """
    began = patience.clock()
    pause, sent = patience.pause, 0
    unknown: Exception | None = None
    while True:
        sent += 1
        try:
            there = await _create_or_find(backend, path, data, patience)
        except Exception as error:
            if gives_up(error):
                raise
            unknown = error
        else:
            return decode(there, path), unknown is None
        waited = patience.clock() - began
        if waited >= patience.seconds:
            tried = f"tried {sent} times in {waited:.1f} s" if sent > 1 else "tried once"
            raise StorageError(f"{path} could not be created, {tried}: {_reason(unknown)}") from unknown
        await patience.sleep(pause)
        pause = min(2 * pause, 2.0)


def _reason(error: Exception) -> str:
    return str(error) or "no answer in time"


async def _create_or_find(backend: StorageBackend, path: str, data: bytes, patience: Patience) -> bytes:
    try:
        await asyncio.wait_for(backend.create(path, data), patience.call_seconds)
    except AlreadyExists:
        return bytes(await asyncio.wait_for(backend.read(path), patience.call_seconds))
    return data


async def _is_still_committed(backend: StorageBackend, parent: Commit, patience: Patience) -> bool:
    """Whether it is surely there: where that cannot be told, a full save is the safe answer."""
    try:
        return await asyncio.wait_for(catalog.is_still_committed(backend, parent), patience.call_seconds)
    except Exception:
        return False


async def _delete_again(backend: StorageBackend, path: str, patience: Patience) -> str:
    try:
        await asyncio.wait_for(backend.delete(path), patience.call_seconds)
    except Exception as error:
        return f"; nor could what there may be of it be deleted: {error!r}"
    return ""


async def _check_newest(
    backend: StorageBackend,
    name: str,
    newest: CommitKey | None,
    seen: CommitKey | None,
    loaded: bool,
    step: int,
) -> None:
    if loaded and newest is not None and seen is not None and newest <= seen:
        return  # below what was seen, where that was dropped since: nobody has gone on from there
    if not loaded and (newest is None or step > newest.step):
        return
    if newest is None:
        raise CommitConflict(f"the checkpoints of {name!r} from which this job goes on are gone; load again")
    who = await _describe(backend, name, newest.generation)
    if loaded:
        raise CommitConflict(
            f"since this job loaded {name!r}, {who} has committed step {newest.step}; load again to go on from "
            f"there, or save under another name"
        )
    raise CommitConflict(
        f"step {step} of {name!r} would come after step {newest.step}, committed by {who}; load that first to go "
        f"on from there, or save under another name, or save a step above {newest.step}"
    )


async def _describe(backend: StorageBackend, name: str, generation: int) -> str:
    path = names.generation_path(name, generation)
    try:
        record = decode_generation(bytes(await backend.read(path)), path)
    except (OSError, CorruptCheckpoint):
        return f"generation {generation} (its record cannot be read)"
    return f"generation {generation} (process {record.pid} on {record.host}, since {record.created})"
