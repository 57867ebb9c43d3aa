"""Every interleaving of the storage calls of several processes, over the real code, in the spirit of commit_model.py.

There the protocol is a model; here it is the code. A process is a coroutine that is suspended at each of its storage
calls. What it does next follows from what its frames hold (`walk_frames`), so that a walk comes to every state once,
however it was reached, and runs a piece of code once for each answer that it can get. A create may lose its answer,
having been done or not, or being done later, as often as the walk allows each process; no other call fails but as the
storage's contract has it. A process that is not scheduled again is one that was killed. After every call:

    I1  what a commit names is there: its manifest, and the files of every attempt that it uses;
    I2  once something was committed, something is committed;
    I3  a save that reported success stays committed until retention takes it, and one that failed never is.
"""

from __future__ import annotations

import copy
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from dtruntime_torch.errors import DTRuntimeError
from tests.checkpoint.walk_frames import fingerprint
from tests.checkpoint.walk_storage import Answer, Call, Disk, Scheduled, come_late, ways

Coro = Coroutine["Call", Answer, None]


@dataclass
class Memory:
    """What a process keeps from job to job; `keep` holds what the jobs themselves keep."""

    number: int
    reported: frozenset[str] = frozenset()  # paths of commits whose save reported success
    failed: frozenset[str] = frozenset()  # attempts whose save said that it will never be committed
    taken: frozenset[str] = frozenset()  # commits that retention took
    retains: bool = False  # retention is at work
    kinds: frozenset[str] = frozenset()  # how its saves ended
    keep: dict[str, Any] = field(default_factory=dict)

    def notice(self, call: Call) -> None:
        """A call that takes a commit away is retention's, while that is at work."""
        if self.retains and call.operation in ("write", "delete") and "/commits/" in call.path:
            self.taken |= {call.path}


Job = Callable[[Scheduled, Memory], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Told:
    """What the invariants need of a process, as in `Memory`."""

    reported: frozenset[str]
    failed: frozenset[str]
    taken: frozenset[str]
    kinds: frozenset[str]


@dataclass(frozen=True, slots=True)
class Local:
    """A process at a storage call, or at its end: `call` is None then."""

    job: int
    memory: Memory  # as it was when the job began
    answers: tuple[Answer, ...]  # in this job, so far: one history of those that lead here
    call: Call | None
    told: Told
    lost: int  # how many answers may still be lost


State = tuple[int, ...]  # the number of the disk, then of each process's Local


@dataclass(frozen=True, slots=True)
class Judged:
    """What the invariants need of a disk."""

    live: frozenset[str]  # paths of commits that are not void
    attempts: frozenset[str]  # what they commit
    broken: str | None  # I1, if it does not hold


class Numbers:
    """Gives equal values equal numbers."""

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}
        self.values: list[Any] = []

    def of(self, key: Hashable, value: Any) -> int:
        number = self._numbers.setdefault(key, len(self.values))
        if number == len(self.values):
            self.values.append(value)
        return number


