"""Every interleaving of the storage calls of two incarnations that claim and commit, in the spirit of commit_model.py.

There the protocol is a model; here it is the code. A process is what it was answered so far: its next call follows
by running it again with those answers, and a call is done on a copy of the storage. So the walk needs no threads, and
comes to every state once. A create may lose its answer, having been done or not; a process that is not scheduled
again is one that was killed. After every call:

    I1  what a commit names is there: its manifest, and the data of that;
    I2  once something was committed, something is committed;
    I3  a save that reported success stays committed, and one that reported that it never will be is not;
    I4  no two incarnations have one generation.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from datetime import datetime, tzinfo
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import pytest

from dtruntime_torch.checkpoint import catalog, names
from dtruntime_torch.checkpoint import commit as commit_module
from dtruntime_torch.checkpoint.commit import Patience
from dtruntime_torch.checkpoint.manifest import Commit, decode_commit, decode_manifest
from dtruntime_torch.checkpoint.names import Attempt
from dtruntime_torch.errors import AlreadyExists, CommitConflict, NotFound, StorageError
from dtruntime_torch.storage import MemoryBackend, StorageBackend, run_sync
from dtruntime_torch.storage.backend import Data, Entry
from tests.checkpoint.commits import NAME, data_path, manifest_of, manifest_path, run_id, void

T = TypeVar("T")
Answer = Any  # bytes, None, the paths of a listing, or the class of what was raised
Files = frozenset[tuple[str, bytes]]
Told = list[tuple[str, Any]]

MAX_STATES = 200_000


@dataclass(frozen=True)
class Call:
    operation: str
    path: str
    data: bytes = b""


class Unanswered(BaseException):
    """Ends a process at the first call that it was not answered yet."""

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self.call = call


class Answered:
    """A storage that gives the answers that were given before."""

    def __init__(self, answers: Sequence[Answer]) -> None:
        self._answers = iter(answers)

    async def write(self, path: str, data: Data) -> None:
        self._answer(Call("write", path, bytes(data)))

    async def create(self, path: str, data: Data) -> None:
        self._answer(Call("create", path, bytes(data)))

    async def read(self, path: str) -> bytes:
        return self._answer(Call("read", path))

    async def list(self, prefix: str, delimiter: str | None = None) -> list[Entry]:
        return [Entry(path, 0, 0.0) for path in self._answer(Call("list", prefix))]

    async def delete(self, path: str) -> None:
        self._answer(Call("delete", path))

    def _answer(self, call: Call) -> Answer:
        answer = next(self._answers, call)
        if answer is call:
            raise Unanswered(call)
        if isinstance(answer, type):
            raise answer("as answered")
        return answer


def do(files: Files, call: Call) -> tuple[Files, Answer]:
    """Does a call on a storage that holds these files."""
    backend = MemoryBackend()
    for path, data in files:
        at_once(backend.write(path, data))
    try:
        answer = at_once(perform(backend, call))
    except (AlreadyExists, NotFound) as error:
        return files, type(error)
    if call.operation in ("read", "list"):
        return files, answer
    listed = at_once(backend.list(""))
    return frozenset((entry.path, bytes(at_once(backend.read(entry.path)))) for entry in listed), None


async def perform(backend: MemoryBackend, call: Call) -> Answer:
    if call.operation == "list":
        return tuple(entry.path for entry in await backend.list(call.path))
    if call.operation == "read":
        return bytes(await backend.read(call.path))
    if call.operation == "delete":
        await backend.delete(call.path)
    else:
        await getattr(backend, call.operation)(call.path, call.data)
    return None


def at_once(coroutine: Coroutine[object, object, T]) -> T:
    """Runs a coroutine that never has to wait."""
    try:
        coroutine.send(None)
    except StopIteration as stopped:
        return stopped.value
    raise AssertionError("it waits")


# --- the processes --------------------------------------------------------------------------------------------

Job = Callable[[ModuleType, StorageBackend, int, Patience, Told], Awaitable[None]]


@dataclass(frozen=True)
class Incarnation:
    """Claims a generation before its first job, then does one after the other."""

    number: int
    jobs: tuple[Job, ...]
    first_step: int
    seconds: float = 60.0
    lost_answers: int = 1

    async def run(self, code: ModuleType, backend: StorageBackend, told: Told) -> None:
        patience = Patience(self.seconds, clock=lambda: 0.0, sleep=no_time_passes)
        try:
            generation = await code.claim_generation(
                backend, NAME, run_id(self.number), None, False, self.first_step, patience
            )
            told.append(("claimed", generation))
            for job in self.jobs:
                await job(code, backend, generation, patience, told)
        except CommitConflict:
            told.append(("conflict", None))
        except StorageError:
            told.append(("no answer", None))


class NoTime(datetime):
    """It is always the same time: a process that is run again says what it said before."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> NoTime:
        return cls(2026, 1, 2, tzinfo=tz)


