"""Copy jobs whose background threads get nowhere: what is late is copied as late as can be, however fast the machine is."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from dtruntime_torch import _C
from dtruntime_torch.checkpoint.specs import digest_length

_CopyJob = _C.CopyJob


class LateJobs:
    """Makes them. A copy is made when somebody asks for it who helps, or all are when `release` was called.

    Attributes:
        asked: the numbers of the copies that were asked for by those who help, in order.
        least_timeout: who helps for less long, in seconds, gets nowhere either.
    """

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.least_timeout = 0.0
        self.changed = threading.Condition(threading.RLock())
        self.released = False

    def __call__(self, *arguments: object, hold: bool = False) -> LateJob:
        return LateJob(self, *arguments)

    def release(self) -> None:
        """Lets the background go on."""
        with self.changed:
            self.released = True
            self.changed.notify_all()


@contextmanager
def late_copies() -> Iterator[LateJobs]:
    """In here copies get nowhere in the background until they are released."""
    made = LateJobs()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_C, "CopyJob", made)
        try:
            yield made
        finally:
            # A test that failed has not done it, and the manager waits for its save.
            made.release()


class LateJob:
    """As `_C.CopyJob`, one native job for each copy."""

    def __init__(
        self,
        jobs: LateJobs,
        arena: _C.Arena,
        sources: Sequence[int],
        lengths: Sequence[int],
        offsets: Sequence[int],
        chunk_bytes: int,
        threads: int,
        known: bytes | None = None,
    ) -> None:
        self._jobs = jobs
        self._cancelled = False
        self._arguments = []
        start = 0
        for source, length, offset in zip(sources, lengths, offsets, strict=True):
            stop = start + digest_length(length, chunk_bytes)
            held = None if known is None else known[start:stop]
            self._arguments.append((arena, [source], [length], [offset], chunk_bytes, threads, held))
            start = stop
        self._made: dict[int, _C.CopyJob] = {}

    def wait(self, copies: list[int] | None = None, timeout: float | None = None, help: bool = True) -> bool:
        with self._jobs.changed:
            if not help and not self._jobs.changed.wait_for(self._may_go_on, timeout):
                return False
            if help and timeout is not None and timeout < self._jobs.least_timeout:
                return False
            for number in range(len(self._arguments)) if copies is None else copies:
                if self._cancelled:
                    raise RuntimeError("the copy job was cancelled")
                if help:
                    self._jobs.asked.append(number)
                if number not in self._made:
                    self._made[number] = _CopyJob(*self._arguments[number])
                    assert self._made[number].wait(timeout=60)
            self._jobs.changed.notify_all()
        return True

    def _may_go_on(self) -> bool:
        return self._jobs.released or self._cancelled or self.done

    def release(self) -> None:
        """That is for `LateJobs.release` to say."""

    @property
    def done(self) -> bool:
        return len(self._made) == len(self._arguments)

    @property
    def nbytes_done(self) -> int:
        return sum(job.nbytes_done for job in self._made.values())

    @property
    def nbytes_copied(self) -> int:
        return sum(job.nbytes_copied for job in self._made.values())

    @property
    def chunks_skipped(self) -> int:
        return sum(job.chunks_skipped for job in self._made.values())

    def digests(self) -> bytes:
        return b"".join(self._made[number].digests() for number in range(len(self._arguments)))

    def cancel(self) -> None:
        with self._jobs.changed:
            self._cancelled = True
            self._jobs.changed.notify_all()
