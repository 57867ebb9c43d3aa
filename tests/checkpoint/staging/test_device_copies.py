"""Copies from a device, on one whose work happens late: what is read when, what waits for what, and what is merged."""

from __future__ import annotations

import gc
import weakref
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dtruntime_torch import _C
from dtruntime_torch.checkpoint.staging.copy_plan import Span, merge_spans
from dtruntime_torch.checkpoint.staging.device import as_bytes, device_of
from dtruntime_torch.checkpoint.staging.stager import Stager, Staging
from dtruntime_torch.errors import BarrierTimeout, SaveFailed
from tests.checkpoint.staging.late_device import LateDevice, LateStream, raw
from tests.checkpoint.staging.scattered_tensors import digests_of

CHUNK = 64
PATIENCE = 60.0


def numbers(count: int, first: int = 0) -> torch.Tensor:
    return torch.arange(first, first + count, dtype=torch.int64)


class Bench:
    """An arena, a stager into it, and a device."""

    def __init__(self, nbytes: int = 4096) -> None:
        self.arena = _C.Arena(nbytes)
        self.device = LateDevice()
        self.stager = Stager(self.arena, CHUNK, find_device=self.device.find)

    def start(self, *pairs: tuple[torch.Tensor, int]) -> Staging:
        return self.stager.start(pairs)

    def held(self, offset: int, length: int) -> bytes:
        return bytes(memoryview(self.arena)[offset : offset + length])


@pytest.fixture
def bench() -> Bench:
    # A staging of an earlier test that dies in this one would keep the frames in which it does, and what is in them.
    gc.collect()
    return Bench()


def test_nothing_arrives_before_somebody_waits(bench):
    source = bench.device.hold(numbers(10))
    staging = bench.start((source, 8))
    assert bench.held(8, 80) == bytes(80)
    assert not staging.done() and staging.nbytes_done == 0
    staging.wait()
    assert bench.held(8, 80) == raw(source)
    assert staging.done() and staging.nbytes_done == staging.nbytes == 80


def test_the_arena_is_digested_after_the_copies_have_arrived(bench):
    source = bench.device.hold(numbers(30))
    digests = bench.start((source, 8)).wait()
    assert digests == digests_of(raw(source), CHUNK)


def test_what_the_current_stream_still_computes_is_staged(bench):
    source = bench.device.hold(numbers(10))
    bench.device.current.put(lambda: source.add_(5))
    bench.start((source, 0)).wait()
    assert bench.held(0, 80) == raw(numbers(10, first=5))


def test_what_the_current_stream_is_given_after_before_overwrite_waits_for_the_copies(bench):
    source = bench.device.hold(numbers(10))
    staging = bench.start((source, 0))
    staging.before_overwrite([0])
    bench.device.current.put(source.zero_)
    bench.device.current.run()
    assert not source.any()
    staging.wait()
    assert bench.held(0, 80) == raw(numbers(10))


def test_a_stream_that_was_not_held_runs_ahead(bench):
    """The seam shows what it is there to show."""
    source = bench.device.hold(numbers(10))
    staging = bench.start((source, 0))
    bench.device.current.put(source.zero_)
    bench.device.current.run()
    with pytest.raises(SaveFailed):
        staging.wait()
    assert bench.held(0, 80) == bytes(80)


def test_the_stream_that_is_current_then_is_the_one_held(bench):
    source = bench.device.hold(numbers(10))
    staging = bench.start((source, 0))
    bench.device.current = LateStream()
    staging.before_overwrite()
    bench.device.current.put(source.zero_)
    bench.device.current.run()
    staging.wait()
    assert bench.held(0, 80) == raw(numbers(10))


def test_before_overwrite_does_not_block_the_thread(bench):
    staging = bench.start((bench.device.hold(numbers(10)), 0))
    staging.before_overwrite()
    assert [event.waited for event in bench.device.events] == [0]
    assert bench.held(0, 80) == bytes(80)


def test_before_overwrite_of_a_host_source_holds_no_stream(bench):
    source = bench.device.hold(numbers(10))
    staging = bench.start((source, 0), (numbers(4), 80))
    staging.before_overwrite([1], PATIENCE)
    bench.device.current.run()
    assert bench.held(0, 112) == bytes(80) + raw(numbers(4))
    staging.wait()


def test_sources_of_all_kinds_are_digested_in_the_order_of_the_pairs(bench):
    host, strided = numbers(20), numbers(12).view(3, 4).T
    device, turned = bench.device.hold(numbers(11)), bench.device.hold(numbers(6, 50)).view(2, 3).T
    pairs = [(turned, 3001), (host, 1000), (strided, 2000), (torch.empty(0), 7), (device, 13)]
    digests = bench.start(*pairs).wait()
    assert digests == b"".join(digests_of(raw(source), CHUNK) for source, _ in pairs)
    for source, offset in pairs:
        assert bench.held(offset, source.nbytes) == raw(source)


def test_a_conjugated_device_tensor_arrives_resolved(bench):
    source = bench.device.hold(torch.tensor([1 + 2j, 3 - 4j]))
    bench.start((source.conj(), 0), (source.conj().imag, 16)).wait()
    assert bench.held(0, 16) == raw(torch.tensor([1 - 2j, 3 + 4j]))
    assert bench.held(16, 8) == raw(torch.tensor([-2.0, 4.0]))


