"""A full staging from a device whose work happens late: digests at the call, compared with what arrived."""

from __future__ import annotations

import pytest
import torch

from dtruntime_torch import _C
from dtruntime_torch.checkpoint.staging import device_digests
from dtruntime_torch.checkpoint.staging.chunk_table import cut_lists
from dtruntime_torch.checkpoint.staging.stager import Stager, Staging
from dtruntime_torch.errors import SaveFailed
from tests.checkpoint.staging.late_device import LateDevice, LateStream, raw
from tests.checkpoint.staging.scattered_tensors import digests_of

CHUNK = 64
AT_THE_CALL = ["current cuda_list_chunks", "current cuda_digest", "follow_current"]


class State:
    """Three tensors on a device, in an arena of which nothing is known."""

    def __init__(self) -> None:
        self.device = LateDevice()
        self.sources = [self.device.hold(torch.arange(n, n + 30)) for n in (0, 100, 200)]
        self.arena = _C.Arena(1024)
        self.stager = Stager(self.arena, CHUNK, find_device=self.device.find)
        self.expected = [raw(source) for source in self.sources]

    def start(self) -> Staging:
        pairs = [(source, 300 * number) for number, source in enumerate(self.sources)]
        return self.stager.start(pairs, names=["weight", "bias", "table"])

    def held(self, number: int) -> bytes:
        return bytes(memoryview(self.arena)[300 * number :][:240])

    def arrived(self) -> bool:
        return [self.held(number) for number in range(3)] == self.expected

    def digests(self) -> bytes:
        return b"".join(digests_of(data, CHUNK) for data in self.expected)


@pytest.fixture
def state() -> State:
    return State()


def test_all_is_enqueued_before_start_returns_digests_on_the_current_stream_copies_on_the_side(state):
    state.start()
    assert state.device.calls == [*AT_THE_CALL, "copy", "copy", "copy", "record"]
    assert [event.waited for event in state.device.events] == [0]


def test_the_digests_are_those_of_what_arrived(state):
    assert state.start().wait() == state.digests()
    assert state.arrived()


def test_what_the_current_stream_still_computes_is_digested(state):
    state.device.current.put(lambda: state.sources[1].add_(5))
    state.expected[1] = raw(state.sources[1] + 5)
    assert state.start().wait() == state.digests()
    assert state.arrived()


def test_what_the_current_stream_is_given_after_the_call_comes_after_the_digests(state):
    """Nobody made it wait for the copies: what arrived is torn, and the digests show it."""
    staging = state.start()
    state.device.current.put(state.sources[2].zero_)
    state.device.current.run()
    with pytest.raises(SaveFailed, match=r"^table did not arrive from cpu as it was sent: bytes 600 to 664 "):
        staging.wait()
    assert staging.ended and not staging.done()


def test_what_another_stream_overwrites_behind_the_guard_fails_the_staging_by_its_name(state):
    staging = state.start()
    staging.before_overwrite()
    state.device.current.run_to(2)  # the digests are taken, nothing is copied
    other = LateStream()
    other.put(lambda: state.sources[1][29:].zero_())
    other.run()
    with pytest.raises(SaveFailed, match=r"^bias did not arrive from cpu as it was sent: bytes 492 to 540 "):
        staging.wait()


def test_a_bit_that_flips_on_the_way_fails_the_staging(state):
    def flip() -> None:
        memoryview(state.arena)[300] ^= 1

    staging = state.start()
    state.device.side.put(flip)
    state.device.side.run()
    with pytest.raises(SaveFailed, match=r"^bias did not arrive"):
        staging.wait()


def test_kernels_that_never_ran_fail_the_staging(state):
    state.device.native = type("Nothing", (), {"__getattr__": lambda self, name: lambda *_: None})()
    with pytest.raises(SaveFailed, match=r"^weight did not arrive .* had 0{32} on the device"):
        state.start().wait()


