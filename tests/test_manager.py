"""What a user of CheckpointManager meets: order, errors at the door, metadata, listings, closing."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import math
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from typing_extensions import assert_type

import dtruntime_torch as dt
from dtruntime_torch.checkpoint.names import CommitKey
from dtruntime_torch.errors import (
    CheckpointMismatch,
    CheckpointNotFound,
    CommitConflict,
    CorruptCheckpoint,
    InvalidArgument,
    StorageError,
    UnsupportedType,
)
from dtruntime_torch.storage import LocalBackend
from tests.checkpoint.saved_checkpoints import make_newer

STATE = {"w": torch.arange(6.0)}


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_every_public_policy_is_something_that_the_manager_takes():
    taken = str(inspect.signature(dt.CheckpointManager))
    policies = [name for name in dt.__all__ if name.endswith("Policy")]
    assert policies and [name for name in policies if name not in taken] == []


def test_nothing_is_made_before_the_first_save(tmp_path):
    with dt.CheckpointManager(tmp_path / "new"):
        assert not (tmp_path / "new").exists()


def test_latest_of_nothing_is_none(tmp_path):
    with dt.CheckpointManager(tmp_path) as manager:
        assert manager.latest() is None and manager.list() == []


def test_list_is_in_the_order_of_generation_and_step(tmp_path):
    with dt.CheckpointManager(tmp_path) as manager:
        for step in (5, 10):
            manager.save(STATE, step)
    with dt.CheckpointManager(tmp_path) as manager:
        manager.load({"w": torch.zeros(6)}, step=5)
        manager.save(STATE, 7)
        assert [(info.generation, info.step) for info in manager.list()] == [(1, 5), (1, 10), (2, 7)]
        latest = manager.latest()
        assert latest is not None and latest.step == 7


def test_one_of_a_later_version_is_left_out_of_the_list(tmp_path):
    with dt.CheckpointManager(tmp_path) as manager:
        infos = [manager.save(STATE, step) for step in (1, 2)]
        make_newer(LocalBackend(tmp_path), "model", CommitKey(1, 2))
        assert manager.list() == infos[:1]
        assert manager.latest() == infos[0]


def test_where_all_is_damaged_the_error_carries_the_damage(tmp_path):
    with dt.CheckpointManager(tmp_path) as manager:
        for step in (1, 2, 3):
            manager.save(STATE, step)
        for path in tmp_path.glob("model/step-0000000[12]/*/*.safetensors"):
            path.write_bytes(path.read_bytes()[:-1])
        (tmp_path / "model/commits/0001-00000003.json").write_bytes(b"{}")
        for load in (lambda: manager.load({"w": torch.zeros(6)}), manager.load_checkpoint):
            passed_over = pytest.warns(RuntimeWarning, match="passed over")
            with (
                passed_over,
                pytest.raises(CorruptCheckpoint, match="no checkpoint called model can be loaded") as caught,
            ):
                load()
            damaged = list(dict.fromkeys(damage.file for damage in caught.value.damage))
            assert damaged[0] == "model/commits/0001-00000003.json"
            assert [path.split("/")[1] for path in damaged[1:]] == ["step-00000002", "step-00000001"]


def test_info_tells_what_was_saved(tmp_path):
    with dt.CheckpointManager(tmp_path, "net") as manager:
        info = manager.save(STATE, 3, metadata={"loss": 0.5})
        assert info == manager.latest()
    assert (info.name, info.step, info.nbytes, info.full, info.world_size) == ("net", 3, 24, True, 1)
    assert info.metadata == {"loss": 0.5} and info.versions["torch"] == torch.__version__
    assert info.path == "net/step-00000003/0001-1" and info.written > 24


def test_info_tells_where_a_checkpoint_comes_from(tmp_path):
    with dt.CheckpointManager(tmp_path) as manager:
        first, second = (manager.save(STATE, step) for step in (3, 4))
    with dt.CheckpointManager(tmp_path) as manager:
        assert manager.load({"w": torch.zeros(6)}, step=3).parent is None
        third = manager.save(STATE, 4)
        listed = manager.list()
    assert [info.parent for info in (first, second, third)] == [None, (1, 3), (1, 3)]
    assert first.run_id == second.run_id != third.run_id
    assert listed == [first, second, third]
    assert [(info.run_id, info.parent) for info in listed] == [
        (info.run_id, info.parent) for info in (first, second, third)
    ]


def test_info_tells_the_length_and_the_digest_of_each_part(tmp_path):
    with dt.CheckpointManager(tmp_path) as manager:
        saved = manager.save(STATE, 3)
        loaded = manager.load({"w": torch.zeros(6)})
    (part,) = saved.parts
    data = (tmp_path / saved.path / part.path).read_bytes()
    assert (part.rank, part.length, part.sha256) == (0, len(data), hashlib.sha256(data).hexdigest())
    assert part.data_length == saved.written
    assert loaded.parts == saved.parts
    assert part.sha256 not in repr(saved) and saved.run_id in repr(saved)


def test_a_save_is_awaitable(tmp_path):
    async def save(manager: dt.CheckpointManager) -> dt.CheckpointInfo:
        return await manager.save_async(STATE, 1)

    with dt.CheckpointManager(tmp_path) as manager:
        assert asyncio.run(save(manager)).step == 1


def test_a_manager_works_inside_a_running_event_loop(tmp_path):
    async def main() -> int:
        with dt.CheckpointManager(tmp_path) as manager:
            manager.save(STATE, 1)
            return manager.load({"w": torch.zeros(6)}).step

    assert asyncio.run(main()) == 1


def test_load_fills_the_newest(tmp_path):
    with dt.CheckpointManager(tmp_path) as manager:
        for step in (1, 2):
            manager.save({"w": torch.full((6,), float(step)), "note": f"step {step}"}, step)
        state = {"w": torch.zeros(6), "note": ""}
        assert manager.load(state).step == 2
    assert torch.equal(state["w"], torch.full((6,), 2.0)) and state["note"] == "step 2"


def test_a_step_can_be_asked_for(tmp_path):
    with dt.CheckpointManager(tmp_path) as manager:
        for step in (1, 2):
            manager.save({"w": torch.full((6,), float(step))}, step)
        state = {"w": torch.zeros(6)}
        assert manager.load(state, step=1).step == 1
    assert torch.equal(state["w"], torch.ones(6))


def test_load_of_nothing_says_so(tmp_path):
    with dt.CheckpointManager(tmp_path) as manager, pytest.raises(CheckpointNotFound, match="model"):
        manager.load({"w": torch.zeros(6)})


def test_load_of_an_unknown_step_says_so(tmp_path):
    with dt.CheckpointManager(tmp_path) as manager:
        manager.save(STATE, 1)
        with pytest.raises(CheckpointNotFound, match="7"):
            manager.load({"w": torch.zeros(6)}, step=7)


def test_a_roll_back_saves_the_same_steps_again(tmp_path):
    with dt.CheckpointManager(tmp_path) as manager:
        for step in (500, 1000):
            manager.save(STATE, step)
    with dt.CheckpointManager(tmp_path) as manager:
        manager.load({"w": torch.zeros(6)}, step=500)
        info = manager.save({"w": torch.ones(6)}, 1000)
        assert (info.generation, info.step) == (2, 1000)
        state = {"w": torch.zeros(6)}
        assert manager.load(state) == info
    assert torch.equal(state["w"], torch.ones(6))


@pytest.mark.parametrize("step", [3, 5])
def test_a_manager_that_loaded_nothing_saves_only_above_the_newest_step(tmp_path, step):
    with dt.CheckpointManager(tmp_path) as manager:
        manager.save(STATE, 5)
    before = files(tmp_path)
    with dt.CheckpointManager(tmp_path) as manager, pytest.raises(CommitConflict, match="load"):
        manager.save(STATE, step)
    assert files(tmp_path) == before


def test_steps_must_rise(tmp_path):
    with dt.CheckpointManager(tmp_path) as manager:
        manager.save(STATE, 5)
        with pytest.raises(InvalidArgument, match="not above 5"):
            manager.save(STATE, 5)
        manager.save(STATE, 6)


def test_a_replaced_manager_learns_it_at_its_next_save(tmp_path):
    with dt.CheckpointManager(tmp_path) as old, dt.CheckpointManager(tmp_path) as new:
        old.save(STATE, 1)
        new.load({"w": torch.zeros(6)})
        new.save(STATE, 2)
        with pytest.raises(CommitConflict, match="replaced"):
            old.save(STATE, 3)
        assert [info.step for info in new.list()] == [1, 2]


def test_the_save_after_a_failed_one_is_good(tmp_path):
    with dt.CheckpointManager(tmp_path) as manager:
        manager.save(STATE, 1)
        with pytest.raises(UnsupportedType):
            manager.save({"w": object()}, 2)
        manager.save(STATE, 2)
        assert manager.verify().ok


@pytest.mark.parametrize("step", [-1, 1.5, "7", True, None, 10**30])
def test_a_step_that_is_no_step_is_refused(tmp_path, step):
    with dt.CheckpointManager(tmp_path) as manager, pytest.raises(InvalidArgument, match="step"):
        manager.save(STATE, step)
    assert not files(tmp_path)


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "..", "x" * 101, "ü"])
def test_a_bad_name_is_refused(tmp_path, name):
    with pytest.raises(InvalidArgument, match="name"):
        dt.CheckpointManager(tmp_path, name)


@pytest.mark.parametrize("metadata", [object(), {1: 2}, (1,), {"~": {2: 3}}, {"t": torch.ones(1)}])
def test_metadata_that_is_no_json_is_refused(tmp_path, metadata):
    with dt.CheckpointManager(tmp_path) as manager, pytest.raises(InvalidArgument, match="metadata"):
        manager.save(STATE, 1, metadata=metadata)


def test_a_loss_that_became_nan_costs_no_save(tmp_path):
    metadata = {"loss": math.nan, "range": [math.inf, -math.inf], "mean": np.float64("nan"), "lr": 0.1}
    with dt.CheckpointManager(tmp_path) as manager:
        infos = [manager.save(STATE, 1, metadata), *manager.list(), manager.load({"w": torch.zeros(6)})]
    for info in infos:
        assert repr(info.metadata) == "{'loss': nan, 'lr': 0.1, 'mean': nan, 'range': [inf, -inf]}"


def test_metadata_that_is_nested_too_deep_is_refused_at_the_door(tmp_path):
    endless: list[object] = []
    endless.append(endless)
    deep: list[object] = []
    for _ in range(600):
        deep = [deep]
    with dt.CheckpointManager(tmp_path) as manager:
        for metadata in (deep, endless):
            with pytest.raises(InvalidArgument, match="metadata.* 64 containers"):
                manager.save(STATE, 1, metadata)
        assert manager.list() == [] and manager.failed_saves == 0
        assert manager.save(STATE, 1).step == 1


def test_a_path_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises((InvalidArgument, StorageError), match="file"):
        dt.CheckpointManager(tmp_path / "file")


def test_what_cannot_be_encoded_is_named_by_its_key(tmp_path):
    with dt.CheckpointManager(tmp_path) as manager, pytest.raises(UnsupportedType, match=r"a\.b"):
        manager.save({"a": {"b": object()}}, 1)
    assert not files(tmp_path)


def test_all_differences_are_listed_and_nothing_is_changed(tmp_path):
    with dt.CheckpointManager(tmp_path) as manager:
        manager.save({"same": torch.ones(2), "shape": torch.ones(3), "gone": torch.ones(1)}, 1)
        state = {"same": torch.zeros(2), "shape": torch.zeros(4), "new": torch.zeros(1)}
        with pytest.raises(CheckpointMismatch) as caught:
            manager.load(state)
    assert all(name in str(caught.value) for name in ("shape", "gone", "new"))
    assert "same" not in str(caught.value) and not state["same"].any()


def test_a_closed_manager_refuses(tmp_path):
    manager = dt.CheckpointManager(tmp_path)
    manager.close()
    manager.close()
    with pytest.raises(InvalidArgument, match="closed"):
        manager.save(STATE, 1)


def test_close_waits_for_the_save(tmp_path):
    manager = dt.CheckpointManager(tmp_path)
    handle = manager.save_async(STATE, 1)
    manager.close()
    assert handle.done() and handle.result().step == 1


def test_a_writer_writes_bytes_and_states_under_any_name(tmp_path):
    async def write() -> None:
        writer = dt.CheckpointWriter(tmp_path)
        await asyncio.gather(
            writer.write_checkpoint("blob", 1, b"data"), writer.write_checkpoint("net", 4, STATE)
        )
        await writer.write_checkpoint("blob", 2, b"more")

    asyncio.run(write())
    with dt.CheckpointManager(tmp_path) as manager:
        assert manager.load_checkpoint("blob") == b"more"
        assert manager.load_checkpoint("blob", step=1) == b"data"
        loaded = manager.load_checkpoint("net")
    assert isinstance(loaded, dict) and torch.equal(loaded["w"], STATE["w"])


def test_what_load_checkpoint_returns_needs_no_cast_where_it_is_a_state_dict(tmp_path: Path) -> None:
    # What is claimed of types here, mypy checks.
    with dt.CheckpointManager(tmp_path) as manager:
        manager.save({"model": torch.nn.Linear(2, 2)}, 1)
        model = torch.nn.Linear(2, 2)
        model.load_state_dict(manager.load_checkpoint()["model"])
        asyncio.run(dt.CheckpointWriter(tmp_path).write_checkpoint("blob", 1, b"data"))
        data = manager.load_checkpoint("blob")
        assert isinstance(data, bytes)
        assert_type(data, bytes)
        assert data == b"data"


def test_a_writer_keeps_metadata(tmp_path):
    writer = dt.CheckpointWriter(tmp_path)
    info = asyncio.run(writer.write_checkpoint("blob", 1, b"data", metadata={"loss": 0.5}))
    assert info.metadata == {"loss": 0.5}


def test_an_optimizer_of_another_class_is_a_difference(tmp_path):
    model = torch.nn.Linear(2, 2)
    with dt.CheckpointManager(tmp_path) as manager:
        manager.save({"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}, 1)
        with pytest.raises(CheckpointMismatch, match="another class"):
            manager.load({"model": model, "optimizer": torch.optim.AdamW(model.parameters())})


def test_a_mistake_in_the_state_of_a_load_is_raised_as_what_it_is(tmp_path):
    model = torch.nn.Linear(2, 2)
    with dt.CheckpointManager(tmp_path) as manager:
        manager.save({"model": model}, 1)
        with pytest.raises(InvalidArgument):
            manager.load(model)


def test_a_job_that_was_replaced_does_not_train_on_without_saving(tmp_path):
    with dt.CheckpointManager(tmp_path) as old, dt.CheckpointManager(tmp_path) as new:
        old.save(STATE, 1)
        new.load({"w": torch.zeros(6)})
        new.save(STATE, 2)
        old.save_async(STATE, 3)
        with pytest.raises(CommitConflict, match="replaced"):
            old.save_async(STATE, 4)
        with pytest.raises(CommitConflict):
            old.close()


def test_threads_that_save_and_load_take_turns(tmp_path):
    failures: list[BaseException] = []
    with dt.CheckpointManager(tmp_path, timeout=60) as manager:
        manager.save({"a": torch.ones(10)}, 1)

        def load() -> None:
            for _ in range(20):
                manager.load({"a": torch.zeros(10)})

        def save() -> None:
            for step in range(2, 22):
                manager.save({"a": torch.ones(10)}, step)

        def kept(work) -> None:
            try:
                work()
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=kept, args=(work,)) for work in (load, load, save)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures
