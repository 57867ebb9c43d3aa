"""A rank is killed in the middle of a save by DCP: the others are told, and the folder holds what it held."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

import dtruntime_torch as dt
from tests.checkpoint.dcp.calls import load, refused_to_read, save
from tests.distributed import dcp_killed
from tests.distributed.launch import separately


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> tuple[Path, list[tuple[int, str]]]:
    folder = tmp_path_factory.mktemp("killed")
    return folder, separately("killed", folder, 4, program=Path(dcp_killed.__file__))


def test_the_rank_that_is_left_is_told(killed):
    _, ends = killed
    assert [code for code, _ in ends] == [0, -signal.SIGKILL, -signal.SIGKILL, 0]
    assert "failed: " in ends[0][1] and "failed: " in ends[3][1]


def test_killed_while_it_writes_the_old_one_stays_and_is_replaced_next_time(killed):
    place = killed[0] / "writing"
    state = {"w": torch.zeros(5, 1000), "value": None}
    assert load(state, place)["value"] == 1.0 and (state["w"] == 1).all()
    replaces(place, state)


def test_killed_before_the_commit_there_is_none_and_the_next_save_makes_one(killed):
    place = killed[0] / "committing"
    state = {"w": torch.zeros(5, 1000), "value": None}
    with refused_to_read("holds no checkpoint: a save that was begun there never ended"):
        load(state, place)
    replaces(place, state)


def replaces(place: Path, state: dict) -> None:
    save({"w": torch.full((5, 1000), 3.0), "value": 3.0}, dt.StorageWriter(place, overwrite=True))
    assert load(state, place)["value"] == 3.0 and (state["w"] == 3).all()
    assert len(list(place.iterdir())) == 3
