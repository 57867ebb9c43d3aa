"""How copying in the background ends before it is done: cancelled, dropped, forked, interrupted, exited."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from dtruntime_torch import _C
from tests.native.copy_jobs import LONG, MIB, TIMEOUT, Sources, start_long


def test_cancelled_in_the_middle_it_touches_nothing_any_more(long_source):
    arena = _C.Arena(LONG)
    job = start_long(long_source, arena, threads=2)
    while job.nbytes_done < 2 * MIB:
        pass
    job.cancel()
    done = job.nbytes_done
    assert done < LONG
    canaries = bytes(range(1, 252)) * 40_000
    view = memoryview(arena)[: len(canaries)]
    view[:] = canaries
    assert _C.CopyJob(_C.Arena(MIB), [long_source.address], [MIB], [0], MIB, 2).wait(timeout=TIMEOUT)
    assert view == canaries
    assert job.nbytes_done == done


def test_cancelled_it_says_so(long_source):
    job = start_long(long_source)
    job.cancel()
    job.cancel()
    assert not job.done
    for call in (job.wait, job.digests):
        with pytest.raises(RuntimeError, match="was cancelled"):
            call()


def test_cancelled_after_it_was_done_it_stays_done():
    sources = Sources([MIB])
    job = sources.start()
    assert job.wait(timeout=TIMEOUT)
    job.cancel()
    assert job.done and job.wait()
    assert job.digests() == sources.digests()


def test_cancel_ends_who_waits_in_another_thread(long_source):
    job = start_long(long_source, threads=1)
    errors: list[str] = []
    waits = threading.Event()

    def wait() -> None:
        waits.set()
        try:
            job.wait()
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    waits.wait(TIMEOUT)
    job.cancel()
    thread.join(TIMEOUT)
    assert errors == ["the copy job was cancelled"]


def test_dropped_in_the_middle_it_lets_go_of_the_memory(long_source):
    arena = _C.Arena(LONG)
    job = start_long(long_source, arena)
    while job.nbytes_done == 0:
        pass
    with pytest.raises(BufferError):
        arena.resize(0)
    del job
    arena.resize(0)


def test_a_forked_child_is_told_and_its_parent_goes_on(long_source):
    job = start_long(long_source)
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        try:
            job.wait()
        except RuntimeError as error:
            heard = "forked" in str(error)
        del job
        own = Sources([MIB] * 3)
        fresh = own.start()
        os._exit(0 if heard and fresh.wait(timeout=50) and fresh.digests() == own.digests() else 1)
    assert os.waitpid(child, 0)[1] == 0
    before = job.nbytes_done
    while job.nbytes_done == before:
        pass
    job.cancel()


def test_done_before_the_fork_it_is_done_in_the_child():
    sources = Sources([MIB])
    job = sources.start()
    assert job.wait(timeout=TIMEOUT)
    child = os.fork()
    if child == 0:
        os._exit(0 if job.done and job.wait() and job.digests() == sources.digests() else 1)
    assert os.waitpid(child, 0)[1] == 0


INTERRUPTED = """
import os, signal, threading
from dtruntime_torch import _C

source, arena = _C.Arena(1 << 34), _C.Arena(1 << 34)
job = _C.CopyJob(arena, [source.address], [1 << 34], [0], 1 << 20, threads=1)

def interrupt():
    while job.nbytes_done < 1 << 26:
        pass
    os.kill(os.getpid(), signal.SIGINT)

try:
    threading.Thread(target=interrupt).start()
    job.wait()
except KeyboardInterrupt:
    print("interrupted", job.done)
job.cancel()
"""


def test_ctrl_c_ends_the_waiting():
    result = subprocess.run(
        [sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=TIMEOUT, check=True
    )
    assert result.stdout == "interrupted False\n"


EXITING = """
from dtruntime_torch import _C

class Late:
    def __init__(self, job):
        self.job = job
    def __del__(self):  # gives a job that still runs the time to read what is gone
        before = self.job.nbytes_done
        for _ in range(1_000_000):
            if self.job.nbytes_done != before:
                break

source, arena = _C.Arena(1 << 30), _C.Arena(1 << 30)
late = Late(_C.CopyJob(arena, [source.address], [1 << 30], [0], 1 << 20, threads=2))  # freed after what it reads
"""


def test_the_end_of_the_interpreter_ends_it():
    for _ in range(5):
        result = subprocess.run([sys.executable, "-c", EXITING], capture_output=True, timeout=TIMEOUT)
        assert (result.returncode, result.stderr) == (0, b"")


DROPPED_MEANWHILE = """
import threading
from dtruntime_torch import _C

COUNT, CHUNK = 50, 1 << 24
source = _C.Arena(CHUNK)
jobs = [_C.CopyJob(_C.Arena(CHUNK), [source.address], [CHUNK], [0], CHUNK, threads=1) for _ in range(COUNT)]
waits = threading.Event()

def drop_all():
    waits.set()
    try:
        for i in range(COUNT):
            jobs[i].wait()
    except RuntimeError:  # the end has come for the first of them
        pass
    jobs.clear()

threading.Thread(target=drop_all, daemon=True).start()
waits.wait()
"""


def test_at_the_end_of_the_interpreter_a_daemon_thread_may_drop_other_jobs():
    # What is freed is overwritten, so that nobody uses it unnoticed.
    environment = {**os.environ, "MALLOC_PERTURB_": "85"}
    for _ in range(3):
        result = subprocess.run(
            [sys.executable, "-c", DROPPED_MEANWHILE], capture_output=True, timeout=TIMEOUT, env=environment
        )
        assert (result.returncode, result.stderr) == (0, b"")