@pytest.fixture(autouse=True)
def _no_time(monkeypatch):
    monkeypatch.setattr(commit_module, "datetime", NoTime)


async def no_time_passes(seconds: float) -> None:
    return None


def save(step: int) -> Job:
    """A full save, as `publish` does it; what can never be committed is deleted, manifest first."""

    async def job(
        code: ModuleType, backend: StorageBackend, generation: int, patience: Patience, told: Told
    ) -> None:
        await code.check_not_replaced(backend, NAME, generation)
        manifest = manifest_of(generation, step)
        await backend.write(data_path(manifest.attempt), b"data")
        outcome = await code.commit(backend, manifest, patience)
        told.append((outcome.kind, Attempt(generation, step, 1)))
        if outcome.kind in ("lost", "aborted"):
            await backend.delete(manifest_path(manifest))
            await backend.delete(data_path(manifest.attempt))

    return job


def sweep(step: int) -> Job:
    """Takes the first generation's attempt at a step, unless it is committed: void first."""

    async def job(
        code: ModuleType, backend: StorageBackend, generation: int, patience: Patience, told: Told
    ) -> None:
        if generation == 1:
            return
        manifest = manifest_of(1, step)
        try:
            await void(backend, 1, step)
        except AlreadyExists:
            if not (await catalog.read_commit(backend, NAME, manifest.key)).void:
                return
        await backend.delete(manifest_path(manifest))
        await backend.delete(data_path(manifest.attempt))

    return job


# --- the walk -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class State:
    files: Files
    answers: tuple[tuple[Answer, ...], ...]
    lost: tuple[int, ...]


@dataclass
class Walk:
    """Depth first over all interleavings of the processes' calls."""

    code: ModuleType
    processes: tuple[Incarnation, ...]
    seen: set[State] = field(default_factory=set)
    kinds: set[str] = field(default_factory=set)
    replayed: dict[tuple[int, tuple[Answer, ...]], tuple[Call | None, Told]] = field(default_factory=dict)

    def violation(self) -> str | None:
        """The first that there is, or None."""
        nothing = State(frozenset(), tuple(() for _ in self.processes), tuple(0 for _ in self.processes))
        stack = [nothing]
        self.seen.add(nothing)
        while stack:
            state = stack.pop()
            for reached in self.next(state):
                if reached in self.seen:
                    continue
                self.seen.add(reached)
                assert len(self.seen) <= MAX_STATES, "the walk is too long to end"
                found = self.broken(state, reached)
                if found:
                    return found
                stack.append(reached)
        return None

    def next(self, state: State) -> list[State]:
        """What one call of any process leads to."""
        reached = []
        for i, process in enumerate(self.processes):
            call, _ = self.replay(i, state.answers[i])
            if call is None:
                continue
            files, answer = do(state.files, call)
            reached.append(self.answered(state, i, files, answer))
            if call.operation == "create" and state.lost[i] < process.lost_answers:
                reached.append(self.answered(state, i, files, StorageError, lost=1))
                reached.append(self.answered(state, i, state.files, StorageError, lost=1))
        return reached

    def answered(self, state: State, i: int, files: Files, answer: Answer, lost: int = 0) -> State:
        answers = (*state.answers[:i], (*state.answers[i], answer), *state.answers[i + 1 :])
        return State(files, answers, (*state.lost[:i], state.lost[i] + lost, *state.lost[i + 1 :]))

    def replay(self, i: int, answers: tuple[Answer, ...]) -> tuple[Call | None, Told]:
        """Runs a process up to its next call; returns that, and what it told until then."""
        key = (i, answers)
        if key not in self.replayed:
            told: Told = []
            call = None
            try:
                run_sync(self.processes[i].run(self.code, Answered(answers), told))
            except Unanswered as unanswered:
                call = unanswered.call
            self.replayed[key] = (call, told)
        return self.replayed[key]

    def broken(self, before: State, now: State) -> str | None:
        """Which of the invariants a call broke."""
        files = dict(now.files)
        committed = live(now.files)
        for commit in committed:
            manifest = files.get(f"{NAME}/{commit.attempt}/{names.MANIFEST}")
            if manifest is None or hashlib.sha256(manifest).hexdigest() != commit.manifest_sha256:
                return f"I1: {commit.key} is committed and its manifest is not there"
            if any(data_path(used) not in files for used in decode_manifest(manifest, "").uses):
                return f"I1: {commit.key} is committed and its data is gone"
        if live(before.files) and not committed:
            return "I2: nothing is committed any more"
        told = [self.replay(i, answers)[1] for i, answers in enumerate(now.answers)]
        attempts = {commit.attempt for commit in committed}
        for kind, attempt in (line for lines in told for line in lines):
            self.kinds.add(kind)
            if kind == "committed" and attempt.path not in attempts:
                return f"I3: {attempt} reported success and is not committed"
            if kind in ("lost", "aborted") and attempt.path in attempts:
                return f"I3: {attempt} reported failure and is committed"
        claimed = [generation for lines in told for kind, generation in lines if kind == "claimed"]
        return None if len(set(claimed)) == len(claimed) else f"I4: generations {claimed}"


