"""What `save_async` gives back: the save that is under way, and what it cost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

from dtruntime_torch.checkpoint.info import CheckpointInfo
from dtruntime_torch.errors import BarrierTimeout, SaveSkipped


@dataclass(slots=True)
class SaveMetrics:
    """What a save cost this rank. Each figure is there once its phase has ended.

    Attributes:
        staged_bytes: bytes copied into the arena.
        skipped_chunks: chunks that were not copied, for the arena had them already.
        changed_bytes: bytes of the chunks that differ from the last committed save; all, if that has another structure
            or was not saved by this manager.
        written_bytes: bytes of the data file that this rank wrote.
        wait_seconds: how long the call waited for the save before it.
        staging_seconds: how long it took until all was copied and digested, in the background for the most part.
        call_seconds: how long the call took altogether, waiting included.
        door_seconds: how long steps of optimizers, and `before_update`, waited for what was still to be copied; of what
            lies on a device only the host's share, not how long its stream waits.
        writing_seconds: how long making the part durable took, in the background.
        commit_seconds: how long waiting for the other ranks and committing took, in the background.
    """

    staged_bytes: int = 0
    skipped_chunks: int = 0
    changed_bytes: int = 0
    written_bytes: int = 0
    wait_seconds: float = 0.0
    staging_seconds: float = 0.0
    call_seconds: float = 0.0
    door_seconds: float = 0.0
    writing_seconds: float = 0.0
    commit_seconds: float = 0.0

    @property
    def stall_seconds(self) -> float:
        """How long the save has kept training waiting: the call, and steps after it."""
        return self.call_seconds + self.door_seconds


class SaveHandle:
    """A save that goes on in the background; awaitable."""

    def __init__(
        self,
        step: int,
        metrics: SaveMetrics,
        future: Future[CheckpointInfo],
        is_staged: Callable[[], bool],
    ) -> None:
        self.step = step
        self.metrics = metrics
        self._is_staged = is_staged
        self._future = future
        self._seen = False

    @classmethod
    def failed(cls, step: int, metrics: SaveMetrics, reason: Exception) -> SaveHandle:
        """Of a save that was not begun."""
        future: Future[CheckpointInfo] = Future()
        future.set_exception(reason)
        return cls(step, metrics, future, lambda: True)

    def result(self, timeout: float | None = None) -> CheckpointInfo:
        """Waits for the commit.

        Args:
            timeout: seconds to wait; None waits as long as the save takes, which the manager's time-out bounds.

        Raises:
            BarrierTimeout: the save still goes on after `timeout` seconds.
            SaveSkipped: the one before it was still under way, on some rank, and `on_busy` is "skip".
            DTRuntimeError: the save failed, with the reason.
        """
        if wait([self._future], timeout).not_done:
            raise BarrierTimeout(f"the save of step {self.step} still goes on after {timeout} s; wait longer")
        self._seen = True
        return self._future.result()

    def __await__(self) -> Generator[Any, None, CheckpointInfo]:
        return self._outcome().__await__()

    async def _outcome(self) -> CheckpointInfo:
        ended = asyncio.wrap_future(self._future)
        # Looked at here, so that asyncio does not log it as lost when nobody waits any more.
        ended.add_done_callback(lambda future: future.cancelled() or future.exception())
        # Unlike an await, this leaves the save alone when the one who waits is cancelled.
        await asyncio.wait([ended])
        return self.result()

    def done(self) -> bool:
        """Whether the save has ended, well or not."""
        return self._future.done()

    def staged(self) -> bool:
        """Whether nothing of the state is read any more, so that it may be changed in any way."""
        return self._is_staged()

    def add_done_callback(self, callback: Callable[[SaveHandle], object]) -> None:
        """Calls `callback(self)` when the save has ended, in the thread that ends it.

        There the manager refuses to save, to load and to close, for it would wait for itself.
        """
        self._future.add_done_callback(lambda _: callback(self))

    def mark_seen(self) -> None:
        """Notes that somebody was told how the save ended."""
        self._seen = True

    def unseen_failure(self) -> BaseException | None:
        """The error of a save that has ended and whose failure nobody was told of by `result` or `await`.

        That one was skipped is none: the user asked for it.
        """
        if self._seen or not self._future.done():
            return None
        failure = self._future.exception()
        return None if isinstance(failure, SaveSkipped) else failure
