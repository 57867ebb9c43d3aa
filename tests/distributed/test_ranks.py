"""Real ranks under torchrun: who writes what, that all load the same, and what happens when one fails."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from safetensors import safe_open

import dtruntime_torch as dt
from tests.distributed.in_turn import check_outcome
from tests.distributed.launch import in_turn, separately, torchrun

IN_TURN = {
    2: (
        "ddp_round_trip",
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
    ),
    4: ("ddp_round_trip", "stages"),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> Callable[[int], Path]:
    """Where the scenarios of so many ranks ran, each in the folder of its name."""

    @cache
    def start(ranks: int) -> Path:
        folder = tmp_path_factory.mktemp(f"ranks-{ranks}")
        in_turn(IN_TURN[ranks], folder, ranks)
        return folder

    return start


@pytest.mark.parametrize(
    ("ranks", "scenario"), [(ranks, scenario) for ranks, some in IN_TURN.items() for scenario in some]
)
def test_ranks(outcomes, ranks, scenario):
    check_outcome(outcomes(ranks), scenario, ranks)


@pytest.mark.parametrize("ranks", [2, 4])
def test_each_tensor_of_ddp_is_written_once(outcomes, ranks):
    parts = sorted(outcomes(ranks).glob("ddp_round_trip/model/step-00000003/*/*.safetensors"))
    held = [list(safe_open(part, "pt").keys()) for part in parts]
    names = Counter(name for names in held for name in names)
    assert len(parts) == ranks and set(names.values()) == {1} and len(names) == 6 + 3 + 3 * 6
    assert all(held)


def test_another_number_of_ranks_goes_on(outcomes):
    folder = outcomes(2) / "ddp_round_trip"
    torchrun("load_into_ddp", folder, 3)
    with dt.CheckpointManager(folder) as manager:
        assert [(i.generation, i.step, i.world_size) for i in manager.list()] == [(1, 3, 2), (2, 4, 3)]
        assert manager.verify().ok


def test_a_rank_that_dies_while_writing_is_named_and_leaves_no_commit(tmp_path):
    (status, output), (died, _) = separately("dies_while_writing", tmp_path, 2)
    assert died == 137
    assert status == 0, output
    with dt.CheckpointManager(tmp_path / "ckpt") as manager:
        assert [info.step for info in manager.list()] == [1] and manager.verify().ok
