"""A copy job that is told what its targets hold: only chunks that differ are copied, and all are digested."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dtruntime_torch import _C
from tests.boundaries import CHUNK_BYTES, LENGTHS
from tests.native.copy_jobs import MIB, TIMEOUT, Sources

SPOILED = 0x5A


def done(job: _C.CopyJob) -> _C.CopyJob:
    assert job.wait(timeout=TIMEOUT)
    return job


def chunks(sources: Sources, chunk_bytes: int) -> list[tuple[int, int, int]]:
    """Number of the source, start in it and length of each chunk, in the order of the digests."""
    return [
        (number, start, min(chunk_bytes, length - start))
        for number, length in enumerate(sources.lengths)
        for start in range(0, length, chunk_bytes)
    ]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(0, 5000), max_size=8),
    st.sampled_from([1, 64, 1000, CHUNK_BYTES]),
    st.integers(0, 3),
    st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    st.integers(0, 1 << 30),
)
def test_exactly_the_chunks_that_differ_are_copied(lengths, chunk_bytes, threads, fraction, seed):
    sources, random = Sources(lengths), Random(seed)
    known = done(sources.start(chunk_bytes, threads)).digests()
    changed = {chunk for chunk in chunks(sources, chunk_bytes) if random.random() < fraction}
    for number, start, length in changed:
        sources.data[number][start + random.randrange(length)] ^= 1 << random.randrange(8)
    # What is not copied keeps what it is given here.
    memoryview(sources.arena)[:] = bytes([SPOILED]) * len(sources.arena)
    job = done(sources.start(chunk_bytes, threads, known))
    assert job.digests() == sources.digests(chunk_bytes)
    assert job.nbytes_copied == sum(length for _, _, length in changed)
    assert job.chunks_skipped == len(known) // 16 - len(changed)
    assert job.nbytes_done == job.nbytes
    for number, start, length in chunks(sources, chunk_bytes):
        there = sources.arrived(number)[start : start + length]
        if (number, start, length) in changed:
            assert there == sources.data[number][start : start + length]
        else:
            assert there == bytes([SPOILED]) * length


def test_without_known_digests_all_is_copied():
    sources = Sources(LENGTHS)
    for _ in range(2):
        job = done(sources.start())
        assert (job.nbytes_copied, job.chunks_skipped) == (sum(LENGTHS), 0)


def test_the_arena_is_the_state_again_after_each_of_many_rounds():
    sources, random = Sources([3 * MIB + 7, 0, 100, MIB]), Random(3)
    known = None
    for _ in range(10):
        for data in (sources.data[0], sources.data[3]):
            data[random.randrange(len(data))] ^= 0xFF
        known = done(sources.start(1 << 16, known=known)).digests()
        assert known == sources.digests(1 << 16)
        assert [sources.arrived(number) for number in range(4)] == sources.data


@pytest.mark.parametrize("known", [b"", bytes(16), bytes(48), bytes(31)])
def test_digests_that_are_too_few_or_too_many_are_refused_and_nothing_is_copied(known):
    sources = Sources([CHUNK_BYTES + 1])
    with pytest.raises(
        ValueError, match=f"known must hold 32 bytes, 16 for each chunk, and holds {len(known)}"
    ):
        sources.start(known=known)
    assert set(memoryview(sources.arena)) == {0xAA}


def test_known_digests_are_copied_as_it_starts():
    sources = Sources([4 * MIB])
    known = bytearray(done(sources.start(4096)).digests())
    job = sources.start(4096, known=known)
    known[:] = bytes(len(known))
    assert done(job).nbytes_copied == 0
