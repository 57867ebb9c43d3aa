"""Real ranks under torchrun load what was saved in another way, and the ranks of a node read each byte once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dtruntime_torch as dt
from tests.distributed import load_scenarios
from tests.distributed.in_turn import check_outcome
from tests.distributed.launch import in_turn, separately

PROGRAM = Path(load_scenarios.__file__)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loads")
    in_turn(tuple(load_scenarios.SCENARIOS), folder, 4, program=PROGRAM)
    return folder


@pytest.mark.parametrize("scenario", load_scenarios.SCENARIOS)
def test_on_four_ranks(outcomes, scenario):
    check_outcome(outcomes, scenario, 4)


@pytest.mark.parametrize(("saved", "ranks"), load_scenarios.LOADS)
def test_any_way_to_cut_loads_whole_on_one_process(outcomes, saved, ranks):
    with dt.CheckpointManager(outcomes / f"{saved}_by_{ranks}") as manager:
        whole = manager.load_checkpoint()
    assert isinstance(whole, dict)
    expected = load_scenarios.whole_state()
    assert all(torch.equal(whole["model"][name], tensor) for name, tensor in expected.items())


def test_sharded_deltas_are_deltas_and_sound(outcomes):
    with dt.CheckpointManager(outcomes / "fsdp_deltas") as manager:
        assert [(info.step, info.full) for info in manager.list()] == [(4, False), (5, False)]
        assert all(manager.verify(step).ok for step in (4, 5))


def test_a_rank_that_dies_while_memory_is_shared_leaves_none(tmp_path):
    (status, output), (died, _) = separately("dies_while_sharing", tmp_path, 2, program=PROGRAM)
    assert died == 137
    assert status == 0, output
