"""Scenarios of saves in the background; each runs on every rank of four, through both doors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import AsyncStager, DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, async_save

import dtruntime_torch as dt
from tests.distributed.dcp_doors import Doors, State, assert_same, whole
from tests.distributed.dcp_model_cases import KINDS, Progress, fsdp, fsdp2, state_of, trained
from tests.distributed.dcp_states import RANK

THREAD, PROCESS = AsyncCheckpointerType.THREAD, AsyncCheckpointerType.PROCESS


def stock_stager(**options: bool) -> AsyncStager:
    quiet = {"use_pinned_memory": False, "use_shared_memory": False, "use_async_staging": False}
    return DefaultStager(StagingOptions(**{**quiet, "use_non_blocking_copy": False, **options}))


WAYS: tuple[tuple[AsyncCheckpointerType, Callable[[], AsyncStager]], ...] = (
    (THREAD, lambda: stock_stager(use_async_staging=True)),
    (THREAD, lambda: dt.PinnedStager()),
    (PROCESS, lambda: stock_stager(use_shared_memory=True)),
    (PROCESS, lambda: dt.PinnedStager()),
    (PROCESS, lambda: dt.PinnedStager(shared=True)),
)


def ended(saving: Any) -> Any:
    """The future of the save, once the state may change again."""
    if hasattr(saving, "staging_completion"):
        saving.staging_completion.result()
        return saving.upload_completion
    return saving


def overwrite(value: Any) -> None:
    if isinstance(value, torch.Tensor):
        value.detach().fill_(-1)
    for item in value.values() if isinstance(value, dict) else ():
        overwrite(item)


def what_is_saved_is_the_state_at_the_call(doors: Doors) -> None:
    """With stock stagers and ours, in a thread and in a process; two in a row by one stager."""
    for n, (kind, make) in enumerate(WAYS if doors.ours else WAYS[:3:2]):  # stock stagers through both
        stager = make()
        for again in range(2):
            name = f"{n}-{again}"
            model = (fsdp, fsdp2)[again](again)
            state = state_of(model, trained(model)) | {"progress": Progress([0.5, float(again)]), "n": n}
            expected = whole({"model": state["model"], "optimizer": state["optimizer"]["state"]})
            saving = async_save(
                state, storage_writer=doors.writer(name), async_stager=stager, async_checkpointer_type=kind
            )
            upload = ended(saving)
            overwrite(state)
            upload.result()
            other = fsdp2(9)
            target = state_of(other, trained(other, 1)) | {"progress": Progress([]), "n": None}
            doors.load(target, name)
            assert_same({"model": target["model"], "optimizer": target["optimizer"]["state"]}, expected)
            assert target["progress"].losses == [0.5, float(again)] and target["n"] == n
        stager.close()


def a_save_that_fails_does_not_end_those_after_it(doors: Doors) -> None:
    """In a process that goes on, and in threads: the folder is taken, and the next one is not."""
    doors.save({"w": torch.ones(1)}, "taken")
    for kind in (THREAD, PROCESS):
        state = {"w": torch.full((4,), 3.0), "n": 5}
        for place, works in (("taken", False), (kind.name, True)):
            saving: Any = async_save(state, storage_writer=doors.writer(place), async_checkpointer_type=kind)
            if works:
                saving.result()
            else:
                with pytest.raises(CheckpointException, match="already"):
                    saving.result()
        dist.barrier()
        target = doors.load({"w": torch.zeros(4), "n": None}, kind.name)
        assert (target["w"] == 3).all() and target["n"] == 5


def every_kind_of_model_is_staged(doors: Doors) -> None:
    for kind in KINDS:
        stager = dt.PinnedStager()
        model = kind(1)
        state = get_model_state_dict(model)
        expected = whole(state)
        saving: Any = async_save(state, storage_writer=doors.writer(kind.__name__), async_stager=stager)
        overwrite(state)
        saving.result()
        target = doors.load(get_model_state_dict(kind(2)), kind.__name__)
        assert_same(target, expected)


def the_next_one_begins_before_one_has_ended(doors: Doors) -> None:
    """Each in a group of its own, or their messages would mix; by one writer that knows each folder by its name."""
    groups = [dist.new_group([0, 1, 2, 3]) for _ in range(3)]
    writers = [dt.StorageWriter()] * 3 if doors.ours else [doors.writer(str(n)) for n in range(3)]
    state: State = {"w": torch.full((100_000,), 0.0), "rank": RANK}
    stager, savings = dt.PinnedStager(), []
    for n, (group, writer) in enumerate(zip(groups, writers, strict=True)):
        state["w"].fill_(float(n))
        place = doors.folder / str(n)
        saving = async_save(
            state, storage_writer=writer, checkpoint_id=place, async_stager=stager, process_group=group
        )
        savings.append(saving)
    for one in savings:
        ended(one).result()
    dist.barrier()
    for n in range(3):
        assert (doors.load({"w": torch.ones(100_000)}, str(n))["w"] == n).all()


CASES = (
    what_is_saved_is_the_state_at_the_call,
    a_save_that_fails_does_not_end_those_after_it,
    every_kind_of_model_is_staged,
    the_next_one_begins_before_one_has_ended,
)
