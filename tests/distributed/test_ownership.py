"""Pipelines, experts, buffers that differ, worlds that grow: who writes what, and what comes back. Under torchrun."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed import ownership
from tests.distributed.in_turn import check_outcome
from tests.distributed.launch import in_turn


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outcomes")
    in_turn(tuple(ownership.SCENARIOS), folder, ownership.WORLD, program=Path(ownership.__file__))
    return folder


@pytest.mark.parametrize("scenario", ownership.SCENARIOS)
def test_on_four_ranks(outcomes: Path, scenario: str) -> None:
    check_outcome(outcomes, scenario, ownership.WORLD)