@cache
def live(files: Files) -> tuple[Commit, ...]:
    """The commits that are not void."""
    found = [decode_commit(data, path) for path, data in files if names.parse_commit(path)]
    return tuple(commit for commit in found if not commit.void)


# --- what holds, and what does not without its rule -----------------------------------------------------------

TWO_THAT_SAVE = (
    Incarnation(1, (save(1), save(2)), first_step=1),
    Incarnation(2, (save(5),), first_step=5),
)
ONE_THAT_SWEEPS = (
    Incarnation(1, (save(1),), first_step=1, lost_answers=2),
    Incarnation(2, (sweep(1), save(3)), first_step=3),
)
NO_PATIENCE = (
    Incarnation(1, (save(1), save(2)), first_step=1, seconds=0.0),
    Incarnation(2, (sweep(1), save(5)), first_step=5),
)


@pytest.mark.parametrize(
    ("processes", "kinds"),
    [
        (TWO_THAT_SAVE, {"claimed", "committed", "conflict"}),
        (ONE_THAT_SWEEPS, {"claimed", "committed", "conflict", "lost", "no answer"}),
        (NO_PATIENCE, {"claimed", "committed", "conflict", "lost", "unknown", "no answer"}),
    ],
    ids=["two that save", "one that sweeps", "no patience"],
)
def test_nothing_is_lost_in_any_interleaving(processes, kinds):
    walk = Walk(commit_module, processes)
    assert walk.violation() is None
    assert walk.kinds == kinds  # it came to what it was made to come to
    assert len(walk.seen) > 1_000


WRITE = "        await asyncio.wait_for(backend.write(path, data), patience.call_seconds)"
READ = "        return bytes(await asyncio.wait_for(backend.read(path), patience.call_seconds))"
RULES = {
    "an unknown outcome is taken for a loss": [
        (READ, "        raise"),
        ("if waited >= patience.seconds:", "if True:"),
        ('return Outcome("unknown", ', 'return Outcome("lost", '),
    ],
    "whatever a create of a commit finds is taken for ours": [("if there == ours:", "if there is not None:")],
    "whatever a claim finds is taken for ours": [("return there == ours", "return there is not None")],
    "the commit comes before the manifest": [
        (WRITE, "        intent = lambda path=path: backend.write(path, data)"),
        ("    if there == ours:", "    await intent()\n    if there == ours:"),
    ],
}


def without(rule: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A copy of `commit` in which a rule is switched off."""
    source = Path(commit_module.__file__).read_text()
    for old, new in RULES[rule]:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    copy = ModuleType("commit_without_a_rule")
    monkeypatch.setitem(sys.modules, copy.__name__, copy)
    exec(compile(source, copy.__name__, "exec"), copy.__dict__)
    monkeypatch.setattr(copy, "datetime", NoTime)
    return copy


@pytest.mark.parametrize(("rule", "broken"), list(zip(RULES, ["I3", "I3", "I4", "I1"], strict=True)))
def test_without_its_rules_something_is_lost(rule, broken, monkeypatch):
    assert str(Walk(without(rule, monkeypatch), ONE_THAT_SWEEPS).violation()).startswith(broken)
