"""Copying and digesting in the background: beside PyPI xxhash, in order, cancelled, forked, interrupted."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from dtruntime_torch import _C
from tests.boundaries import CHUNK_BYTES, LENGTHS

MIB = 1 << 20
DATA = bytearray(Random(1).randbytes(8 * MIB + 11))
TIMEOUT = 120.0
# More than any machine copies between two statements.
LONG = 1 << 30


def address_of(data: bytearray, offset: int = 0) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(data)) + offset


def chunked(data: bytes | bytearray, chunk_bytes: int) -> bytes:
    chunks = (data[i : i + chunk_bytes] for i in range(0, len(data), chunk_bytes))
    return b"".join(xxhash.xxh3_128_digest(chunk) for chunk in chunks)


class Sources:
    """Sources of these lengths, and where they go in an arena: with gaps of 3 bytes, whose bytes are canaries."""

    def __init__(self, lengths: list[int]) -> None:
        self.data = [bytearray(DATA[i : i + n]) for i, n in enumerate(lengths)]
        self.lengths = lengths
        self.offsets = [sum(lengths[:i]) + 3 * (i + 1) for i in range(len(lengths))]
        self.arena = _C.Arena(sum(lengths) + 3 * (len(lengths) + 1))
        memoryview(self.arena)[:] = b"\xaa" * len(self.arena)

    def start(self, chunk_bytes: int = CHUNK_BYTES, threads: int = 0) -> _C.CopyJob:
        addresses = [address_of(data) if data else 0 for data in self.data]
        return _C.CopyJob(self.arena, addresses, self.lengths, self.offsets, chunk_bytes, threads)

    def arrived(self, i: int) -> bytes:
        return bytes(memoryview(self.arena)[self.offsets[i] : self.offsets[i] + self.lengths[i]])

    def digests(self, chunk_bytes: int = CHUNK_BYTES) -> bytes:
        return b"".join(chunked(data, chunk_bytes) for data in self.data)


@pytest.fixture(scope="module")
def long_source() -> _C.Arena:
    return _C.Arena(LONG)  # all of it the one page of zeros: reading it takes no memory


def start_long(source: _C.Arena, arena: _C.Arena | None = None, threads: int = 1) -> _C.CopyJob:
    """One that takes far longer than a test needs to look at it; its targets take as much memory as it gets to."""
    target = arena or _C.Arena(LONG)
    return _C.CopyJob(target, [source.address], [LONG], [0], MIB, threads)


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_it_copies_and_digests_every_length(threads):
    sources = Sources(LENGTHS)
    job = sources.start(threads=threads)
    assert job.wait(timeout=TIMEOUT)
    assert job.digests() == sources.digests()
    assert [sources.arrived(i) for i in range(len(LENGTHS))] == sources.data


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.integers(0, 5000), max_size=12),
    st.sampled_from([1, 64, 1000, CHUNK_BYTES]),
    st.integers(0, 3),
)
def test_it_agrees_with_xxhash(lengths, chunk_bytes, threads):
    sources = Sources(lengths)
    job = sources.start(chunk_bytes, threads)
    assert job.wait(timeout=TIMEOUT)
    assert job.digests() == sources.digests(chunk_bytes)


def test_what_lies_between_the_targets_stays_as_it_is():
    sources = Sources([5000, 1, 0, 70_000, 3])
    assert sources.start().wait(timeout=TIMEOUT)
    ends = [0, *(offset + length for offset, length in zip(sources.offsets, sources.lengths, strict=True))]
    assert [bytes(memoryview(sources.arena)[end : end + 3]) for end in ends] == [b"\xaa" * 3] * len(ends)


def test_a_source_may_be_overwritten_as_soon_as_it_was_waited_for():
    sources = Sources([MIB + i for i in range(16)])
    expected, digests = [bytes(data) for data in sources.data], sources.digests()
    job = sources.start()
    for i in [15, 3, *range(16)]:
        assert job.wait([i], timeout=TIMEOUT)
        ctypes.memset(address_of(sources.data[i]), 0, sources.lengths[i])
    assert [sources.arrived(i) for i in range(16)] == expected
    assert job.digests() == digests


def test_the_background_takes_the_copies_in_order(long_source):
    """With one thread at work a copy is begun when all before it are done."""
    sources = [long_source.address] * 64
    arena = _C.Arena(64 * MIB)
    job = _C.CopyJob(arena, sources, [MIB] * 64, [i * MIB for i in range(64)], MIB, threads=1)
    while True:
        finished = [job.wait([i], timeout=0) for i in reversed(range(64))][::-1]
        # Asked from the last to the first, so that what is done meanwhile can only look earlier.
        assert finished == sorted(finished, reverse=True)
        if all(finished):
            break


def test_who_waits_gets_what_he_waits_for_first(long_source):
    arena = _C.Arena(LONG)
    job = _C.CopyJob(arena, [long_source.address] * 2, [LONG - MIB, MIB], [0, LONG - MIB], MIB, threads=1)
    assert job.wait([1], timeout=TIMEOUT)
    assert not job.done
    assert job.nbytes_done < job.nbytes
    job.cancel()


def test_its_progress_ends_at_all_bytes():
    sources = Sources([3 * MIB, 0, 7])
    job = sources.start()
    assert job.nbytes == 3 * MIB + 7
    seen = [job.nbytes_done]
    while not job.done:
        seen.append(job.nbytes_done)
    assert seen == sorted(seen)
    assert job.nbytes_done == job.nbytes


def test_it_finishes_without_anyone_who_waits():
    sources = Sources([MIB] * 4)
    job = sources.start()
    while not job.done:
        pass
    assert job.digests() == sources.digests()


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]])
def test_without_bytes_it_is_done_at_once(lengths):
    job = Sources(lengths).start()
    assert job.done
    assert job.wait(timeout=0)
    assert job.digests() == b""


def test_many_jobs_run_at_once():
    many = [Sources([300_000 + i, 7, 65_536]) for i in range(12)]

    def run(sources: Sources) -> bool:
        job = sources.start(threads=2)
        return job.wait(timeout=TIMEOUT) and job.digests() == sources.digests()

    with ThreadPoolExecutor(6) as executor:
        assert list(executor.map(run, many)) == [True] * 12


def test_a_time_out_is_false_and_the_job_goes_on(long_source):
    job = start_long(long_source)
    assert job.wait(timeout=0) is False
    assert job.wait(timeout=-1) is False
    assert job.wait(timeout=0.001) is False
    assert job.wait([], timeout=0) is True
    before = job.nbytes_done
    while job.nbytes_done == before:
        pass
    job.cancel()


def test_digests_before_it_is_done_are_refused(long_source):
    job = start_long(long_source)
    with pytest.raises(ValueError, match=f"not done: [0-9]+ of {LONG} bytes"):
        job.digests()
    job.cancel()


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


def test_the_arena_is_free_once_it_is_seen_to_be_done():
    sources = Sources([MIB])
    jobs = [sources.start() for _ in range(3)]
    jobs[0].wait()
    jobs[1].wait([0])
    while not jobs[2].done:
        pass
    sources.arena.resize(0)
    assert jobs[0].digests() == sources.digests()


def test_it_keeps_the_arena_alive(long_source):
    job = start_long(long_source)  # which nobody else holds
    before = job.nbytes_done
    while job.nbytes_done == before:
        pass
    job.cancel()


@pytest.mark.parametrize(
    ("lengths", "offsets", "message"),
    [
        ([8, 8], [0, 7], "overlaps"),
        ([8, 8], [0, 57], "ends after the 64 bytes"),
        ([8, 8], [0, 1 << 62], "ends after"),
        ([8, -1], [0, 8], "a length"),
        ([8, 8], [-1, 8], "an offset"),
        ([8], [0, 8], "differ in number"),
        ([8, 8], [0], "differ in number"),
    ],
)
def test_what_cannot_be_copied_is_refused_before_anything_is(lengths, offsets, message):
    arena, source = _C.Arena(64), bytearray(b"x" * 64)
    with pytest.raises(ValueError, match=message):
        _C.CopyJob(arena, [address_of(source)] * 2, lengths, offsets, 4)
    assert bytes(arena) == bytes(64)
    arena.resize(10_000)


def test_bad_arguments_are_refused():
    arena, address = _C.Arena(64), address_of(DATA)
    with pytest.raises(ValueError, match="null"):
        _C.CopyJob(arena, [0], [1], [0], 4)
    for chunk_bytes in (0, -1):
        with pytest.raises(ValueError, match="chunk_bytes"):
            _C.CopyJob(arena, [address], [1], [0], chunk_bytes)
    with pytest.raises(ValueError, match="threads"):
        _C.CopyJob(arena, [address], [1], [0], 4, -1)
    with pytest.raises(TypeError, match="Arena"):
        _C.CopyJob(bytearray(64), [address], [1], [0], 4)


def test_there_is_no_waiting_for_copies_that_are_not():
    job = Sources([5, 5]).start()
    for number in (2, -1, 1 << 40):
        with pytest.raises(IndexError, match=f"copy {number} of 2"):
            job.wait([0, number])
    with pytest.raises(ValueError, match="timeout"):
        job.wait(timeout=float("nan"))


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


def test_its_threads_are_nicer_than_ours():
    sources = Sources([MIB])
    assert sources.start(threads=2).wait(timeout=TIMEOUT)
    threads = [int(task.name) for task in Path("/proc/self/task").iterdir()]
    names = {tid: Path(f"/proc/self/task/{tid}/comm").read_text().strip() for tid in threads}
    nice = {os.getpriority(os.PRIO_PROCESS, tid) for tid in threads if names[tid] == "dtruntime-low"}
    assert nice == {min(os.getpriority(os.PRIO_PROCESS, 0) + 10, 19)}
    others = {os.getpriority(os.PRIO_PROCESS, tid) for tid in threads if names[tid] == "dtruntime"}
    assert others <= {os.getpriority(os.PRIO_PROCESS, 0)}


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
