"""What goes wrong on some ranks only; each scenario runs on every rank of four, through our writer and reader."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_loader import load_state_dict
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.checkpoint.state_dict_saver import save_state_dict
from torch.distributed.tensor import Shard, distribute_tensor

import dtruntime_torch as dt
from dtruntime_torch.errors import StorageError
from tests.distributed.dcp_doors import State, assert_same
from tests.distributed.dcp_states import RANK
from tests.distributed.in_turn import MESHES


def state_of(value: float) -> State:
    whole = torch.arange(5 * 1000.0).view(5, 1000) + value
    return {"w": distribute_tensor(whole, MESHES[4,], [Shard(0)]), "plain": torch.full((3,), value)}


@contextmanager
def fails_on(*ranks: int) -> Iterator[list[Any]]:
    """Every rank is told of the ranks that failed, and of these alone; the list holds what was wrong there."""
    found: list[Any] = []
    with pytest.raises(CheckpointException) as caught:
        yield found
    assert sorted(caught.value.failures) == sorted(ranks)
    found.extend(error for error, _ in caught.value.failures.values())


def failing(kind: type[Any], step: str, *ranks: int) -> type[Any]:
    """A writer or reader of which one step fails on these ranks."""

    def fail(self: Any, *args: Any, **options: Any) -> Any:
        if RANK in ranks:
            raise ValueError(f"{step} on rank {RANK}")
        return getattr(kind, step)(self, *args, **options)

    return type("Failing", (kind,), {step: fail})


SAVE_STEPS = (
    ("set_up_storage_writer", 0, 2),
    ("prepare_local_plan", 0, 0),
    ("prepare_global_plan", 0, 0),
    ("write_data", 0, 2),
    ("write_data", 2, 2),
    ("finish", 0, 0),
    ("set_up_storage_writer", 1, 1),
    ("prepare_global_plan", 1, 1),
    ("finish", 1, 1),
)
LOAD_STEPS = (
    ("set_up_storage_reader", 0, 0),
    ("prepare_local_plan", 0, 1),
    ("prepare_global_plan", 0, 0),
    ("read_data", 0, 3),
    ("set_up_storage_reader", 3, 0),
    ("prepare_global_plan", 1, 1),
    ("read_data", 2, 0),
)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def a_step_of_a_save_fails_on_a_rank(folder: Path) -> None:
    """Whoever coordinates: there is no checkpoint then, and the next save in the folder makes one."""
    for n, (step, coordinator, rank) in enumerate(SAVE_STEPS):
        place = folder / str(n)
        with fails_on(rank):
            writer = failing(dt.StorageWriter, step, rank)(place)
            save_state_dict(state_of(1), writer, coordinator_rank=coordinator)
        assert not (place / "manifest.json").exists()
        dist.barrier()
        dcp_save(state_of(2), storage_writer=dt.StorageWriter(place))
        target = state_of(0)
        dcp_load(target, storage_reader=dt.StorageReader(place))
        assert_same(target, state_of(2))
        dist.barrier()


def a_step_of_a_load_fails_on_a_rank(folder: Path) -> None:
    dcp_save(state_of(1), storage_writer=dt.StorageWriter(folder))
    for step, coordinator, rank in LOAD_STEPS:
        target = state_of(0)
        with fails_on(rank):
            reader = failing(dt.StorageReader, step, rank)(folder)
            load_state_dict(target, reader, coordinator_rank=coordinator)
        load_state_dict(target, dt.StorageReader(folder), coordinator_rank=coordinator)
        assert_same(target, state_of(1))


@contextmanager
def no_file_longer_than(nbytes: int) -> Iterator[None]:
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def a_rank_has_no_room(folder: Path) -> None:
    """An earlier checkpoint stays what it is, a place without one has none; with room again both work."""
    old, new = folder / "old", folder / "new"
    dcp_save(state_of(1), storage_writer=dt.StorageWriter(old))
    for place in (old, new):
        with no_file_longer_than(1000 if RANK == 1 else 1 << 30), fails_on(1) as errors:
            dcp_save(state_of(2), storage_writer=dt.StorageWriter(place, overwrite=True))
        assert isinstance(errors[0], StorageError) and errors[0].errno, repr(errors)
        assert not (new / "manifest.json").exists()
    target = state_of(0)
    dcp_load(target, storage_reader=dt.StorageReader(old))
    assert_same(target, state_of(1))
    for place in (old, new):
        dcp_save(state_of(3), storage_writer=dt.StorageWriter(place, overwrite=True))
        dcp_load(target, storage_reader=dt.StorageReader(place))
        assert_same(target, state_of(3))


def a_rank_wants_what_is_not_there(folder: Path) -> None:
    """Refused on that rank by a strict planner; left as it is by one that is not."""
    dcp_save(state_of(1), storage_writer=dt.StorageWriter(folder))
    target = state_of(0) | ({"more": torch.full((2,), 7.0)} if RANK == 3 else {})
    with fails_on(3) as errors:
        dcp_load(target, storage_reader=dt.StorageReader(folder))
    assert "more" in str(errors[0])
    planner = DefaultLoadPlanner(allow_partial_load=True)
    dcp_load(target, storage_reader=dt.StorageReader(folder), planner=planner)
    assert RANK != 3 or (target.pop("more") == 7).all()
    assert_same(target, state_of(1))


CASES = (
    a_step_of_a_save_fails_on_a_rank,
    a_step_of_a_load_fails_on_a_rank,
    a_rank_has_no_room,
    a_rank_wants_what_is_not_there,
)
