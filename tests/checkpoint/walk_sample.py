"""Random interleavings, where walking all of them would not end: each run is lived through once."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from dtruntime_torch.errors import DTRuntimeError
from tests.checkpoint.walk import Job, Judged, Memory, broken, told_by
from tests.checkpoint.walk_storage import Answer, Call, Disk, Scheduled, come_late, ways

MOST_CALLS = 400  # after which a process stops for ever, if it does


class Living:
    """A process that goes on as it is answered."""

    def __init__(self, number: int, jobs: Sequence[Job], lost: int, stops_after: int | None) -> None:
        self.memory = Memory(number)
        self.lost = lost
        self.call: Call | None = None
        self._jobs = list(jobs)
        self._stops_after = stops_after
        self._coroutine: Any = None
        self._begin()

    def go_on(self, answer: Answer) -> None:
        assert self.call is not None
        self.memory.notice(self.call)
        if self._stops_after is not None:
            self._stops_after -= 1
        try:
            failed = isinstance(answer, type)
            self.call = (
                self._coroutine.throw(answer("as answered")) if failed else self._coroutine.send(answer)
            )
        except StopIteration:
            self._begin()
        except DTRuntimeError as error:
            self.memory.kinds |= {type(error).__name__}
            self.call = None

    @property
    def may_go_on(self) -> bool:
        return self.call is not None and self._stops_after != 0

    def _begin(self) -> None:
        self.call = None
        while self._jobs and self.call is None:
            self._coroutine = self._jobs.pop(0)(Scheduled(), self.memory)
            try:
                self.call = self._coroutine.send(None)
            except StopIteration:
                continue


class Sample:
    """Runs whose order is drawn, some of whose processes stop for ever.

    Args:
        jobs: of each process, one after the other.
        judge: looks at a disk.
        lost: how many creates of each process may lose their answer.
        seed: of what is drawn.

    Attributes:
        kinds: how saves ended.
        path: the calls that led to the violation.
    """

    def __init__(
        self, jobs: Sequence[Sequence[Job]], judge: Callable[[dict[str, bytes]], Judged], lost: int, seed: int
    ) -> None:
        self._jobs = jobs
        self._judge = judge
        self._lost = lost
        self._chance = random.Random(seed)
        self.kinds: set[str] = set()
        self.path: list[str] = []

    def run(self) -> tuple[str | None, Disk]:
        """One run; returns the first violation, or None, and the disk at its end."""
        chance = self._chance
        processes = [
            Living(i, jobs, self._lost, chance.choice([None, chance.randrange(MOST_CALLS)]))
            for i, jobs in enumerate(self._jobs, 1)
        ]
        disk, judged = Disk(), self._judge({})
        self.path = []
        while going := [process for process in processes if process.may_go_on]:
            disk_before = disk
            if disk.late and chance.random() < 0.1:
                disk = chance.choice(come_late(disk))
                self.path.append("a create comes late")
            else:
                process = chance.choice(going)
                disk = self._step(process, disk)
            if disk != disk_before:
                was_live = bool(judged.live)
                judged = self._judge(dict(disk.files))
                found = broken(was_live, judged, [told_by(process.memory) for process in processes])
                if found:
                    return found, disk
        for process in processes:
            self.kinds |= process.memory.kinds
        return None, disk

    def _step(self, process: Living, disk: Disk) -> Disk:
        """The next call of a process, or a few of them: where all take turns at each call, nobody gets far."""
        for _ in range(self._chance.choice([1, 1, 3, 10])):
            call = process.call
            if call is None or not process.may_go_on:
                break
            chances = list(ways(disk, call, process.lost > 0))
            # An answer is lost now and then.
            then, answer, lost = chances[0] if self._chance.random() < 0.7 else self._chance.choice(chances)
            self.path.append(f"process {process.memory.number}: {call.operation} {call.path}")
            process.lost -= lost
            process.go_on(answer)
            if then != disk:
                return then
        return disk