def test_after_a_torn_staging_the_next_copies_all(state):
    staging = state.start()
    state.device.current.put(state.sources[0].zero_)
    state.device.current.run()
    with pytest.raises(SaveFailed):
        staging.wait()
    state.expected[0] = bytes(240)
    again = state.start()
    assert again.wait() == state.digests() and again.nbytes_copied == 720


def test_what_does_not_lie_in_one_piece_may_be_overwritten_as_soon_as_start_returned(state):
    state.sources[0] = state.device.hold(torch.arange(30)).view(5, 6).T
    state.expected[0] = raw(state.sources[0])
    staging = state.start()
    assert state.device.calls[0] == "current as_bytes"
    state.device.current.put(state.sources[0].zero_)
    state.device.current.run()
    assert staging.wait() == state.digests()
    assert state.arrived()


def test_what_a_stream_uses_is_held_until_the_copies_have_arrived(state):
    state.sources[0] = state.device.hold(torch.arange(30)).view(5, 6).T
    staging = state.start()
    (work,) = staging._on_device
    piece = work._held[0][0]
    assert piece.nbytes == 240 and piece.data_ptr() != state.sources[0].data_ptr()
    staging.wait()
    assert not work._held


@pytest.mark.parametrize("most", [1, 2, 4, 5])
def test_more_chunks_than_a_list_can_have_are_digested_by_several(state, most, monkeypatch):
    monkeypatch.setattr(device_digests, "CHUNKS_LIMIT", most + 1)
    assert state.start().wait() == state.digests()
    assert state.device.calls.count("current cuda_digest") == -(-12 // most)


def test_lists_are_cut_at_chunks_and_hold_all_bytes():
    assert list(cut_lists([25, 10, 1], 10, 2)) == [[(0, 0, 20)], [(0, 20, 5), (1, 0, 10)], [(2, 0, 1)]]
    assert list(cut_lists([], 10, 2)) == []


@pytest.mark.parametrize("call", ["cuda_list_chunks", "cuda_digest"])
def test_a_digest_that_is_refused_leaves_nothing_in_flight(state, call):
    state.device.refuse_call = call
    with pytest.raises(SaveFailed, match=f"^weight, bias, table could not be copied from cpu .*{call}"):
        state.start()
    assert state.device.calls[-2:] == ["follow_current", "record"]
    assert state.device.events[-1].waited == 1
    state.arena.resize(2048)


def test_memory_that_a_piece_does_not_get_names_its_pair(state, monkeypatch):
    def refuse(source):
        raise RuntimeError("CUDA out of memory")

    state.sources[1] = state.device.hold(torch.arange(30)).view(5, 6).T
    monkeypatch.setattr(state.device, "as_bytes", refuse)
    with pytest.raises(SaveFailed, match=r"^bias could not be copied from cpu .*out of memory"):
        state.start()


def test_where_no_memory_can_be_pinned_the_digests_are_copied_too(state, monkeypatch):
    def refuse(nbytes):
        raise RuntimeError("out of memory")

    state.device.reaches_arenas = False
    monkeypatch.setattr(state.device, "host_memory", refuse)
    assert state.start().wait() == state.digests()
    assert state.device.calls == [*AT_THE_CALL, *["copy"] * 4, "record"]
    assert state.device.copied[0][0] == 16 * 12


def test_an_arena_that_kernels_do_not_reach_is_compared_all_the_same(state):
    state.device.reaches_arenas = False
    staging = state.start()
    state.device.current.put(state.sources[2].zero_)
    state.device.current.run()
    with pytest.raises(SaveFailed, match=r"^table did not arrive"):
        staging.wait()


def test_where_there_are_no_kernels_the_host_alone_digests(state):
    state.device.kernels = state.device.reaches_arenas = False
    assert state.start().wait() == state.digests()
    assert state.device.calls == ["follow_current", "copy", "copy", "copy", "record"]
    assert state.arrived()
