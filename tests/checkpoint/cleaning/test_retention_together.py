"""Several ranks save: the leader alone deletes, for all of them, and nobody waits for it in vain."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from dtruntime_torch.checkpoint.cleaning.retention import RetentionPolicy
from dtruntime_torch.checkpoint.info import CheckpointInfo
from dtruntime_torch.errors import BarrierTimeout
from dtruntime_torch.storage import MemoryBackend, run_sync
from dtruntime_torch.testing.faulty_backend import FaultyBackend, Stopped
from tests.checkpoint.thread_ranks import Rank, make_ranks, together


def state_of(rank: int, step: int) -> dict[str, torch.Tensor]:
    return {f"w{rank}": torch.arange(3000.0) + step}


def make_two(inner: MemoryBackend, timeout: float = 60.0) -> tuple[list[Rank], list[FaultyBackend]]:
    """Two ranks that keep one checkpoint, each with its own way to the storage."""
    backends = [FaultyBackend(inner) for _ in range(2)]
    return make_ranks(2, backends, timeout, retention=RetentionPolicy(keep_last_n=1)), backends


def save_on_both(ranks: list[Rank], step: int) -> None:
    results = together(*[partial(rank.save, state_of(n, step), step) for n, rank in enumerate(ranks)])
    assert all(isinstance(result, CheckpointInfo) and result.step == step for result in results), results


@pytest.fixture
def inner():
    return MemoryBackend()


def test_the_leader_deletes_what_all_ranks_wrote_and_the_others_delete_nothing(inner):
    ranks, backends = make_two(inner)
    for step in (1, 2, 3):
        save_on_both(ranks, step)
    left = [entry.path.rpartition("/")[2] for entry in run_sync(inner.list("model/step-"))]
    assert left == ["manifest.json"] + [
        f"shard-0000{rank}-of-00002{suffix}" for rank in range(2) for suffix in (".json", ".safetensors")
    ]
    deletes = [[path for operation, path in one.calls if operation == "delete"] for one in backends]
    assert deletes[1] == [] and any("shard-00001" in path for path in deletes[0])


def test_a_delete_that_never_ends_holds_nobody_up(inner):
    ranks, backends = make_two(inner, timeout=4.0)
    stopped = Stopped()
    backends[0].when("delete", "*", stopped, nth=None)
    for step in (1, 2):
        save_on_both(ranks, step)
    assert stopped.reached.is_set()
    stopped.release()
    save_on_both(ranks, 3)
    assert {entry.path.split("/")[1] for entry in run_sync(inner.list("model/step-"))} == {"step-00000003"}


def test_what_a_rank_left_that_died_is_swept_by_the_next_incarnation(inner):
    ranks, _ = make_two(inner, timeout=1.0)
    save_on_both(ranks, 1)
    failed = together(partial(ranks[0].save, state_of(0, 2), 2))  # rank 1 is not there any more
    assert isinstance(failed[0], BarrierTimeout)
    late = "model/step-00000002/0001-1/shard-00001-of-00002.safetensors"
    run_sync(inner.write(late, b"it came to this"))
    following, _ = make_two(inner)
    save_on_both(following, 3)
    assert {entry.path.split("/")[1] for entry in run_sync(inner.list("model/step-"))} == {"step-00000003"}
