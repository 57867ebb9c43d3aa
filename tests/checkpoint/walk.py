"""Every interleaving of the storage calls of several processes, over the real code, in the spirit of commit_model.py.

There the protocol is a model; here it is the code. A process is a coroutine that is suspended at each of its storage
calls. What it does next follows from what its frames hold (`walk_frames`), so that a walk comes to every state once,
however it was reached, and runs a piece of code once for each answer that it can get. A create may lose its answer,
having been done or not, or being done later; a process that is not scheduled again is one that was killed. After
every call:

    I1  what a commit names is there: its manifest, and the files of every attempt that it uses;
    I2  once something was committed, something is committed;
    I3  a save that reported success stays committed until retention takes it, and one that failed never is.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Awaitable, Callable, Coroutine, Generator, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from dtruntime_torch.errors import AlreadyExists, DTRuntimeError, NotFound, StorageError
from dtruntime_torch.storage import MemoryBackend
from dtruntime_torch.storage.arguments import as_views
from dtruntime_torch.storage.backend import Data, Entry
from tests.checkpoint.walk_frames import fingerprint

Answer = Any  # what a call returned, or the class of what it raised
Coro = Coroutine["Call", Answer, None]


@dataclass(frozen=True, slots=True)
class Call:
    operation: str
    path: str
    data: bytes = b""

    def __await__(self) -> Generator[Call, Answer, Answer]:
        return (yield self)


class Scheduled:
    """A storage each of whose calls suspends its process until the walk answers it."""

    settle_seconds = 0.0

    async def write(self, path: str, data: Data) -> None:
        await Call("write", path, b"".join(as_views(data)))

    async def create(self, path: str, data: Data) -> None:
        await Call("create", path, b"".join(as_views(data)))

    async def read(self, path: str) -> bytes:
        return await Call("read", path)

    async def size(self, path: str) -> int:
        return await Call("size", path)

    async def list(self, prefix: str, delimiter: str | None = None) -> list[Entry]:
        return list(await Call("list", prefix, (delimiter or "").encode()))

    async def delete(self, path: str) -> None:
        await Call("delete", path)

    async def unfinished(self, prefix: str) -> list[Entry]:
        return []

    async def discard_unfinished(self, prefix: str) -> int:
        return 0


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


Job = Callable[[Scheduled, Memory], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Local:
    """A process at a storage call, or at its end: `call` is None then."""

    job: int
    memory: Memory  # as it was when the job began
    answers: tuple[Answer, ...]  # in this job, so far: one history of those that lead here
    call: Call | None
    reported: frozenset[str]
    failed: frozenset[str]
    taken: frozenset[str]
    kinds: frozenset[str]
    lost: int  # how many answers may still be lost


Files = frozenset[tuple[str, bytes]]
State = tuple[int, ...]  # the number of the disk, then of each process's Local


@dataclass(frozen=True, slots=True)
class Disk:
    """What lies on storage, and creates that were given up and may still be done."""

    files: Files = frozenset()
    late: frozenset[Call] = frozenset()


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
        self._judged: dict[int, Judged] = {}
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

    def sample(self, runs: int, seed: int) -> str | None:
        """Random interleavings, some of whose processes stop for ever; returns the first violation, or None."""
        chance = random.Random(seed)
        for _ in range(runs):
            state, calls = self.start(), []
            stop_at = [chance.choice([None, chance.randrange(80)]) for _ in self._jobs]
            done = [0] * len(self._jobs)
            while True:
                choices = [
                    (i, reached)
                    for i, reached in self.next(state)
                    if i < 0 or stop_at[i] is None or done[i] < stop_at[i]  # type: ignore[operator]
                ]
                if not choices:
                    break
                who = chance.choice(sorted({i for i, _ in choices}))
                i, reached = chance.choice([choice for choice in choices if choice[0] == who])
                calls.append(self._describe(state, i))
                found = self.violation(state, reached)
                if found:
                    self.path = calls
                    return found
                done[i] += i >= 0
                state = reached
                self.states += 1
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
        disk = self._disks.values[state[0]]
        for call in disk.late:
            files = do(disk.files, call)[0]
            yield -1, (self._disk(files, disk.late - {call}), *state[1:])
        for i in range(len(self._jobs)):
            process = self._locals.values[state[i + 1]]
            if process.call is None:
                continue
            for number, answer, lost in self._outcomes(state[0], process.call, process.lost > 0):
                local = self._advance(i, state[i + 1], answer, lost)
                yield i, (number, *state[1 : i + 1], local, *state[i + 2 :])

    def violation(self, before: State, now: State) -> str | None:
        """Which of the invariants a call broke."""
        judged = self._look(now[0])
        if judged.broken:
            return judged.broken
        if self._look(before[0]).live and not judged.live:
            return "I2: nothing is committed any more"
        processes = [self._locals.values[number] for number in now[1:]]
        taken = frozenset().union(*(p.taken for p in processes))
        for process in processes:
            lost = process.reported - taken - judged.live
            if lost:
                return f"I3: {sorted(lost)} reported success and is gone"
            if process.failed & judged.attempts:
                return f"I3: {sorted(process.failed & judged.attempts)} reported failure and is committed"
            self.kinds |= process.kinds
        return None

    def _outcomes(self, disk: int, call: Call, may_lose: bool) -> list[tuple[int, Answer, int]]:
        """How a call may end: the disk then, its answer, and how many answers were lost."""
        key = (disk, call, may_lose)
        if key not in self._done:
            self._done[key] = list(self._ways(self._disks.values[disk], call, may_lose))
        return self._done[key]

    def _ways(self, disk: Disk, call: Call, may_lose: bool) -> Iterator[tuple[int, Answer, int]]:
        files, answer = do(disk.files, call)
        yield self._disk(files, disk.late), answer, 0
        if call.operation == "create" and may_lose:
            yield self._disk(disk.files, disk.late), StorageError, 1
            yield self._disk(disk.files, disk.late | {call}), StorageError, 1
            if files != disk.files:
                yield self._disk(files, disk.late), StorageError, 1

    def _disk(self, files: Files, late: frozenset[Call]) -> int:
        disk = Disk(files, late)
        return self._disks.of(disk, disk)

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
        start = Local(job, memory, (), None, *_told(memory), lost)
        return self._run(i, start, (), lost)

    def _run(self, i: int, at: Local, answers: tuple[Answer, ...], lost: int) -> int:
        """Runs a job again with its answers up to its next call, or goes on with the next job."""
        if at.job == len(self._jobs[i]):
            return self._locals.of(("ended", i, fingerprint(at.memory), lost), at)
        memory = copy.deepcopy(at.memory)
        coroutine: Coro = self._jobs[i][at.job](Scheduled(), memory)  # type: ignore[assignment]
        try:
            call = coroutine.send(None)
            for answer in answers:
                if call.operation in ("write", "delete") and "/commits/" in call.path and memory.retains:
                    memory.taken |= {call.path}
                failed = isinstance(answer, type)
                call = coroutine.throw(answer("as answered")) if failed else coroutine.send(answer)
        except StopIteration:
            return self._begin(i, at.job + 1, memory, lost)
        except DTRuntimeError as error:
            memory.kinds |= {type(error).__name__}
            return self._begin(i, len(self._jobs[i]), memory, lost)
        state = fingerprint((coroutine, memory)) if self._merge else (fingerprint(at.memory), answers)
        local = Local(at.job, at.memory, answers, call, *_told(memory), lost)
        number = self._locals.of((i, at.job, call, state, lost), local)
        coroutine.close()
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


def _told(memory: Memory) -> tuple[frozenset[str], ...]:
    return memory.reported, memory.failed, memory.taken, memory.kinds


def do(files: Files, call: Call) -> tuple[Files, Answer]:
    """Does a call on a storage that holds these files."""
    backend = MemoryBackend()
    for path, data in sorted(files):
        at_once(backend.write(path, data))
    try:
        answer = at_once(_perform(backend, call))
    except (AlreadyExists, NotFound) as error:
        return files, type(error)
    if call.operation in ("read", "list", "size"):
        return files, answer
    listed = at_once(backend.list(""))
    return frozenset((entry.path, bytes(at_once(backend.read(entry.path)))) for entry in listed), None


async def _perform(backend: MemoryBackend, call: Call) -> Answer:
    if call.operation == "list":
        found = await backend.list(call.path, call.data.decode() or None)
        return tuple(Entry(entry.path, entry.size, 0.0) for entry in found)
    if call.operation == "read":
        return bytes(await backend.read(call.path))
    if call.operation == "size":
        return await backend.size(call.path)
    if call.operation == "delete":
        return await backend.delete(call.path)
    return await getattr(backend, call.operation)(call.path, call.data)


def at_once(coroutine: Coroutine[object, object, Any]) -> Any:
    """Runs a coroutine that never has to wait."""
    try:
        coroutine.send(None)
    except StopIteration as stopped:
        return stopped.value
    raise AssertionError("it waits")
