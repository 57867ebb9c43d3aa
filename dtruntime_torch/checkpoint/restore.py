"""A load, agreed by all ranks: the leader picks a commit, everyone reads and checks it, all apply it together.

Nothing of the state is touched before every rank has read all that it needs and every digest agreed, so that a
damaged or foreign checkpoint changes nothing. The price is host memory for what a rank needs, once.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from dtruntime_torch import errors
from dtruntime_torch.barrier import Barrier
from dtruntime_torch.checkpoint import catalog
from dtruntime_torch.checkpoint.arguments import check_step
from dtruntime_torch.checkpoint.contents import Contents, read_contents
from dtruntime_torch.checkpoint.info import CheckpointInfo
from dtruntime_torch.checkpoint.load_plan import SavedState, whole_specs
from dtruntime_torch.checkpoint.manifest import Commit
from dtruntime_torch.checkpoint.names import CommitKey
from dtruntime_torch.checkpoint.targets import Targets, Wanted, bind_targets, build_state
from dtruntime_torch.errors import (
    CheckpointMismatch,
    CorruptCheckpoint,
    Damage,
    InvalidArgument,
    LoadFailed,
    NotFound,
)
from dtruntime_torch.membership import Membership
from dtruntime_torch.storage import StorageBackend, run_sync

logger = logging.getLogger(__name__)

# A round is lost only to damage, or to somebody who prunes meanwhile.
MAX_ROUNDS = 1000


@dataclass(frozen=True, slots=True)
class Loaded:
    """How a load ended.

    Attributes:
        info: the checkpoint that was loaded.
        newest: the newest commit that there was when it was picked.
    """

    info: CheckpointInfo
    newest: CommitKey


@dataclass(slots=True)
class Attempted:
    """What one rank made of the commit that was picked."""

    report: dict[str, Any]
    targets: Targets | None = None
    contents: Contents | None = None
    error: Exception | None = field(default=None)


def load(
    backend: StorageBackend, name: str, members: Membership, state: object, step: int | None, key: str
) -> Loaded:
    """Fills `state` from the newest sound checkpoint, or from the newest generation's of `step`.

    Every rank of `members` calls it, and on every rank it ends the same way.

    Args:
        backend: where the checkpoints lie.
        name: under which name.
        members: the ranks that load together.
        state: filled in place.
        step: which step, without falling back to another; None for the newest sound one.
        key: prefix of this load in the Store.

    Raises:
        CheckpointNotFound: nothing is committed, or not that step.
        CorruptCheckpoint: no sound checkpoint is left, or that step is damaged.
        CheckpointMismatch: names, shapes or dtypes differ from the state's; nothing was changed.
        LoadFailed: ranks failed for other reasons. Where all of them raised one error of ours, it is raised as such.
    """
    with _warning_later(speak=members.rank == 0) as notes:
        rejected: set[CommitKey] = set()
        for attempt in range(MAX_ROUNDS):
            loaded = _load_one(backend, name, members, state, step, f"{key}/{attempt}", rejected, notes)
            if loaded is not None:
                return loaded
    raise LoadFailed(f"checkpoints of {name} kept vanishing while they were read; who prunes them?")


def load_fresh(
    backend: StorageBackend, name: str, step: int | None, rank: int
) -> tuple[object, CheckpointInfo]:
    """Reads a whole checkpoint on this process alone; which one is chosen as in `load`.

    Returns:
        A fresh state dict, or the bytes that were saved, and what it is.
    """
    with _warning_later(speak=True) as notes:
        rejected: set[CommitKey] = set()
        for _ in range(MAX_ROUNDS):
            commit = Commit(**json.loads(_pick(backend, name, step, rejected, notes))["commit"])
            try:
                contents = run_sync(read_contents(backend, commit, rank, _want_everything))
            except CorruptCheckpoint as error:
                if run_sync(_is_committed(backend, name, commit)):
                    _reject(commit, step, rejected, notes, str(error), error.damage)
                continue
            state = build_state(contents.saved, contents.tensors, contents.values)
            return state, CheckpointInfo.of(contents.manifest, commit.manifest_sha256)
    raise LoadFailed(f"checkpoints of {name} kept vanishing while they were read; who prunes them?")


def _load_one(
    backend: StorageBackend,
    name: str,
    members: Membership,
    state: object,
    step: int | None,
    key: str,
    rejected: set[CommitKey],
    notes: list[str],
) -> Loaded | None:
    """Tries one commit together; None if another one has to be tried."""
    barrier = members.barrier
    picked = json.loads(barrier.announce(f"{key}/pick", lambda: _pick(backend, name, step, rejected, notes)))
    commit, newest = Commit(**picked["commit"]), CommitKey(*picked["newest"])
    with _declining(barrier, f"{key}/read"):
        mine = _attempt(backend, commit, members.rank, state, step, picked["asked"])
    report = json.dumps(mine.report).encode()
    answer = barrier.meet(f"{key}/read", report, lambda values: _judge(backend, name, commit, values))
    verdict = json.loads(answer)
    if verdict["verdict"] == "apply":
        _apply_together(barrier, f"{key}/apply", mine)
        assert mine.contents is not None
        return Loaded(CheckpointInfo.of(mine.contents.manifest, commit.manifest_sha256), newest)
    if verdict["verdict"] == "differs":
        raise CheckpointMismatch(verdict["message"])
    if verdict["verdict"] == "failed":
        raise errors.from_record(verdict, LoadFailed) from mine.error
    if verdict["verdict"] == "older":
        _reject(commit, step, rejected, notes, verdict["message"], [Damage(**d) for d in verdict["damage"]])
    return None


@contextmanager
def _warning_later(speak: bool) -> Iterator[list[str]]:
    """Collects what to warn of and does so at the end: where warnings are errors, no rank is left alone half-way."""
    notes: list[str] = []
    try:
        yield notes
    finally:
        for note in notes if speak else ():
            warnings.warn(note, RuntimeWarning, stacklevel=5)


@contextmanager
def _declining(barrier: Barrier, key: str) -> Iterator[None]:
    """Tells the other ranks if this one is interrupted, so that none waits for it in vain."""
    try:
        yield
    except BaseException as error:
        barrier.decline(key, error)
        raise


def _reject(
    commit: Commit,
    step: int | None,
    rejected: set[CommitKey],
    notes: list[str],
    message: str,
    damage: Sequence[Damage],
) -> None:
    """Falls back to an older commit, or not at all where a step was asked for by number."""
    if step is not None:
        raise CorruptCheckpoint(message, damage)
    rejected.add(commit.key)
    notes.append(f"{message}; going on with the checkpoint before it")


def _want_everything(saved: SavedState) -> Wanted:
    return Wanted(tensors=whole_specs(saved), objects=tuple(saved.objects), differences=(), unexpected=())


def _pick(
    backend: StorageBackend, name: str, step: int | None, rejected: Set[CommitKey], notes: list[str]
) -> bytes:
    """Chooses the newest commit that was not rejected; on the leader."""
    step = None if step is None else check_step(step)
    commit, newest = run_sync(catalog.pick(backend, name, step, rejected, notes))
    return json.dumps({"commit": asdict(commit), "newest": newest, "asked": step}).encode()


def _attempt(
    backend: StorageBackend, commit: Commit, rank: int, state: object, step: object, asked: int | None
) -> Attempted:
    """Reads and checks what this rank needs; whatever goes wrong becomes its report."""
    try:
        if (None if step is None else check_step(step)) != asked:
            raise InvalidArgument(f"it asks for step {step}, rank 0 for {asked}; give all ranks the same")
        targets = bind_targets(state)
        contents = run_sync(read_contents(backend, commit, rank, targets.want))
        if not contents.wanted.differences:
            targets.check(contents.tensors, contents.values)
    except CorruptCheckpoint as error:
        damage = [asdict(d) for d in error.damage]
        return Attempted({"kind": "damaged", "message": str(error), "damage": damage}, error=error)
    except Exception as error:
        logger.debug("step %d could not be loaded", commit.step, exc_info=True)
        return Attempted({"kind": "failed", **errors.to_record(error)}, error=error)
    report = {
        "kind": "differs" if contents.wanted.differences else "sound",
        "differences": contents.wanted.differences,
        "unexpected": contents.wanted.unexpected,
    }
    return Attempted(report, targets, contents)


def _judge(backend: StorageBackend, name: str, commit: Commit, values: Sequence[bytes]) -> bytes:
    """Decides for all ranks, once all have reported; on the leader."""
    reports = [json.loads(value) for value in values]
    failed = [
        f"rank {r}: {report['message']}" for r, report in enumerate(reports) if report["kind"] == "failed"
    ]
    damaged = [report for report in reports if report["kind"] == "damaged"]
    if failed:
        kinds = {report["type"] for report in reports if report["kind"] == "failed"}
        message = f"step {commit.step} of {name} could not be loaded: {'; '.join(failed)}"
        return _verdict("failed", message, kind=kinds.pop() if len(kinds) == 1 else "")
    if damaged:
        if not run_sync(_is_committed(backend, name, commit)):
            return _verdict("again")
        damage = list({json.dumps(d): d for report in damaged for d in report["damage"]}.values())
        return _verdict("older", damaged[0]["message"], damage)
    differences = _differences(reports)
    if differences:
        lines = "\n  ".join(differences)
        advice = "to take a part of it, use load_checkpoint() and load_state_dict(strict=False)"
        return _verdict(
            "differs", f"step {commit.step} of {name} does not fit the state ({advice}):\n  {lines}"
        )
    return _verdict("apply")


def _differences(reports: Sequence[dict[str, Any]]) -> list[str]:
    """All differences, each once. A name of the checkpoint is unexpected if no rank has a place for it."""
    lines = dict.fromkeys(line for report in reports for line in report["differences"])
    unexpected = set.intersection(*(set(report["unexpected"]) for report in reports))
    return [*lines, *(f"{fqn}: in the checkpoint, not in the state" for fqn in sorted(unexpected))]


def _verdict(verdict: str, message: str = "", damage: Sequence[dict[str, Any]] = (), kind: str = "") -> bytes:
    record = {"verdict": verdict, "type": kind, "message": message, "damage": list(damage)}
    return json.dumps(record).encode()


async def _is_committed(backend: StorageBackend, name: str, commit: Commit) -> bool:
    """Whether it is still there: what a prune took away meanwhile is not damaged."""
    try:
        return await catalog.read_commit(backend, name, commit.key) == commit
    except NotFound:
        return False
    except CorruptCheckpoint:
        return True


def _apply_together(barrier: Barrier, key: str, mine: Attempted) -> None:
    """Fills the state on all ranks; returns when all have succeeded."""
    assert mine.targets is not None and mine.contents is not None
    failure: Exception | None = None
    with _declining(barrier, key):
        try:
            mine.targets.apply(mine.contents.tensors, mine.contents.values)
        except Exception as error:
            failure = error
    message = "" if failure is None else errors.to_record(failure)["message"]

    def collect(values: Sequence[bytes]) -> bytes:
        return "; ".join(f"rank {r}: {v.decode()}" for r, v in enumerate(values) if v).encode()

    failures = barrier.meet(key, message.encode(), collect).decode()
    if failures:
        raise LoadFailed(f"the state could not be filled: {failures}") from failure
