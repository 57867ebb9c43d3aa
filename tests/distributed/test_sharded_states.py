"""FSDP2, hybrid and tensor-parallel states on four ranks, beside what torch.distributed.checkpoint makes of them."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch.multiprocessing as mp

from tests.distributed import sharded_states
from tests.distributed.in_turn import check_outcome


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outcomes")
    # A rank that fails says so in its file, and takes the others down with it.
    with contextlib.suppress(mp.ProcessExitedException):
        mp.spawn(sharded_states.run, (str(folder),), nprocs=sharded_states.WORLD)
    return folder


@pytest.mark.parametrize("scenario", sharded_states.SCENARIOS)
def test_on_four_ranks(outcomes: Path, scenario: str) -> None:
    check_outcome(outcomes, scenario, sharded_states.WORLD)
