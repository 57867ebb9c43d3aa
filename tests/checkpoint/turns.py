"""Whole jobs, threads and all, whose storage calls take turns: which job's call comes next is drawn."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from dtruntime_torch.storage import StorageBackend
from dtruntime_torch.testing.faulty_backend import Call, FaultyBackend
from tests.checkpoint.mortal import Dead

PATIENCE = 60.0  # seconds, after which a test has failed


class Turns:
    """Lets jobs make their calls one at a time.

    Args:
        inner: the storage of all of them.
        seed: of what is drawn.
        after_each: called when a call has ended, while none is under way.
    """

    def __init__(self, inner: StorageBackend, seed: int, after_each: Callable[[], None]) -> None:
        self._inner = inner
        self._chance = random.Random(seed)
        self._after_each = after_each
        self._changed = threading.Condition()
        self._asking: dict[int, list[Future[bool]]] = {}
        self._ended: set[int] = set()
        self._dead: set[int] = set()
        self._running = 0

    def run(self, jobs: Sequence[Callable[[StorageBackend], None]]) -> list[BaseException | None]:
        """Runs all jobs to their ends; returns what each raised."""
        ends: list[BaseException | None] = [None] * len(jobs)

        def live(i: int) -> None:
            backend = FaultyBackend(self._inner)
            backend.when("*", "*", lambda call: self._take_turn(i, call), nth=None)
            try:
                jobs[i](backend)
            except BaseException as error:
                ends[i] = error
            with self._changed:
                self._ended.add(i)
                self._changed.notify_all()

        threads = [threading.Thread(target=live, args=(i,), daemon=True) for i in range(len(jobs))]
        for thread in threads:
            thread.start()
        while self._let_one_go(len(jobs)):
            self._after_each()
        for thread in threads:
            thread.join()
        return ends

    async def _take_turn(self, i: int, call: Call) -> object:
        asked: Future[bool] = Future()
        with self._changed:
            self._asking.setdefault(i, []).append(asked)
            self._changed.notify_all()
        try:
            if not await asyncio.wrap_future(asked):
                raise Dead
            result = await call.proceed()
            if call.operation == "create" and self._chance.random() < 0.1:
                raise call.error("was done, but its answer is lost")
            return result
        finally:
            with self._changed:
                if asked in self._asking[i]:
                    # Given up by its job, as a read beside one that failed is, before its turn came.
                    self._asking[i].remove(asked)
                else:
                    self._running -= 1
                self._changed.notify_all()

    def _let_one_go(self, jobs: int) -> bool:
        """One call of a job that is drawn, to its end; False once all jobs have ended."""
        with self._changed:
            settled = self._changed.wait_for(lambda: self._is_settled(jobs), PATIENCE)
            assert settled, "a job neither calls nor ends"
            asking = sorted(i for i, calls in self._asking.items() if calls)
            if not asking:
                return False
            i = self._chance.choice(asking)
            if self._chance.random() < 0.003:
                self._dead.add(i)
            asked = self._asking[i][0]
            if not asked.set_running_or_notify_cancel():
                # Given up this very moment: it takes itself away.
                gone = self._changed.wait_for(lambda: asked not in self._asking[i], PATIENCE)
                assert gone, "a call that was given up does not end"
                return True
            self._running += 1
            self._asking[i].remove(asked)
            asked.set_result(i not in self._dead)
            assert self._changed.wait_for(lambda: not self._running, PATIENCE), "a call does not end"
            return True

    def _is_settled(self, jobs: int) -> bool:
        return all(self._asking.get(i) or i in self._ended for i in range(jobs))