class Walk:
    """Walks over the interleavings of processes.

    Args:
        jobs: of each process, one after the other.
        judge: looks at a disk.
        lost: how many creates of each process may lose their answer.
        merge: whether a process is what its frames hold, or, slower by far, its history.
    """

    def __init__(
        self,
        jobs: Sequence[Sequence[Job]],
        judge: Callable[[dict[str, bytes]], Judged],
        lost: int = 1,
        merge: bool = True,
    ) -> None:
        self._jobs = jobs
        self._judge = judge
        self._merge = merge
        self._disks = Numbers()
        self._locals = Numbers()
        self._advanced: dict[tuple[int, int, Hashable], int] = {}
        self._done: dict[tuple[int, Call, bool], list[tuple[int, Answer, int]]] = {}
        self._moved: dict[tuple[int, int], list[tuple[int, int]]] = {}
        self._lates: dict[int, list[int]] = {}
        self._judged: dict[int, Judged] = {}
        self._told = Numbers()
        self._told_of: list[int] = []  # by the number of the Local
        self._violations: dict[tuple[int, ...], str | None] = {}
        self._lost = lost
        self.states = 0
        self.path: list[str] = []  # the calls that led to the violation
        self.kinds: set[str] = set()

    def everything(self, limit: int) -> str | None:
        """Depth first over all interleavings; returns the first violation, or None."""
        start = self.start()
        came: dict[State, tuple[State, int] | None] = {start: None}
        stack = [start]
        while stack:
            state = stack.pop()
            for i, reached in self.next(state):
                if reached in came:
                    continue
                came[reached] = (state, i)
                found = self.violation(state, reached)
                if found:
                    self.path = self._path(came, reached)
                    return found
                stack.append(reached)
            assert len(came) <= limit, "the walk is too long to end"
        self.states = len(came)
        return None

    def ends(self) -> Iterator[dict[str, bytes]]:
        """The disks that were seen, each once."""
        for disk in self._disks.values:
            yield dict(disk.files)

    def start(self) -> State:
        disk = self._disks.of(Disk(), Disk())
        return (disk, *(self._begin(i, 0, Memory(i + 1), self._lost) for i in range(len(self._jobs))))

    def next(self, state: State) -> Iterator[tuple[int, State]]:
        """What one call of any process leads to, with the process; -1 is a create that comes late."""
        for disk in self._late(state[0]):
            yield -1, (disk, *state[1:])
        for i in range(1, len(state)):
            for disk, local in self._moves(i - 1, state[0], state[i]):
                yield i - 1, (disk, *state[1:i], local, *state[i + 1 :])

    def violation(self, before: State, now: State) -> str | None:
        """Which of the invariants a call broke."""
        key = (bool(self._look(before[0]).live), now[0], *(self._told_of[number] for number in now[1:]))
        if key not in self._violations:
            self._violations[key] = self._broken(*key)
        return self._violations[key]

    def _broken(self, was_live: bool, disk: int, *told: int) -> str | None:
        processes: list[Told] = [self._told.values[number] for number in told]
        for process in processes:
            self.kinds |= process.kinds
        return broken(was_live, self._look(disk), processes)

    def _late(self, disk: int) -> list[int]:
        """The disks that creates which come late lead to."""
        if disk not in self._lates:
            value: Disk = self._disks.values[disk]
            self._lates[disk] = [self._disks.of(then, then) for then in come_late(value)]
        return self._lates[disk]

    def _moves(self, i: int, disk: int, local: int) -> list[tuple[int, int]]:
        """How the next call of a process may end: the disk and the process then."""
        key = (disk, local)
        if key not in self._moved:
            process: Local = self._locals.values[local]
            self._moved[key] = [
                (number, self._advance(i, local, answer, lost))
                for number, answer, lost in self._outcomes(disk, process)
            ]
        return self._moved[key]

    def _outcomes(self, disk: int, process: Local) -> list[tuple[int, Answer, int]]:
        """How a call may end: the disk then, its answer, and how many answers were lost."""
        if process.call is None:
            return []
        key = (disk, process.call, process.lost > 0)
        if key not in self._done:
            found = ways(self._disks.values[disk], process.call, process.lost > 0)
            self._done[key] = [(self._disks.of(then, then), answer, lost) for then, answer, lost in found]
        return self._done[key]

    def _look(self, disk: int) -> Judged:
        if disk not in self._judged:
            self._judged[disk] = self._judge(dict(self._disks.values[disk].files))
        return self._judged[disk]

    def _advance(self, i: int, number: int, answer: Answer, lost: int) -> int:
        key = (i, number, (answer, lost))
        if key not in self._advanced:
            before = self._locals.values[number]
            self._advanced[key] = self._run(i, before, (*before.answers, answer), before.lost - lost)
        return self._advanced[key]

    def _begin(self, i: int, job: int, memory: Memory, lost: int) -> int:
        start = Local(job, memory, (), None, told_by(memory), lost)
        return self._run(i, start, (), lost)

    def _run(self, i: int, at: Local, answers: tuple[Answer, ...], lost: int) -> int:
        """Runs a job again with its answers up to its next call, or goes on with the next job."""
        if at.job == len(self._jobs[i]):
            return self._number(("ended", i, fingerprint(at.memory), lost), at)
        memory = copy.deepcopy(at.memory)
        coroutine: Coro = self._jobs[i][at.job](Scheduled(), memory)
        try:
            call = coroutine.send(None)
            for answer in answers:
                memory.notice(call)
                failed = isinstance(answer, type)
                call = coroutine.throw(answer("as answered")) if failed else coroutine.send(answer)
        except StopIteration:
            return self._begin(i, at.job + 1, memory, lost)
        except DTRuntimeError as error:
            memory.kinds |= {type(error).__name__}
            return self._begin(i, len(self._jobs[i]), memory, lost)
        state = fingerprint((coroutine, memory)) if self._merge else (fingerprint(at.memory), answers)
        local = Local(at.job, at.memory, answers, call, told_by(memory), lost)
        coroutine.close()
        return self._number((i, at.job, call, state, lost), local)

    def _number(self, key: Hashable, local: Local) -> int:
        number = self._locals.of(key, local)
        if number == len(self._told_of):
            self._told_of.append(self._told.of(local.told, local.told))
        return number

    def _describe(self, state: State, i: int) -> str:
        if i < 0:
            return "a create comes late"
        process = self._locals.values[state[i + 1]]
        job = getattr(self._jobs[i][process.job], "__name__", "job")
        return f"process {i + 1}, {job}: {process.call.operation} {process.call.path}"

    def _path(self, came: dict[State, tuple[State, int] | None], state: State) -> list[str]:
        calls = []
        while (step := came[state]) is not None:
            state, i = step
            calls.append(self._describe(state, i))
        return calls[::-1]


def broken(was_live: bool, disk: Judged, processes: Sequence[Told]) -> str | None:
    """Which of the invariants does not hold, of a disk that had something committed before or not."""
    if disk.broken:
        return disk.broken
    if was_live and not disk.live:
        return "I2: nothing is committed any more"
    taken = frozenset[str]().union(*(process.taken for process in processes))
    for process in processes:
        lost = process.reported - taken - disk.live
        if lost:
            return f"I3: {sorted(lost)} reported success and is gone"
        if process.failed & disk.attempts:
            return f"I3: {sorted(process.failed & disk.attempts)} reported failure and is committed"
    return None


def told_by(memory: Memory) -> Told:
    return Told(memory.reported, memory.failed, memory.taken, memory.kinds)
