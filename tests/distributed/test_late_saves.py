"""Real ranks train on while their saves are still copied: shards, replicas, busy ranks, and ranks that are killed."""

from __future__ import annotations

from pathlib import Path

import pytest

import dtruntime_torch as dt
from tests.distributed import late_scenarios
from tests.distributed.in_turn import check_outcome
from tests.distributed.launch import in_turn, separately, torchrun

PROGRAM = Path(late_scenarios.__file__)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("late")
    in_turn(tuple(late_scenarios.SCENARIOS), folder, 4, program=PROGRAM)
    return folder


@pytest.mark.parametrize("scenario", late_scenarios.SCENARIOS)
def test_on_four_ranks(outcomes, scenario):
    check_outcome(outcomes, scenario, 4)


def test_a_job_that_is_killed_while_it_stages_goes_on_exactly_from_the_save_before(tmp_path):
    ended = separately("dies_while_staging", tmp_path, 2, program=PROGRAM)
    assert [status for status, _ in ended] == [-9, -9], ended
    with dt.CheckpointManager(tmp_path / "ckpt") as manager:
        assert [info.step for info in manager.list()] == [1]
    torchrun("goes_on_as_if_nobody_had_died", tmp_path, 2, program=PROGRAM)
