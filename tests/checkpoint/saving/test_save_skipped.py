"""`on_busy="skip"`: a save that one rank has no time for is left out by all, at once."""

from __future__ import annotations

import threading
from functools import partial

import pytest
import torch

import dtruntime_torch as dt
from dtruntime_torch.checkpoint.saving.handle import SaveHandle
from dtruntime_torch.errors import InvalidArgument, SaveSkipped
from dtruntime_torch.storage import MemoryBackend, run_sync
from dtruntime_torch.testing.faulty_backend import FaultyBackend, Stopped
from tests.checkpoint.thread_ranks import Rank, make_ranks, together

STATE = {"w": torch.arange(3000.0), "note": "fine"}


def keep_busy(rank: Rank) -> threading.Event:
    """The next save of this rank ends, when it is committed, only once the event is set."""
    go_on, note_good = threading.Event(), rank.saver.health.note_good

    def wait_first() -> None:
        assert go_on.wait(60)
        rank.saver.health.note_good = note_good  # type: ignore[method-assign]
        note_good()

    rank.saver.health.note_good = wait_first  # type: ignore[method-assign]
    return go_on


def start(ranks: list[Rank], step: int, state: object = STATE) -> list[SaveHandle]:
    handles = together(*[partial(rank.saver.start, state, step, None) for rank in ranks])
    assert all(isinstance(handle, SaveHandle) for handle in handles), handles
    return handles  # type: ignore[return-value]


def outcomes(handles: list[SaveHandle]) -> list[object]:
    return together(*[partial(handle.result, 60) for handle in handles])


def begin_busy(busy: int, ranks: int = 2) -> tuple[list[Rank], threading.Event]:
    """Step 1 is committed, and one rank is not done with it."""
    made = make_ranks(ranks, MemoryBackend(), on_busy="skip")
    go_on = keep_busy(made[busy])
    handles = start(made, 1)
    outcomes([handle for rank, handle in enumerate(handles) if rank != busy])
    return made, go_on


@pytest.mark.parametrize("busy", [0, 1])
def test_a_save_that_one_rank_skips_is_skipped_by_all(busy):
    ranks, go_on = begin_busy(busy)
    found = outcomes(start(ranks, 2))
    assert [type(one) for one in found] == [SaveSkipped, SaveSkipped]
    assert all(f"rank {busy} was still saving step 1" in str(one) for one in found)
    go_on.set()


@pytest.mark.parametrize("busy", [0, 1])
def test_after_a_skipped_save_the_same_step_is_saved(busy):
    ranks, go_on = begin_busy(busy)
    outcomes(start(ranks, 2))
    go_on.set()
    for rank in ranks:
        rank.saver.wait()
    assert [info.step for info in outcomes(start(ranks, 2))] == [2, 2]


@pytest.mark.parametrize("busy", [0, 1])
def test_a_skipped_save_leaves_no_files(busy):
    ranks, go_on = begin_busy(busy)
    outcomes(start(ranks, 2))
    go_on.set()
    for rank in ranks:
        rank.saver.wait()
    paths = [entry.path for entry in run_sync(ranks[0].backend.list(""))]
    assert paths and not any("step-00000002" in path for path in paths)


def test_a_skipped_save_is_no_failure():
    ranks, go_on = begin_busy(1)
    outcomes(start(ranks, 2))
    go_on.set()
    for rank in ranks:
        rank.saver.wait()
        assert rank.saver.health.failed_saves == 0
        rank.saver.close()


@pytest.mark.parametrize("busy", [0, 1])
def test_a_save_whose_structure_changed_is_skipped_by_all(busy):
    ranks, go_on = begin_busy(busy)
    grown = {**STATE, "more": torch.ones(3)}
    assert [type(one) for one in outcomes(start(ranks, 2, grown))] == [SaveSkipped, SaveSkipped]
    go_on.set()
    for rank in ranks:
        rank.saver.wait()
    assert [info.step for info in outcomes(start(ranks, 3, grown))] == [3, 3]


def test_the_others_hear_of_it_while_one_rank_still_writes():
    stopped = Stopped()
    backends = [FaultyBackend(MemoryBackend()) for _ in range(3)]
    backends = [backends[0], backends[0], FaultyBackend(backends[0])]
    ranks = make_ranks(3, backends, on_busy="skip")
    go_on = keep_busy(ranks[1])
    first = start(ranks, 1)
    outcomes([first[0], first[2]])
    backends[2].when("write", "*/step-00000002/*", stopped)
    writing = ranks[2].saver.start(STATE, 2, None)
    leading = ranks[0].saver.start(STATE, 2, None)
    stopped.reached.wait(60)
    assert type(outcomes([ranks[1].saver.start(STATE, 2, None)])[0]) is SaveSkipped
    assert type(outcomes([leading])[0]) is SaveSkipped and not writing.done()
    stopped.release()
    assert type(outcomes([writing])[0]) is SaveSkipped
    go_on.set()


def test_a_save_that_the_caller_waits_for_is_not_skipped(tmp_path):
    backend = FaultyBackend(MemoryBackend())
    stopped = Stopped()
    backend.when("create", "*/commits/*", stopped)
    with dt.CheckpointManager(backend, on_busy="skip") as manager:
        handle = manager.save_async(STATE, 1)
        stopped.reached.wait(60)
        with pytest.raises(SaveSkipped):
            manager.save_async(STATE, 2).result(60)
        threading.Timer(0, stopped.release).start()
        assert manager.save(STATE, 3).step == 3
        assert handle.result(60).step == 1


def test_a_wrong_step_is_refused_though_the_save_would_be_skipped():
    ranks, go_on = begin_busy(0)
    with pytest.raises(InvalidArgument, match="step"):
        ranks[0].saver.start(STATE, -2, None)
    go_on.set()


@pytest.mark.parametrize("busy", [0, 1])
def test_saves_skipped_one_after_another_leave_no_keys_behind(busy):
    ranks, go_on = begin_busy(busy)
    counts = []
    for step in range(2, 32):
        outcomes(start(ranks, step))
        counts.append(ranks[0].members.barrier._store.num_keys())
    # Those of the last one or two are still there.
    assert max(counts) - counts[0] < 15, counts
    go_on.set()
