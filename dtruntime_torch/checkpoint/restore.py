"""A load, agreed by all ranks: the leader picks a commit, everyone reads and checks its share, all fill together.

Nothing of the state is touched before all ranks know that names, shapes, dtypes and the lengths of the files fit. Then
contiguous tensors on the host are read straight into place, each chunk digested on the way; all else is read beside the
state, into memory that the ranks of a node share, and checked before that. Where a chunk is damaged, all ranks go to the
checkpoint before it, which fills the same tensors; if there is none, the error says that they hold parts of it. With
`all_or_nothing` everything is read beside the state, and nothing is touched before every digest agreed.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, TypeVar

from dtruntime_torch import errors
from dtruntime_torch.barrier import declining
from dtruntime_torch.checkpoint import catalog
from dtruntime_torch.checkpoint.arguments import check_keys, check_step
from dtruntime_torch.checkpoint.info import LoadedCheckpoint
from dtruntime_torch.checkpoint.loading import load_verdicts
from dtruntime_torch.checkpoint.loading.contents import read_alone, survey_contents
from dtruntime_torch.checkpoint.loading.load_plan import SavedState, lies_in, select, whole_specs
from dtruntime_torch.checkpoint.loading.load_round import Asked, LoadRound
from dtruntime_torch.checkpoint.loading.load_verdicts import Report, Verdict
from dtruntime_torch.checkpoint.loading.node_memory import share_memory
from dtruntime_torch.checkpoint.loading.targets import Wanted, build_state
from dtruntime_torch.checkpoint.manifest import Commit
from dtruntime_torch.checkpoint.names import CommitKey
from dtruntime_torch.errors import (
    CheckpointMismatch,
    CheckpointNotFound,
    CorruptCheckpoint,
    Damage,
    DTRuntimeError,
    InvalidArgument,
    LoadFailed,
)
from dtruntime_torch.membership import Membership
from dtruntime_torch.storage import StorageBackend, run_sync

# A round is lost only to damage, or to somebody who prunes meanwhile.
MAX_ROUNDS = 1000

R = TypeVar("R")

HALF_FILLED = "tensors of the state hold bytes of what could not be loaded: load something else into them, or build them anew"

# What turned out to be damaged, and where.
Rejected = dict[CommitKey, Sequence[Damage]]
OnDamage = Callable[[CommitKey], object]

# What a rank was asked for: step, keys, strict, all_or_nothing.
_Unchecked = tuple[int | None, Collection[str] | None, bool, bool]


@dataclass(frozen=True, slots=True)
class Loaded:
    """How a load ended.

    Attributes:
        info: the checkpoint that was loaded.
        newest: the newest commit that there was when it was picked.
    """

    info: LoadedCheckpoint
    newest: CommitKey


class _Picked(NamedTuple):
    """What the leader chose, and what it was asked for."""

    commit: Commit
    newest: CommitKey
    asked: Asked


def load(
    backend: StorageBackend,
    name: str,
    members: Membership,
    state: object,
    step: int | None,
    key: str,
    keys: Collection[str] | None = None,
    strict: bool = True,
    all_or_nothing: bool = False,
    on_damage: OnDamage | None = None,
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
        keys: fill only these names and what lies below them; None for all.
        strict: names that only the state or only the checkpoint has are an error.
        all_or_nothing: fill nothing before all that is read was checked.
        on_damage: called with each commit that all ranks agree is damaged, however the load ends.

    Raises:
        CheckpointNotFound: nothing is committed, or not that step.
        CorruptCheckpoint: no sound checkpoint is left, or that step is damaged.
        CheckpointMismatch: names, shapes or dtypes differ from the state's.
        LoadFailed: ranks failed for other reasons. Where all of them raised one error of ours, it is raised as such.
    """
    touched: set[str] = set()

    def attempt(number: int, rejected: Rejected, notes: list[str]) -> Loaded | None:
        one = _Load(backend, name, members, f"{key}/{number}")
        with _telling_what_is_touched(touched):
            try:
                return one.try_one(state, (step, keys, strict, all_or_nothing), rejected, notes, touched)
            except _Damaged as damaged:
                _reject(damaged, step, rejected, notes, on_damage)
                return None

    return _until_loaded(name, members.rank == 0, attempt)


def load_fresh(
    backend: StorageBackend,
    name: str,
    step: int | None,
    rank: int,
    keys: Collection[str] | None = None,
    on_damage: OnDamage | None = None,
) -> object:
    """Reads a checkpoint, or the names of it that are given, on this process alone; which one is chosen as in `load`.

    Returns:
        A fresh state dict, or the bytes that were saved. Its tensors share the memory that was read into.
    """
    chosen = check_keys(keys)

    def attempt(number: int, rejected: Rejected, notes: list[str]) -> tuple[object] | None:
        commit = _pick(
            backend, name, Asked(step, chosen, strict=True, all_or_nothing=False), rejected, notes
        ).commit
        try:
            contents = run_sync(
                survey_contents(backend, commit, rank, lambda saved: _want_all(saved, chosen))
            )
            if contents.wanted.differences:
                lines = "; ".join(contents.wanted.differences)
                raise CheckpointMismatch(f"step {commit.step} of {name}: {lines}")
            tensors = dict(contents.tensors(run_sync(read_alone(backend, contents))))
        except CorruptCheckpoint as error:
            if run_sync(_is_committed(backend, commit)):
                _reject(_Damaged(commit, str(error), error.damage), step, rejected, notes, on_damage)
            return None
        return (build_state(select(contents.saved, chosen), tensors, contents.values()),)

    return _until_loaded(name, True, attempt)[0]


def _until_loaded(name: str, speaks: bool, attempt: Callable[[int, Rejected, list[str]], R | None]) -> R:
    """Makes attempts until one succeeds; those that found damage have rejected that commit."""
    with _warning_later(speaks) as notes:
        rejected: Rejected = {}
        for number in range(MAX_ROUNDS):
            loaded = attempt(number, rejected, notes)
            if loaded is not None:
                return loaded
    raise LoadFailed(f"checkpoints of {name} kept vanishing while they were read; who prunes them?")


class _Damaged(Exception):
    """A commit turned out to be damaged, all ranks agree."""

    def __init__(self, commit: Commit, message: str, damage: Sequence[Damage]) -> None:
        super().__init__(message)
        self.commit = commit
        self.damage = damage


class _Load:
    """One try of all ranks to load one commit; every rank goes through the same meetings."""

    def __init__(self, backend: StorageBackend, name: str, members: Membership, key: str) -> None:
        self._backend = backend
        self._name = name
        self._members = members
        self._barrier = members.barrier
        self._key = key

    def try_one(
        self,
        state: object,
        asked: _Unchecked,
        rejected: Rejected,
        notes: list[str],
        touched: set[str],
    ) -> Loaded | None:
        """Returns None if the commit vanished meanwhile."""

        def pick() -> bytes:
            picked = _pick(self._backend, self._name, _checked(*asked), rejected, notes)
            return json.dumps([asdict(picked.commit), picked.newest, asdict(picked.asked)]).encode()

        fields, newest, wanted = json.loads(self._barrier.announce(f"{self._key}/pick", pick))
        commit = Commit(**fields)
        leaders = _checked(**wanted)
        what = f"step {commit.step} of {self._name}"
        this = LoadRound(self._backend, commit, self._members, state, leaders, touched)

        def judge(reports: Sequence[Report]) -> Verdict:
            return load_verdicts.judge(what, reports, lambda: self._is_there(commit))

        def judge_surveys(reports: Sequence[Report]) -> Verdict:
            return load_verdicts.judge_surveys(what, reports, leaders.strict, lambda: self._is_there(commit))

        agreed = self._meet(
            "survey", lambda: this.survey(lambda: _refuse_others(asked, leaders)), judge_surveys
        )
        if not self._goes_on(agreed, commit, this):
            return None
        try:
            turn = tuple(agreed["turns"][self._members.rank])
            if not self._read_together(this, agreed["nodes"], turn, commit, judge):
                return None
            self._fill_together(this)
        finally:
            # An error that is kept keeps this frame.
            this.release()
        info = LoadedCheckpoint.from_load(
            this.contents.manifest, commit.manifest_sha256, agreed["missing"], agreed["unexpected"]
        )
        return Loaded(info, CommitKey(*newest))

    def _read_together(
        self,
        this: LoadRound,
        nodes: Sequence[dict[str, Any]],
        turn: tuple[int, int],
        commit: Commit,
        judge: Callable[[Sequence[Report]], Verdict],
    ) -> bool:
        """Reads and checks all that any rank needs; False if another commit has to be tried."""
        if nodes:
            if not self._goes_on(self._meet("divide", lambda: this.divide(nodes), judge), commit, this):
                return False
            ranks, nbytes = this.common
            tag = f"dtruntime-{self._members.run_id}-{self._key.replace('/', '-')}"
            this.memory = share_memory(self._barrier, self._key, tag, ranks, nbytes)
        stages: tuple[tuple[str, Callable[[], Report]], ...] = (
            ("read", this.read),
            ("check", this.check),
            ("home", lambda: this.read_home(turn)),
        )
        return all(self._goes_on(self._meet(stage, step, judge), commit, this) for stage, step in stages)

    def _meet(
        self, stage: str, step: Callable[[], Report], judge: Callable[[Sequence[Report]], Verdict]
    ) -> Verdict:
        """Does a step, and hears what the leader makes of how it went on all ranks."""
        key = f"{self._key}/{stage}"
        with declining(self._barrier, key):
            report = load_verdicts.encode(step())
        answer = self._barrier.meet(
            key, report, lambda values: load_verdicts.encode(judge(list(map(load_verdicts.decode, values))))
        )
        return load_verdicts.decode(answer)

    def _goes_on(self, verdict: Verdict, commit: Commit, this: LoadRound) -> bool:
        """Raises what the verdict says; False if another commit has to be tried."""
        if verdict["verdict"] == "differs":
            raise CheckpointMismatch(verdict["message"])
        if verdict["verdict"] == "failed":
            raise errors.from_record(verdict, LoadFailed) from this.error
        if verdict["verdict"] == "older":
            raise _Damaged(commit, verdict["message"], [Damage(**d) for d in verdict["damage"]])
        return bool(verdict["verdict"] == "go")

    def _fill_together(self, this: LoadRound) -> None:
        """Fills the state on all ranks; returns when all have succeeded."""
        key = f"{self._key}/fill"
        with declining(self._barrier, key):
            message = this.fill()

        def collect(values: Sequence[bytes]) -> bytes:
            return "; ".join(f"rank {r}: {v.decode()}" for r, v in enumerate(values) if v).encode()

        failures = self._barrier.meet(key, message.encode(), collect).decode()
        if failures:
            raise LoadFailed(f"the state could not be filled: {failures}; {HALF_FILLED}") from this.error

    def _is_there(self, commit: Commit) -> bool:
        return run_sync(_is_committed(self._backend, commit))


