"""Real ranks under torchrun: who writes what, that all load the same, and what happens when one fails."""

from __future__ import annotations

from collections import Counter

import pytest
from safetensors import safe_open

import dtruntime_torch as dt
from tests.distributed.launch import separately, torchrun


@pytest.mark.parametrize("ranks", [2, 4])
def test_ddp_comes_back_and_each_tensor_is_written_once(tmp_path, ranks):
    torchrun("ddp_round_trip", tmp_path, ranks)
    parts = sorted(tmp_path.glob("model/step-00000003/*/*.safetensors"))
    held = [list(safe_open(part, "pt").keys()) for part in parts]
    names = Counter(name for names in held for name in names)
    assert len(parts) == ranks and set(names.values()) == {1} and len(names) == 6 + 3 + 3 * 6
    assert all(held)


def test_another_number_of_ranks_goes_on(tmp_path):
    torchrun("ddp_round_trip", tmp_path, 2)
    torchrun("load_into_ddp", tmp_path, 3)
    with dt.CheckpointManager(tmp_path) as manager:
        assert [(i.generation, i.step, i.world_size) for i in manager.list()] == [(1, 3, 2), (2, 4, 3)]
        assert manager.verify().ok


@pytest.mark.parametrize(
    "scenario",
    [
        "stages",
        "no_rank_has_a_place",
        "damage_on_one_rank",
        "missing_on_one_rank",
        "bad_value_on_one_rank",
        "leader_refuses",
        "structure_changes_on_one_rank",
        "conflict_at_the_door",
        "lost_answer_of_the_commit",
        "load_fails_on_one_rank",
        "hook_goes_on_bit_for_bit",
    ],
)
def test_two_ranks(tmp_path, scenario):
    torchrun(scenario, tmp_path, 2)


def test_four_stages(tmp_path):
    torchrun("stages", tmp_path, 4)


def test_fsdp_shards_load_on_other_numbers_of_ranks(tmp_path):
    torchrun("fsdp_round_trip", tmp_path, 2)
    torchrun("fsdp_load", tmp_path, 3)
    torchrun("fsdp_load", tmp_path, 1)


def test_sharded_deltas_load_on_other_numbers_of_ranks(tmp_path):
    torchrun("fsdp_deltas", tmp_path, 2)
    with dt.CheckpointManager(tmp_path) as manager:
        assert [(info.step, info.full) for info in manager.list()] == [(4, False), (5, False)]
        assert all(manager.verify(step).ok for step in (4, 5))
    torchrun("fsdp_load", tmp_path, 3)
    torchrun("fsdp_load", tmp_path, 1)


def test_a_rank_that_dies_while_writing_is_named_and_leaves_no_commit(tmp_path):
    (status, output), (died, _) = separately("dies_while_writing", tmp_path, 2)
    assert died == 137
    assert status == 0, output
    with dt.CheckpointManager(tmp_path / "ckpt") as manager:
        assert [info.step for info in manager.list()] == [1] and manager.verify().ok
