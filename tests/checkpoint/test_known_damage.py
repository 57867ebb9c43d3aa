"""What is known to be damaged is built upon no more: the save after it is full, on all ranks."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import dtruntime_torch as dt
from dtruntime_torch.checkpoint.flatten import PerRank
from dtruntime_torch.checkpoint.verify import find_commit, verify
from dtruntime_torch.errors import CheckpointMismatch, CorruptCheckpoint
from dtruntime_torch.storage import MemoryBackend, run_sync
from dtruntime_torch.testing.faulty_backend import FaultyBackend, Stopped
from tests.checkpoint.saving.delta_ranks import check_step, delta_ranks, make_states, save_all, touch
from tests.checkpoint.thread_ranks import together

ALWAYS = dt.DeltaPolicy(max_changed=1.0)


@pytest.fixture
def backend():
    return MemoryBackend()


@pytest.fixture
def manager(backend):
    with dt.CheckpointManager(backend, delta=ALWAYS, chunk_bytes=4096) as manager:
        yield manager


def state_of(step: int) -> dict[str, torch.Tensor]:
    state = {"w": torch.arange(6000.0)}
    state["w"][0] = step
    return state


def flip(backend: MemoryBackend, ending: str, step: int = 1) -> None:
    """Flips a bit in the last byte of each of these files."""
    paths = [entry.path for entry in run_sync(backend.list("model/")) if f"{step:08d}" in entry.path]
    for path in (path for path in paths if path.endswith(ending)):
        data = bytearray(run_sync(backend.read(path)))
        data[-1] ^= 1
        run_sync(backend.write(path, bytes(data)))


def check_full(manager: dt.CheckpointManager, step: int) -> None:
    assert manager.save(state_of(step), step).full
    assert manager.verify(step).ok


def test_the_save_after_a_verify_that_found_damage_is_full_and_sound(backend, manager):
    manager.save(state_of(1), 1)
    flip(backend, ".safetensors")
    assert not manager.verify().ok
    check_full(manager, 2)
    assert not manager.save(state_of(3), 3).full


@pytest.mark.parametrize("step", [None, 1])
@pytest.mark.parametrize("ending", [".safetensors", "-of-00001.json", "manifest.json", "0001-00000001.json"])
@pytest.mark.filterwarnings("ignore:.*(going on with the checkpoint before it|it is passed over)")
def test_the_save_after_a_load_that_found_damage_is_full_and_sound(backend, manager, ending, step):
    manager.save(state_of(1), 1)
    flip(backend, ending)
    with pytest.raises(CorruptCheckpoint):
        manager.load(state_of(0), step)
    check_full(manager, 2)


def test_the_save_after_a_fresh_load_that_found_damage_is_full_and_sound(backend, manager):
    manager.save(state_of(1), 1)
    flip(backend, ".safetensors")
    with pytest.raises(CorruptCheckpoint):
        manager.load_checkpoint(step=1)
    check_full(manager, 2)


def test_damage_that_was_met_on_the_way_to_what_does_not_fit_counts_too(backend, manager):
    with dt.CheckpointManager(backend) as other:
        other.save({"another": torch.ones(2)}, 1)
    with dt.CheckpointManager(backend, delta=ALWAYS, chunk_bytes=4096) as manager:
        manager.load({"another": torch.ones(2)})
        manager.save(state_of(2), 2)
        flip(backend, ".safetensors", step=2)
        with pytest.warns(RuntimeWarning, match="going on"), pytest.raises(CheckpointMismatch):
            manager.load(state_of(0))
        check_full(manager, 3)


def test_damage_to_what_a_delta_goes_back_to_counts_until_there_is_a_full_one(backend):
    with dt.CheckpointManager(backend, delta=ALWAYS, chunk_bytes=4096, keep_last_n=None) as manager:
        assert [manager.save(state_of(step), step).full for step in (1, 2)] == [True, False]
        flip(backend, ".safetensors", step=1)
        assert not manager.verify(1).ok
        check_full(manager, 3)
        assert not manager.verify(1).ok
        assert not manager.save(state_of(4), 4).full


def test_soundness_costs_no_delta(manager):
    manager.save(state_of(1), 1)
    assert manager.verify().ok
    manager.load_checkpoint()
    assert not manager.save(state_of(2), 2).full


def test_damage_that_is_found_while_a_delta_is_under_way_makes_the_one_after_it_full(backend):
    faulty, stopped = FaultyBackend(backend), Stopped()
    with dt.CheckpointManager(faulty, delta=ALWAYS, chunk_bytes=4096) as manager:
        manager.save(state_of(1), 1)
        faulty.when("write", "*.delta", stopped)
        handle = manager.save_async(state_of(2), 2)
        stopped.reached.wait()
        flip(backend, ".safetensors", step=1)
        assert not manager.verify(1).ok
        stopped.release()
        assert not handle.result().full
        check_full(manager, 3)


@pytest.mark.parametrize("knows", [[0], [1], [0, 1]])
def test_what_one_rank_alone_has_found_makes_all_save_in_full(backend, knows):
    states = make_states(2)
    ranks = delta_ranks(2, backend)
    key = save_all(ranks, states, 1).key
    flip(backend, ".safetensors")
    for rank in knows:
        # As a manager's `verify` does.
        assert not run_sync(verify(backend, "model", run_sync(find_commit(backend, "model")))).ok
        ranks[rank].lineage.distrust(key)
    touch(states, 2)
    assert save_all(ranks, states, 2).full
    check_step(backend, states, 2)
    touch(states, 3)
    assert not save_all(ranks, states, 3).full
    check_step(backend, states, 3)


@pytest.mark.parametrize("step", [None, 1])
@pytest.mark.filterwarnings("ignore:.*going on with the checkpoint before it")
def test_damage_that_two_ranks_meet_in_a_load_makes_them_save_in_full_at_once(backend, step):
    states = make_states(2)
    ranks = delta_ranks(2, backend)
    save_all(ranks, states, 1)
    flip(backend, "00001-of-00002.safetensors")
    fresh = make_states(2)
    calls = [
        partial(rank.load, {**state, "seed": PerRank(state["seed"]), "step": 0}, step)
        for rank, state in zip(ranks, fresh, strict=True)
    ]
    assert [type(result) for result in together(*calls)] == [CorruptCheckpoint] * 2
    touch(states, 2)
    info = save_all(ranks, states, 2)
    assert info.full and info.path.endswith("-1")  # they did not have to try again
    check_step(backend, states, 2)
