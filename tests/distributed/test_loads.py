"""Real ranks under torchrun load what was saved in another way, and the ranks of a node read each byte once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dtruntime_torch as dt
from tests.distributed.launch import separately, torchrun
from tests.distributed.load_scenarios import whole_state

SCENARIOS = Path(__file__).with_name("load_scenarios.py")


def run(scenario: str, folder: Path, ranks: int) -> None:
    torchrun(scenario, folder, ranks, program=SCENARIOS)


@pytest.mark.parametrize(
    ("saved", "loads"),
    [
        ("rows", [("rows", 4), ("rows", 2), ("rows", 3), ("columns", 2)]),
        ("hybrid", [("hybrid", 4), ("rows", 3), ("plain", 2)]),
        ("both", [("both", 4), ("columns", 3), ("rows", 1)]),
        ("plain", [("plain", 4), ("plain", 1), ("both", 2)]),
    ],
)
def test_any_way_to_cut_loads_what_another_saved(tmp_path, saved, loads):
    run(f"save:{saved}", tmp_path, 4)
    for kind, ranks in loads:
        run(f"load:{kind}", tmp_path, ranks)
    with dt.CheckpointManager(tmp_path) as manager:
        whole = manager.load_checkpoint()
    assert isinstance(whole, dict)
    assert all(torch.equal(whole["model"][name], tensor) for name, tensor in whole_state().items())


def test_what_one_rank_saved_many_load(tmp_path):
    run("save:plain", tmp_path, 1)
    run("load:plain", tmp_path, 4)
    run("load:rows", tmp_path, 2)


def test_parts_of_the_state_are_the_same_on_all_ranks(tmp_path):
    run("parts_of_the_state", tmp_path, 2)


def test_a_rank_that_dies_while_memory_is_shared_leaves_none(tmp_path):
    (status, output), (died, _) = separately("dies_while_sharing", tmp_path, 2, program=SCENARIOS)
    assert died == 137
    assert status == 0, output
