"""Copying and digesting in the background: beside PyPI xxhash, in order, waited for."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dtruntime_torch import _C
from tests.boundaries import CHUNK_BYTES, LENGTHS
from tests.native.copy_jobs import DATA, LONG, MIB, TIMEOUT, Sources, address_of, start_long


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


def test_who_does_not_help_gets_it_from_the_background():
    sources = Sources([MIB] * 4)
    job = sources.start(threads=1)
    assert job.wait([2], timeout=TIMEOUT, help=False)
    assert sources.arrived(2) == sources.data[2]
    assert job.wait(timeout=TIMEOUT, help=False)
    assert job.digests() == sources.digests()


# A thread needs megabytes of address space for its stack.
WITHOUT_THREADS = """
import os, resource
from dtruntime_torch import _C

source, arena = _C.Arena(1 << 20), _C.Arena(1 << 20)
mapped = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + (1 << 20), resource.RLIM_INFINITY))
job = _C.CopyJob(arena, [source.address], [1 << 20], [0], 1024)
print(len(os.listdir("/proc/self/task")), job.wait(help=False))
"""


def test_where_there_is_no_background_who_waits_does_it_all_the_same():
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_THREADS], capture_output=True, text=True, timeout=TIMEOUT, check=True
    )
    assert result.stdout == "1 True\n"


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


def test_its_threads_are_nicer_than_ours():
    sources = Sources([MIB])
    assert sources.start(threads=2).wait(timeout=TIMEOUT)
    threads = [int(task.name) for task in Path("/proc/self/task").iterdir()]
    names = {tid: Path(f"/proc/self/task/{tid}/comm").read_text().strip() for tid in threads}
    nice = {os.getpriority(os.PRIO_PROCESS, tid) for tid in threads if names[tid] == "dtruntime-low"}
    assert nice == {min(os.getpriority(os.PRIO_PROCESS, 0) + 10, 19)}
    others = {os.getpriority(os.PRIO_PROCESS, tid) for tid in threads if names[tid] == "dtruntime"}
    assert others <= {os.getpriority(os.PRIO_PROCESS, 0)}


CROWDED = """
from pathlib import Path
from dtruntime_torch import _C

source, arena = _C.Arena(1 << 20), _C.Arena(1 << 20)
job = _C.CopyJob(arena, [source.address], [1 << 20], [0], 1024, threads=1000)
job.wait()
print([(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()].count("dtruntime-low\\n"))
"""


def test_it_starts_no_more_threads_than_any_call_does():
    result = subprocess.run(
        [sys.executable, "-c", CROWDED], capture_output=True, text=True, timeout=TIMEOUT, check=True
    )
    assert int(result.stdout) == 256
