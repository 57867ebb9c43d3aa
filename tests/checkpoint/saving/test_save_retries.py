"""A save that storage failed is tried again as the policy says, by all ranks alike, in a folder of its own."""

from __future__ import annotations

import pytest
import torch

import dtruntime_torch as dt
from dtruntime_torch.checkpoint.info import CheckpointInfo
from dtruntime_torch.errors import InvalidArgument, SaveFailed, StorageError
from dtruntime_torch.storage import MemoryBackend, run_sync
from dtruntime_torch.testing.faulty_backend import FaultyBackend, lost_answer, not_done
from tests.checkpoint.saving.delta_ranks import (
    CHUNK,
    check_step,
    delta_ranks,
    make_states,
    save_all,
    start_all,
    touch,
)

AT_ONCE = dt.RetryPolicy(attempts=3, initial=0.0)

PATTERNS = ["*/shard-00001-of-00002.json", "*/shard-00000-of-00002.safetensors", "*/manifest.json"]


def attempts_of(backend, step):
    """The folders of a step in which something is left."""
    return sorted({entry.path.split("/")[2] for entry in run_sync(backend.list(f"model/step-{step:08}/"))})


@pytest.mark.parametrize("fault", [not_done, lost_answer])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_write_that_fails_once_costs_one_try(pattern, fault):
    backend, states = FaultyBackend(MemoryBackend()), make_states(2)
    ranks = delta_ranks(2, backend, retry=AT_ONCE)
    backend.when("write", pattern, fault())
    info = save_all(ranks, states, 1)
    assert info.path.endswith("0001-2")
    assert attempts_of(backend, 1) == ["0001-2"]
    check_step(backend, states, 1)


def test_the_last_try_that_the_policy_allows_may_succeed_and_no_further_one_is_made():
    for failing, succeeds in ((2, True), (3, False)):
        backend, states = FaultyBackend(MemoryBackend()), make_states(2)
        ranks = delta_ranks(2, backend, retry=AT_ONCE)
        for nth in range(1, failing + 1):
            backend.when("write", "*/shard-00001-of-00002.safetensors", not_done(), nth=nth)
        results = start_all(ranks, states, 1)
        assert all(isinstance(result, CheckpointInfo if succeeds else SaveFailed) for result in results)
        written = [path for operation, path in backend.calls if operation == "write"]
        assert sum(path.endswith("shard-00001-of-00002.safetensors") for path in written) == 3
        assert attempts_of(backend, 1) == (["0001-3"] if succeeds else [])


def test_without_a_policy_nothing_is_tried_again():
    backend, states = FaultyBackend(MemoryBackend()), make_states(2)
    ranks = delta_ranks(2, backend)
    backend.when("write", "*/shard-00001-of-00002.json", not_done())
    assert all(isinstance(result, SaveFailed) for result in start_all(ranks, states, 1))
    assert attempts_of(backend, 1) == []


def test_a_delta_is_tried_again_as_a_delta():
    backend, states = FaultyBackend(MemoryBackend()), make_states(2)
    ranks = delta_ranks(2, backend, retry=AT_ONCE)
    save_all(ranks, states, 1)
    touch(states, 2, chunks=(3,), own=True)
    full = StorageError(28, "The disk is full")
    backend.when("write", "*/shard-00000-of-00002.delta", not_done(full))
    info = save_all(ranks, states, 2)
    assert not info.full and info.written < 10 * CHUNK and info.path.endswith("0001-2")
    assert attempts_of(backend, 2) == ["0001-2"]
    check_step(backend, states, 2)


def test_what_was_to_be_full_after_a_lost_parent_stays_full_when_it_is_tried_again():
    backend, states = FaultyBackend(MemoryBackend()), make_states(2)
    ranks = delta_ranks(2, backend, retry=AT_ONCE)
    save_all(ranks, states, 1)

    async def pruned(call):
        await backend._inner.delete("model/commits/0001-00000001.json")
        return await call.proceed()

    backend.when("write", "*/0001-1/manifest.json", pruned)
    backend.when("write", "*/0001-2/shard-00000-of-00002.safetensors", not_done())
    info = save_all(ranks, states, 2)
    assert info.full and info.path.endswith("0001-3")
    assert not [path for _, path in backend.calls if path.endswith("0001-3/shard-00000-of-00002.delta")]
    check_step(backend, states, 2)


def test_what_is_no_fault_of_the_storage_is_not_tried_again():
    backend, states = FaultyBackend(MemoryBackend()), make_states(2)
    ranks = delta_ranks(2, backend, retry=AT_ONCE)
    backend.when("write", "*/shard-00001-of-00002.json", not_done(ValueError("a bug")))
    results = start_all(ranks, states, 1)
    assert all(isinstance(result, SaveFailed) and "a bug" in str(result) for result in results)
    assert all("0001-2" not in path for _, path in backend.calls)


@pytest.mark.parametrize("odd", [0, 1])
def test_a_rank_that_takes_no_part_is_not_waited_for_in_another_try(odd):
    backend, states = MemoryBackend(), make_states(2)
    ranks = delta_ranks(2, backend, retry=AT_ONCE)
    save_all(ranks, states, 1)
    take = ranks[odd].saver._take

    def refuse(*args):
        ranks[odd].saver._take = take
        raise OSError("this rank could not even begin")

    ranks[odd].saver._take = refuse
    results = start_all(ranks, states, 2)
    assert isinstance(results[odd], OSError) and isinstance(results[1 - odd], SaveFailed)
    save_all(ranks, states, 3)
    check_step(backend, states, 3)


def test_the_pauses_are_those_of_the_policy(monkeypatch):
    paused = []
    monkeypatch.setattr("dtruntime_torch.checkpoint.saving.publish.time.sleep", paused.append)
    backend = FaultyBackend(MemoryBackend())
    for nth in (1, 2):
        backend.when("write", "*.safetensors", not_done(), nth=nth)
    retry = dt.RetryPolicy(attempts=3, initial=7.0, factor=2.0, jitter=0.0)
    with dt.CheckpointManager(backend, retry=retry) as manager:
        assert manager.save({"w": torch.ones(3)}, 1).path.endswith("0001-3")
    assert paused == [7.0, 14.0]


def test_a_manager_takes_a_policy_or_none():
    with pytest.raises(InvalidArgument, match="retry"):
        dt.CheckpointManager(MemoryBackend(), retry=3)  # type: ignore[arg-type]
