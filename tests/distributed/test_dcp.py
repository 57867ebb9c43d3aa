"""Real ranks under torchrun save and load by DCP through our writer, reader and stager."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed import dcp_scenarios
from tests.distributed.in_turn import check_outcome
from tests.distributed.launch import in_turn

PROGRAM = Path(dcp_scenarios.__file__)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dcp")
    in_turn(tuple(dcp_scenarios.SCENARIOS), folder, 4, program=PROGRAM)
    return folder


@pytest.mark.parametrize("scenario", dcp_scenarios.SCENARIOS)
def test_on_four_ranks(outcomes, scenario):
    check_outcome(outcomes, scenario, 4)