@contextmanager
def _telling_what_is_touched(touched: Collection[str]) -> Iterator[None]:
    """Says in an error of the body that the state is half filled, if it is."""
    try:
        yield
    except CheckpointNotFound as error:
        if not touched:
            raise
        # Whoever begins anew where there is no checkpoint must not do so with this state.
        raise LoadFailed(f"{error}; {HALF_FILLED}") from error
    except DTRuntimeError as error:
        if touched and HALF_FILLED not in str(error):
            error.args = (f"{error}; {HALF_FILLED}", *error.args[1:])
        raise


@contextmanager
def _warning_later(speak: bool) -> Iterator[list[str]]:
    """Collects what to warn of and does so at the end: where warnings are errors, no rank is left alone half-way."""
    notes: list[str] = []
    try:
        yield notes
    finally:
        for note in notes if speak else ():
            warnings.warn(note, RuntimeWarning, stacklevel=6)


def _reject(
    damaged: _Damaged,
    step: int | None,
    rejected: Rejected,
    notes: list[str],
    on_damage: OnDamage | None,
) -> None:
    """Falls back to an older commit, or not at all where a step was asked for by number."""
    if on_damage is not None:
        on_damage(damaged.commit.key)
    if step is not None:
        raise CorruptCheckpoint(str(damaged), damaged.damage)
    rejected[damaged.commit.key] = damaged.damage
    notes.append(f"{damaged}; going on with the checkpoint before it")


def _want_all(saved: SavedState, keys: tuple[str, ...] | None) -> Wanted:
    chosen = select(saved, keys)
    names = [*chosen.tensors, *chosen.objects]
    nothing = [key for key in keys or () if not any(lies_in(fqn, (key,)) for fqn in names)]
    return Wanted(
        tensors=whole_specs(chosen),
        objects=tuple(chosen.objects),
        differences=tuple(f"{key}: nothing of that name is in the checkpoint" for key in nothing),
        missing=(),
        unexpected=(),
    )


def _pick(backend: StorageBackend, name: str, asked: Asked, rejected: Rejected, notes: list[str]) -> _Picked:
    """Chooses the newest commit that was not rejected; on the leader."""
    commit, newest = run_sync(catalog.pick(backend, name, asked.step, rejected, notes))
    return _Picked(commit, newest, asked)


def _checked(step: int | None, keys: Collection[str] | None, strict: bool, all_or_nothing: bool) -> Asked:
    return Asked(
        None if step is None else check_step(step), check_keys(keys), bool(strict), bool(all_or_nothing)
    )


def _refuse_others(asked: _Unchecked, leaders: Asked) -> None:
    mine = _checked(*asked)
    if mine != leaders:
        raise InvalidArgument(
            f"it asks for {_words(mine)}, rank 0 for {_words(leaders)}; give all ranks the same"
        )


def _words(asked: Asked) -> str:
    keys = "" if asked.keys is None else f" with keys {list(asked.keys)}"
    flags = "" if asked.strict else " with strict=False"
    flags += " with all_or_nothing=True" if asked.all_or_nothing else ""
    return f"step {asked.step}{keys}{flags}"


async def _is_committed(backend: StorageBackend, commit: Commit) -> bool:
    """Whether it is still there: what a prune took away meanwhile is not damaged."""
    try:
        return await catalog.is_still_committed(backend, commit)
    except CorruptCheckpoint:
        return True