def test_neighbours_in_one_storage_are_one_copy(bench):
    flat = bench.device.hold(numbers(30))
    bench.start((flat[10:20], 180), (flat[:10], 100), (flat[20:], 260)).wait()
    assert [nbytes for nbytes, _ in bench.device.copied] == [240]
    assert bench.held(100, 240) == raw(flat)


def test_neighbours_in_different_storages_are_copied_each(bench):
    one, other = bench.device.hold(numbers(10)), bench.device.hold(numbers(10, 50))
    bench.start((one, 0), (other, 80)).wait()
    assert bench.held(0, 160) == raw(one) + raw(other)
    assert len(bench.device.copied) == 2


def test_a_refused_copy_names_its_pair_and_leaves_nothing_in_flight(bench):
    one, other = bench.device.hold(numbers(10)), bench.device.hold(numbers(10, 50))
    bench.device.refuse = 1
    with pytest.raises(SaveFailed, match=r"^pair 2 could not be copied from cpu .*out of memory"):
        bench.start((numbers(100), 800), (one, 0), (other, 80))
    assert bench.held(0, 80) == raw(one)
    bench.arena.resize(100)
    bench.device.refuse = None
    bench.start((other, 0)).wait()
    assert bench.held(0, 80) == raw(other)


def test_a_failure_of_the_device_comes_back_from_wait_and_ends_the_staging(bench):
    source = bench.device.hold(numbers(10))
    staging = bench.start((numbers(10), 80), (source, 0))
    bench.device.fail("CUDA error: uncorrectable ECC error")
    for _ in range(2):
        with pytest.raises(SaveFailed, match=r"pair 1 could not .*ECC"):
            staging.wait()
    assert staging.ended and not staging.done()
    bench.arena.resize(200)
    bench.start((source, 0)).wait()


def test_a_failure_of_the_device_comes_back_from_before_overwrite(bench):
    staging = bench.start((bench.device.hold(numbers(10)), 0))
    bench.device.fail("CUDA error: uncorrectable ECC error")
    with pytest.raises(SaveFailed, match=r"pair 0 could not .*ECC"):
        staging.before_overwrite()


def test_a_wait_with_a_timeout_asks_until_the_copies_have_arrived(bench):
    source = bench.device.hold(numbers(10))
    staging = bench.start((source, 0))
    bench.device.events[0].queries = 3
    staging.wait(PATIENCE)
    assert bench.device.events[0].waited == 0
    assert bench.held(0, 80) == raw(source)


def test_a_wait_that_is_over_leaves_the_staging_as_it_is(bench):
    source = bench.device.hold(numbers(10))
    staging = bench.start((source, 0))
    with pytest.raises(BarrierTimeout, match="0 of 80 bytes"):
        staging.wait(0)
    assert not staging.ended
    staging.wait()
    assert bench.held(0, 80) == raw(source)


def test_the_arena_keeps_its_memory_until_the_copies_have_arrived(bench):
    staging = bench.start((bench.device.hold(numbers(10)), 0))
    assert not staging.done()
    with pytest.raises(BufferError):
        bench.arena.resize(100_000)
    staging.wait()
    bench.arena.resize(100_000)


def test_cancel_waits_for_what_a_device_was_given(bench):
    source = bench.device.hold(numbers(10))
    staging = bench.start((source, 0))
    staging.cancel()
    assert bench.held(0, 80) == raw(source)
    with pytest.raises(SaveFailed, match="cancelled"):
        staging.wait()


def test_a_cancel_that_is_over_says_that_a_device_still_copies(bench):
    source = bench.device.hold(numbers(10))
    staging = bench.start((source, 0))
    with pytest.raises(BarrierTimeout):
        staging.cancel(0)
    assert not staging.ended
    staging.cancel()
    assert staging.ended


def test_a_dropped_staging_is_cancelled(bench):
    source = bench.device.hold(numbers(10))
    bench.start((source, 0))
    bench.stager = None
    assert bench.held(0, 80) == raw(source)


def test_a_source_is_held_until_it_has_been_copied(bench):
    source = bench.device.hold(numbers(10))
    died: list[None] = []
    staging = bench.start((source, 0))
    weakref.finalize(source, died.append, None)
    del source
    assert not died
    staging.wait()
    assert died


@given(st.data())
def test_merged_spans_move_the_same_bytes_and_cannot_be_merged_further(data):
    spans, offset = [], 0
    for pair in range(data.draw(st.integers(0, 8))):
        nbytes = data.draw(st.integers(1, 4))
        offset += data.draw(st.sampled_from([0, 0, 1]))
        start = data.draw(st.sampled_from([offset, offset, offset + 7, 0]))
        spans.append(Span(pair, data.draw(st.sampled_from([0, 0, 1])), start, nbytes, offset))
        offset += nbytes
    merged = merge_spans(data.draw(st.permutations(spans)))

    def moves(spans):
        return {s.offset + i: (s.storage, s.start + i) for s in spans for i in range(s.nbytes)}

    assert moves(merged) == moves(spans)
    assert sum(span.nbytes for span in merged) == sum(span.nbytes for span in spans)
    for one, other in pairwise(merged):
        ends = (one.storage, one.start + one.nbytes, one.offset + one.nbytes)
        assert ends != (other.storage, other.start, other.offset)


def test_the_bytes_of_a_contiguous_tensor_are_its_own():
    source = torch.zeros(3, dtype=torch.float64)
    assert as_bytes(source).data_ptr() == source.data_ptr()


def test_host_memory_is_no_device():
    assert device_of(numbers(1)) is None
