"""What another run, or an older one, left in the same place is never taken for this run's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

import dtruntime_torch as dt
from dtruntime_torch.errors import CommitConflict, CorruptCheckpoint


def state_of(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((5000,), value)}


def saved(folder: Path, value: float, *steps: int) -> Path:
    """The checkpoints of a run that has this place for itself."""
    with dt.CheckpointManager(folder, chunk_bytes=4096, keep_last_n=None) as manager:
        for step in steps:
            manager.save(state_of(value + step), step)
    return folder


@pytest.fixture
def foreign(tmp_path) -> Path:
    return saved(tmp_path / "foreign", 100, 1, 2, 5)


def copy_in(foreign: Path, ours: Path, *parts: str) -> None:
    """Copies files of the other run, not over any that are there."""
    for path in sorted(foreign.rglob("*")):
        target = ours / path.relative_to(foreign)
        if path.is_file() and not target.exists() and str(path.relative_to(foreign)).startswith(parts):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)


def loaded(folder: Path, **asked: int) -> tuple[int, float]:
    with dt.CheckpointManager(folder) as manager:
        state = state_of(0)
        step = manager.load(state, **asked).step
    return step, state["w"][0].item()


def test_an_attempt_without_a_commit_is_no_checkpoint(tmp_path, foreign):
    ours = saved(tmp_path / "ours", 0, 1)
    copy_in(foreign, ours, "model/step-")
    with dt.CheckpointManager(ours) as manager:
        assert [info.step for info in manager.list()] == [1]
    assert loaded(ours) == (1, 1)


@pytest.mark.parametrize(
    "what", [("model/step-",), ("model/step-", "model/commits")], ids=["files", "commits"]
)
def test_what_lies_where_a_save_writes_stays_apart_from_it(tmp_path, foreign, what):
    ours = tmp_path / "ours"
    with dt.CheckpointManager(ours, keep_last_n=None) as manager:
        manager.save(state_of(1), 1)
        copy_in(foreign, ours, *what)
        (ours / "model/step-00000002/0001-1/shard-00001-of-00002.safetensors").write_bytes(b"older")
        if len(what) == 2:
            with pytest.raises(CommitConflict, match=r"0001-00000002\.json is that of"):
                manager.save(state_of(2), 2)
            return
        info = manager.save(state_of(2), 2)
        assert info.path == "model/step-00000002/0001-2"
        assert manager.verify(2).ok
    assert loaded(ours) == (2, 2)
    stock = state_of(0)
    dcp_load(stock, storage_reader=HuggingFaceStorageReader(str(ours / info.path)))
    assert torch.equal(stock["w"], state_of(2)["w"])


def test_a_commit_of_another_run_is_passed_over_with_a_warning(tmp_path, foreign):
    ours = saved(tmp_path / "ours", 0, 1)
    copy_in(foreign, ours, "model/")
    with pytest.warns(
        RuntimeWarning, match=r"0001-00000005\.json is of run \w+, and \S+/0001\.json says run"
    ):
        assert loaded(ours) == (1, 1)
    with pytest.raises(CorruptCheckpoint, match="the checkpoint was copied in"):
        loaded(ours, step=5)
    with dt.CheckpointManager(ours, keep_last_n=None) as manager:
        with pytest.warns(RuntimeWarning):
            manager.load(state_of(0))
        manager.save(state_of(7), 7)
    assert loaded(ours) == (7, 7)


def test_where_the_record_of_a_generation_is_damaged_the_error_names_it_and_without_it_all_loads(tmp_path):
    ours = saved(tmp_path / "ours", 0, 1)
    record = ours / "model/generations/0001.json"
    content = json.loads(record.read_text())
    record.write_text(json.dumps({**content, "run_id": "0" * 32}))
    told = pytest.warns(RuntimeWarning, match=r"0001\.json is damaged \(delete that file")
    with told, pytest.raises(CorruptCheckpoint, match="can be loaded; the warnings say why"):
        loaded(ours)
    record.unlink()
    assert loaded(ours) == (1, 1)


def test_a_checkpoint_that_was_moved_as_a_whole_is_loaded(tmp_path, foreign):
    copy_in(foreign, tmp_path / "moved", "model/step-00000002", "model/commits/0001-00000002")
    assert loaded(tmp_path / "moved") == (2, 102)


def test_files_of_another_run_over_ours_are_damage(tmp_path, foreign):
    ours = saved(tmp_path / "ours", 0, 1, 2)
    attempt = "model/step-00000002/0001-1"
    for path in (foreign / attempt).iterdir():
        shutil.copy(path, ours / attempt / path.name)
    with pytest.warns(RuntimeWarning, match=f"{attempt}/manifest.json"):
        assert loaded(ours) == (1, 1)
    with dt.CheckpointManager(ours) as manager:
        assert not manager.verify(2).ok


@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
def test_one_file_of_another_run_over_ours_is_damage(tmp_path, foreign, suffix):
    ours = saved(tmp_path / "ours", 0, 1, 2)
    name = f"model/step-00000002/0001-1/shard-00000-of-00001{suffix}"
    shutil.copy(foreign / name, ours / name)
    with pytest.warns(RuntimeWarning, match=name):
        assert loaded(ours) == (1, 1)


def test_the_manifest_names_the_run_and_its_parent(tmp_path):
    ours = saved(tmp_path / "ours", 0, 1)
    with dt.CheckpointManager(ours) as manager:
        manager.load(state_of(0))
        manager.save(state_of(2), 2)
    first, second = (
        json.loads((ours / path / "manifest.json").read_bytes())
        for path in ("model/step-00000001/0001-1", "model/step-00000002/0002-1")
    )
    record = json.loads((ours / "model/generations/0002.json").read_bytes())
    assert (first["parent"], second["parent"]) == (None, [1, 1])
    assert second["run_id"] == record["run_id"] != first["run_id"]
