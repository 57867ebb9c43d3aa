"""A staging that a signal, a fork or a lack of threads breaks into: no lock, no copy and no hang is left behind."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from dtruntime_torch import _C
from dtruntime_torch.checkpoint.staging import stager as stager_module
from dtruntime_torch.checkpoint.staging.stager import Stager, Staging

NBYTES = 1 << 20


class InterruptedLock:
    """Sends the signal of Ctrl-C when the lock has been taken and its caller does not know it yet."""

    def __init__(self, lock) -> None:
        self._lock = lock
        self.sent = False

    def acquire(self, timeout: float = -1) -> bool:
        taken = self._lock.acquire(timeout=timeout)
        if not self.sent:
            self.sent = True
            signal.raise_signal(signal.SIGINT)
        return taken

    def release(self) -> None:
        self._lock.release()


def test_an_interrupt_as_the_lock_is_taken_gives_it_back():
    source = torch.ones(NBYTES, dtype=torch.uint8)
    staging = Stager(_C.Arena(NBYTES), NBYTES).start([(source, 0)])
    staging._ending = InterruptedLock(staging._ending)
    with pytest.raises(KeyboardInterrupt):
        staging.wait()
    assert len(staging.wait(timeout=60)) == 16


def test_an_interrupt_while_a_staging_is_made_leaves_no_copy_under_way(monkeypatch):
    jobs = []

    def interrupted(self, arena, sources, job, chunk_bytes, threads):
        jobs.append(job)
        raise KeyboardInterrupt

    monkeypatch.setattr(stager_module.Staging, "__init__", interrupted)
    source = torch.ones(64 * NBYTES, dtype=torch.uint8)
    with pytest.raises(KeyboardInterrupt):
        Stager(_C.Arena(64 * NBYTES), 4096).start([(source, 0)])
    (job,) = jobs
    copied = job.nbytes_done
    if copied < source.nbytes:
        with pytest.raises(RuntimeError, match="cancelled"):
            job.wait()
    assert job.nbytes_done == copied


def test_a_forked_child_that_drops_a_staging_does_not_wait_for_it(monkeypatch):
    ended: list[Staging] = []
    monkeypatch.setattr(Staging, "cancel", lambda self, timeout=None: ended.append(self))
    staging = Stager(_C.Arena(8), 8).start([(torch.ones(8, dtype=torch.uint8), 0)])
    monkeypatch.setattr(os, "getpid", lambda: staging._process + 1)
    staging.__del__()
    assert not ended
    monkeypatch.undo()
    staging.wait()
