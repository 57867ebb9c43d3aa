"""One writer or reader that several threads use at once, as `dcp.async_save` does if one save begins before another ends."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

import dtruntime_torch as dt
from tests.checkpoint.dcp.calls import State, load, save


def state_of(value: float) -> State:
    return {"w": torch.full((3,), value), "value": value}


def blank() -> State:
    return {"w": torch.zeros(3), "value": None}


def meanwhile(act: Callable[[], object]) -> None:
    other = threading.Thread(target=act)
    other.start()
    other.join()


class SlowSave(DefaultSavePlanner):
    """Between the look at the folder and the first byte written, something else happens in another thread."""

    def __init__(self, act: Callable[[], object]) -> None:
        super().__init__()
        self.act = act

    def create_local_plan(self) -> Any:
        meanwhile(self.act)
        return super().create_local_plan()


class SlowLoad(DefaultLoadPlanner):
    def __init__(self, act: Callable[[], object]) -> None:
        super().__init__()
        self.act = act

    def create_local_plan(self) -> Any:
        meanwhile(self.act)
        return super().create_local_plan()


def test_a_writer_saves_to_two_folders_at_once(tmp_path: Path) -> None:
    writer = dt.StorageWriter()
    between = SlowSave(lambda: save(state_of(2), writer, checkpoint_id=tmp_path / "inner"))
    save(state_of(1), writer, checkpoint_id=tmp_path / "outer", planner=between)
    for name, value in (("outer", 1), ("inner", 2)):
        assert load(blank(), tmp_path / name)["value"] == value


def test_a_writer_that_is_given_to_the_next_save_finishes_the_one_before(tmp_path: Path) -> None:
    writer = dt.StorageWriter()
    between = SlowSave(lambda: writer.reset(tmp_path / "next"))
    save(state_of(1), writer, checkpoint_id=tmp_path / "one", planner=between)
    assert load(blank(), tmp_path / "one")["value"] == 1
    assert not (tmp_path / "next").exists()


def test_a_reader_loads_two_folders_at_once(tmp_path: Path) -> None:
    for value in (1, 2):
        save(state_of(value), tmp_path / str(value))
    reader = dt.StorageReader()
    inner, outer = blank(), blank()
    between = SlowLoad(lambda: load(inner, reader, checkpoint_id=tmp_path / "2"))
    load(outer, reader, checkpoint_id=tmp_path / "1", planner=between)
    assert (outer["w"] == 1).all() and (inner["w"] == 2).all()


@pytest.mark.filterwarnings("ignore:.*single process")  # by one for all: the filters are not the threads' own
def test_many_threads_save_and_load_each_its_own(tmp_path: Path) -> None:
    writer, reader, begin = dt.StorageWriter(), dt.StorageReader(), threading.Barrier(4)
    found: dict[int, State] = {}

    def act(value: int) -> None:
        begin.wait()
        options: Any = {"checkpoint_id": tmp_path / str(value), "no_dist": True}
        dcp_save(state_of(value), storage_writer=writer, **options)
        dcp_load(found.setdefault(value, blank()), storage_reader=reader, **options)

    threads = [threading.Thread(target=act, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {value: state["value"] for value, state in found.items()} == {n: n for n in range(4)}
    assert all((state["w"] == value).all() for value, state in found.items())
