"""One rank fails somewhere in a save: nobody waits it out, all hear of it, and the next save is good."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

import dtruntime_torch as dt
from dtruntime_torch import DeltaPolicy, PerRank
from dtruntime_torch.barrier import Barrier
from dtruntime_torch.checkpoint.info import CheckpointInfo
from dtruntime_torch.checkpoint.restore import load_fresh
from dtruntime_torch.checkpoint.saving import groups
from dtruntime_torch.checkpoint.verify import find_commit, verify
from dtruntime_torch.errors import BarrierTimeout, CommitConflict, InvalidArgument, SaveFailed
from dtruntime_torch.storage import LocalBackend, MemoryBackend, run_sync
from dtruntime_torch.testing.faulty_backend import FaultyBackend, Stopped, not_done
from tests.checkpoint.thread_ranks import Rank, make_ranks, together

STATE = {"w": torch.arange(3000.0), "note": "fine"}


class Broken(Exception):
    pass


def break_once(owner: object, name: str, *, afterwards: bool) -> None:
    """The next call of the method raises, before or after it did its work."""
    method = getattr(owner, name)

    def broken(*args: object) -> object:
        setattr(owner, name, method)
        if afterwards:
            method(*args)
        raise Broken(name)

    setattr(owner, name, broken)


def owner_of(rank: Rank, place: str) -> tuple[object, str]:
    owner, _, name = place.rpartition(".")
    return (rank.saver._publisher if owner else rank.saver), name


def save_on_all(ranks: list[Rank], step: int) -> list[object]:
    return together(*[partial(rank.save, STATE, step) for rank in ranks])


def check_good(ranks: list[Rank], step: int) -> None:
    results = save_on_all(ranks, step)
    assert all(isinstance(result, CheckpointInfo) and result.step == step for result in results), results
    assert run_sync(verify(ranks[0].backend, "model", None)).ok


@pytest.mark.parametrize("broken", [0, 1])
@pytest.mark.parametrize("saved_before", [False, True])
@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("afterwards", [False, True])
@pytest.mark.parametrize("place", ["wait", "_agree", "_take", "publisher.open", "publisher._write"])
def test_a_rank_that_fails_anywhere_costs_one_save(broken, saved_before, prepared, afterwards, place):
    ranks = make_ranks(2, MemoryBackend())
    if prepared:
        together(*[partial(rank.saver.prepare, STATE) for rank in ranks])
    if saved_before:
        check_good(ranks, 1)
    break_once(*owner_of(ranks[broken], place), afterwards=afterwards)
    results = save_on_all(ranks, 2)
    assert not any(isinstance(result, BarrierTimeout) for result in results), results
    check_good(ranks, 3)


def test_who_holds_what_is_learnt_once_per_structure(monkeypatch: pytest.MonkeyPatch) -> None:
    learn, learnt = groups.learn, list[str]()

    def counted(barrier: Barrier, key: str, *more: Any, **options: Any) -> groups.Groups:
        learnt.append(key)
        return learn(barrier, key, *more, **options)

    monkeypatch.setattr(groups, "learn", counted)
    ranks = make_ranks(2, MemoryBackend())
    for step, size in enumerate([3000, 3000, 3000, 5000, 5000], start=1):
        results = together(*[partial(rank.save, {"w": torch.ones(size)}, step) for rank in ranks])
        assert all(isinstance(result, CheckpointInfo) for result in results), results
    assert len(learnt) == 2 * len(ranks)


@pytest.mark.parametrize("odd", [0, 1])
def test_a_structure_that_changes_on_one_rank_fails_at_once_on_all(odd):
    ranks = make_ranks(2, MemoryBackend())
    check_good(ranks, 1)
    states = [{**STATE, "more": b"bytes"} if rank == odd else STATE for rank in (0, 1)]
    calls = [partial(rank.save, state, 2) for rank, state in zip(ranks, states, strict=True)]
    assert all(isinstance(result, SaveFailed) for result in together(*calls))
    check_good(ranks, 3)


@pytest.mark.parametrize("odd", [0, 1])
@pytest.mark.parametrize("delta", [None, DeltaPolicy()])
def test_what_is_a_ranks_own_may_change_its_size_on_one_rank(odd, delta):
    ranks = make_ranks(2, MemoryBackend(), delta=delta)
    for step in range(1, 5):
        sizes = [step if rank == odd else 3 for rank in (0, 1)]
        states = [
            {"own": PerRank(torch.full((n,), float(n))), "log": b"x" * n, "w": torch.ones(4)} for n in sizes
        ]
        saves = [partial(rank.save, state, step) for rank, state in zip(ranks, states, strict=True)]
        results: list[Any] = together(*saves)
        assert [result.step for result in results] == [step, step]
        loaded: list[Any] = [load_fresh(ranks[0].backend, "model", step, rank) for rank in (0, 1)]
        for mine, state, n in zip(loaded, states, sizes, strict=True):
            assert torch.equal(mine["own"], state["own"].value) and mine["log"] == b"x" * sizes[0], n


@pytest.mark.parametrize("odd", [0, 1])
@pytest.mark.parametrize("bad", [{"metadata": object()}, {"step": -1}])
def test_an_argument_that_only_one_rank_gets_wrong_costs_one_save(odd, bad):
    ranks = make_ranks(2, MemoryBackend())
    good = {"state": STATE, "step": 1}
    calls = [partial(rank.save, **({**good, **bad} if rank is ranks[odd] else good)) for rank in ranks]
    results = together(*calls)
    assert isinstance(results[odd], InvalidArgument)
    assert isinstance(results[1 - odd], SaveFailed)
    check_good(ranks, 2)


def test_ranks_that_save_different_steps_are_told():
    ranks = make_ranks(2, MemoryBackend())
    results = together(lambda: ranks[0].save(STATE, 1), lambda: ranks[1].save(STATE, 2))
    assert all(isinstance(result, SaveFailed) and "rank 1" in str(result) for result in results)
    check_good(ranks, 3)


def test_a_conflict_is_told_to_all_ranks_at_the_door():
    backend = MemoryBackend()
    with dt.CheckpointManager(backend) as manager:
        manager.save(STATE, 5)
    ranks = make_ranks(2, backend)
    results = together(*[partial(rank.saver.start, STATE, 5, None) for rank in ranks])
    assert all(isinstance(result, CommitConflict) for result in results)
    check_good(ranks, 6)


def test_a_folder_is_never_used_by_two_attempts(tmp_path):
    """Deletes that are left over from a failed attempt must not meet the files of a later one."""
    backend = FaultyBackend(LocalBackend(tmp_path))
    backend.when("write", "*/shard-*", not_done(), nth=1)
    backend.when("write", "*/shard-*", not_done(), nth=2)
    for nth in range(1, 12):
        backend.when("delete", "*", not_done(), nth=nth)
    with dt.CheckpointManager(backend) as manager:
        for step in (5, 10):
            with pytest.raises(SaveFailed):
                manager.save(STATE, step)
        manager.save(STATE, 5)
        for step in range(10, 16):
            manager.save(STATE, step)
        assert all(manager.verify(info.step).ok for info in manager.list())
    assert "delete" in {operation for operation, _ in backend.calls}


def test_any_error_of_a_delete_is_left_for_later():
    backend = FaultyBackend(MemoryBackend())
    backend.when("write", "*/shard-*.json", not_done())
    backend.when("delete", "*", not_done(RuntimeError("access denied")))
    with dt.CheckpointManager(backend) as manager:
        with pytest.raises(SaveFailed):
            manager.save(STATE, 1)
        assert manager.save(STATE, 2).step == 2


def test_an_interrupt_right_after_the_save_began_does_not_touch_its_memory():
    backend = MemoryBackend()
    with dt.CheckpointManager(backend, chunk_bytes=4096) as manager:
        executor = manager._saver._executor
        submit = executor.submit

        def interrupted(work: Callable[..., object], *args: object) -> object:
            submit(work, *args)
            if work is int:
                return submit(work)
            executor.submit = submit  # type: ignore[method-assign]
            raise KeyboardInterrupt

        executor.submit = interrupted  # type: ignore[method-assign, assignment]
        with pytest.raises(KeyboardInterrupt):
            manager.save_async({"w": torch.zeros(1 << 20)}, 1)
        manager.save({"w": torch.ones(1 << 20)}, 2)
        assert all(manager.verify(info.step).ok for info in manager.list())


def test_a_save_that_storage_never_ends_is_not_waited_for_without_limit():
    stopped = Stopped()
    backend = FaultyBackend(MemoryBackend())
    backend.when("write", "*.safetensors", stopped)
    with dt.CheckpointManager(backend, timeout=0.5) as manager:
        handle = manager.save_async(STATE, 1)
        with pytest.raises(BarrierTimeout, match="still goes on"):
            manager.save_async(STATE, 2)
        stopped.release()
        assert handle.result().step == 1


@pytest.mark.parametrize("step", [None, 7])
def test_find_commit_names_what_it_does_not_find(step):
    with pytest.raises(dt.errors.CheckpointNotFound, match="model"):
        run_sync(find_commit(MemoryBackend(), "model", step))
