"""What may come late from a device comes last, behind an event of its own; and nothing waits inside a CUDA graph."""

from __future__ import annotations

import pytest
import torch

from dtruntime_torch import _C
from dtruntime_torch.checkpoint.staging.stager import Stager, Staging
from dtruntime_torch.errors import InvalidArgument, SaveFailed
from tests.checkpoint.staging.late_device import LateDevice, raw
from tests.checkpoint.staging.scattered_tensors import digests_of

CHUNK = 64
AT_THE_CALL = ["current cuda_list_chunks", "current cuda_digest", "follow_current"]
GATHER = ["cuda_find_changed", "cuda_gather_changed"]


class State:
    """Four tensors on a device, of which the first and the third may come late."""

    def __init__(self) -> None:
        self.device = LateDevice()
        self.sources = [self.device.hold(torch.arange(n, n + 10)) for n in (0, 100, 200, 300)]
        self.expected = [raw(source) for source in self.sources]
        self.pairs = [(source, 80 * number) for number, source in enumerate(self.sources)]
        self.arena = _C.Arena(320)
        self.stager = Stager(self.arena, CHUNK, find_device=self.device.find)

    def start(self, late=(0, 2), only_changed: bool = False) -> Staging:
        return self.stager.start(self.pairs, only_changed, late=late)

    def there(self) -> list[bool]:
        return [bytes(memoryview(self.arena)[80 * n :][:80]) == data for n, data in enumerate(self.expected)]

    def digests(self) -> bytes:
        return b"".join(digests_of(data, CHUNK) for data in self.expected)


@pytest.fixture
def state() -> State:
    return State()


def test_late_ones_are_enqueued_last_behind_an_event_of_their_own(state):
    state.start()
    work = [*AT_THE_CALL, "copy", "copy", "record"]
    assert state.device.calls == work + work
    base = state.arena.address
    assert [address - base for _, address in state.device.copied] == [80, 240, 0, 160]


def test_without_late_ones_all_of_a_device_is_behind_one_event(state):
    state.start(late=())
    assert state.device.calls == [*AT_THE_CALL, "copy", "copy", "copy", "copy", "record"]


def test_if_all_are_late_all_of_a_device_is_behind_one_event(state):
    state.start(late=range(4))
    assert state.device.calls == [*AT_THE_CALL, "copy", "copy", "copy", "copy", "record"]


def test_changes_are_found_for_early_and_late_ones_by_themselves(state):
    state.start().wait()
    state.device.calls.clear()
    state.sources[2][3] = state.sources[3][3] = -1
    state.expected[2:] = [raw(source) for source in state.sources[2:]]
    staging = state.start(only_changed=True)
    work = [*AT_THE_CALL, *GATHER, "record"]
    assert state.device.calls == work + work
    assert staging.wait() == state.digests()
    assert all(state.there()) and staging.nbytes_copied == 2 * 64


def test_who_overwrites_early_ones_waits_for_these_alone(state):
    staging = state.start()
    staging.before_overwrite([1, 3])
    state.device.current.put(state.sources[1].zero_)
    state.device.current.run()
    assert not state.sources[1].any()
    assert state.there() == [False, True, False, True]
    assert staging.wait() == state.digests()


def test_who_overwrites_late_ones_waits_for_them(state):
    staging = state.start()
    staging.before_overwrite([2])
    state.device.current.put(state.sources[2].zero_)
    state.device.current.run()
    assert staging.wait() == state.digests()
    assert all(state.there())


def test_who_overwrites_all_waits_for_all(state):
    staging = state.start()
    staging.before_overwrite()
    for source in state.sources:
        state.device.current.put(source.zero_)
    state.device.current.run()
    assert staging.wait() == state.digests()
    assert all(state.there())


def test_late_ones_are_digested_at_the_call(state):
    """Their copies wait for nothing but the side stream: what comes between fails the staging."""
    staging = state.start()
    staging.before_overwrite([1, 3])
    state.device.current.put(state.sources[2].zero_)
    state.device.current.run()
    with pytest.raises(SaveFailed, match=r"^pair 2 did not arrive"):
        staging.wait()


def test_a_late_one_that_is_refused_leaves_none_in_flight(state):
    state.device.refuse = 3
    with pytest.raises(SaveFailed, match=r"^pair 2 could not be copied"):
        state.start()
    assert state.there()[1] and state.there()[3]
    state.arena.resize(640)


def test_a_late_one_in_host_memory_is_copied_as_any_other(state):
    state.sources[0] = torch.arange(10)
    state.pairs[0] = (state.sources[0], 0)
    assert state.start().wait() == state.digests()
    assert all(state.there())


@pytest.mark.parametrize("number", [-1, 4])
def test_a_late_pair_that_is_not_there_is_refused_and_nothing_touched(state, number):
    with pytest.raises(InvalidArgument, match=f"no pair {number}; they are numbered 0 to 3"):
        state.start(late=[0, number])
    assert state.device.calls == [] and state.stager.last is None


def given(state: State) -> int:
    """How much the current stream was given."""
    return state.device.current._given


def test_in_a_capture_what_is_over_is_not_waited_for(state):
    staging = state.start()
    state.device.side.run()
    before = given(state)
    state.device.captures = True
    staging.before_overwrite()
    assert given(state) == before
    assert [event.waited for event in state.device.events] == [0, 0]


def test_in_a_capture_what_is_not_over_is_waited_for_by_the_thread(state):
    staging = state.start()
    before = given(state)
    state.device.captures = True
    staging.before_overwrite([1])
    assert given(state) == before
    assert [event.waited for event in state.device.events] == [1, 0]
    assert state.there() == [False, True, False, True]


def test_in_a_capture_a_wait_that_the_device_refuses_fails_the_save(state):
    staging = state.start()
    state.device.captures = True
    state.device.fail("CUDA error: operation not permitted when stream is capturing")
    with pytest.raises(SaveFailed, match="not permitted when stream is capturing"):
        staging.before_overwrite()


def test_a_staging_does_not_start_in_a_capture(state):
    state.device.captures = True
    with pytest.raises(SaveFailed, match="a CUDA graph is being captured; save before or after that"):
        state.start()
    assert state.device.calls == [] and given(state) == 0
