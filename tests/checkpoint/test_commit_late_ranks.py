"""Ranks that give up waiting while the leader goes on, and ranks that die: what the leader decided counts."""

from __future__ import annotations

import threading
from functools import partial

import pytest

from dtruntime_torch import barrier
from dtruntime_torch.checkpoint.info import CheckpointInfo
from dtruntime_torch.checkpoint.verify import verify
from dtruntime_torch.errors import BarrierTimeout
from dtruntime_torch.storage import MemoryBackend, run_sync
from dtruntime_torch.testing.faulty_backend import FaultyBackend, Stopped
from tests.checkpoint.sound import check_equal, check_sound, state_of
from tests.checkpoint.thread_ranks import Rank, make_ranks, together

LONG, SHORT = 60.0, 0.2


@pytest.fixture(autouse=True)
def _no_grace(monkeypatch):
    monkeypatch.setattr(barrier, "GRACE_SECONDS", 0.0)


def impatient(ranks: list[Rank]) -> None:
    """All but the leader wait only a moment."""
    for rank in ranks[1:]:
        rank.members.barrier.timeout = SHORT


def patient(ranks: list[Rank]) -> None:
    for rank in ranks[1:]:
        rank.members.barrier.timeout = LONG


def save_all(ranks: list[Rank], step: int) -> list[object]:
    return together(*[partial(rank.save, state_of(step), step) for rank in ranks])


def check_saved(results: list[object], step: int) -> None:
    assert all(isinstance(result, CheckpointInfo) and result.step == step for result in results), results


@pytest.mark.parametrize(
    ("operation", "pattern"),
    [("write", "*/manifest.json"), ("create", "*/commits/*"), ("write", "*-00000-of-*.safetensors")],
)
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_rank_that_times_out_while_the_leader_goes_on_deletes_nothing_and_saves_again(
    operation, pattern, ranks
):
    inner, stopped = MemoryBackend(), Stopped()
    slow = FaultyBackend(inner)
    jobs = make_ranks(ranks, [slow] + [inner] * (ranks - 1), LONG)
    check_saved(save_all(jobs, 1), 1)
    slow.when(operation, pattern, stopped)
    impatient(jobs)
    results: list[object] = [None] * ranks

    def save(i: int) -> None:
        (results[i],) = together(partial(jobs[i].save, state_of(2), 2))

    threads = [threading.Thread(target=save, args=(i,), daemon=True) for i in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads[1:]:
        thread.join()
    assert all(isinstance(result, BarrierTimeout) for result in results[1:]), results
    stopped.release()
    threads[0].join()
    # The leader had all parts, or still waited for its own, and nobody took theirs away.
    assert isinstance(results[0], CheckpointInfo)
    assert run_sync(verify(inner, "model", None)).ok
    patient(jobs)
    check_saved(save_all(jobs, 3), 3)
    assert check_sound(inner) == [1, 2, 3]


def test_a_rank_that_never_comes_costs_one_save_and_leaves_no_commit():
    inner, stopped = MemoryBackend(), Stopped()
    late = FaultyBackend(inner)
    jobs = make_ranks(2, [inner, late], LONG)
    check_saved(save_all(jobs, 1), 1)
    late.when("write", "*.safetensors", stopped)
    jobs[0].members.barrier.timeout = SHORT
    results: list[object] = [None, None]
    thread = threading.Thread(
        target=lambda: results.__setitem__(1, together(partial(jobs[1].save, state_of(2), 2))[0]),
        daemon=True,
    )
    thread.start()
    (results[0],) = together(partial(jobs[0].save, state_of(2), 2))
    assert isinstance(results[0], BarrierTimeout) and results[0].missing == (1,)
    jobs[0].members.barrier.timeout = LONG
    stopped.release()
    thread.join()
    assert isinstance(results[1], BarrierTimeout) and results[1].decided
    assert check_sound(inner) == [1]
    assert not [entry for entry in run_sync(inner.list("model/step-00000002/")) if "00001-of" in entry.path]
    check_saved(save_all(jobs, 3), 3)
    assert check_sound(inner) == [1, 3]


def test_ranks_that_load_what_they_saved_have_it_bit_for_bit():
    jobs = make_ranks(3, MemoryBackend())
    check_saved(save_all(jobs, 1), 1)
    states = [state_of(0) for _ in jobs]
    together(*[partial(job.load, state) for job, state in zip(jobs, states, strict=True)])
    for state in states:
        check_equal(state, 1)
