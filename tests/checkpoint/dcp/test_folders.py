"""Which folder is a checkpoint, what replaces it, and what goes with what."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

import dtruntime_torch as dt
from dtruntime_torch.errors import AlreadyExists, InvalidArgument, LoadFailed, StorageError
from dtruntime_torch.storage import LocalBackend
from dtruntime_torch.storage.sync import in_thread
from dtruntime_torch.testing.faulty_backend import FaultyBackend, killed, lost_answer, not_done
from tests.checkpoint.dcp.calls import State, equal, load, load_stock, refused, refused_to_read, save


def state_of(value: float, size: int = 1000) -> State:
    return {"w": torch.full((size,), float(value)), "step": int(value)}


def blank(size: int = 1000) -> State:
    return {"w": torch.zeros(size), "step": 0}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_holds_what_a_full_save_does(tmp_path: Path) -> None:
    save(state_of(1), tmp_path)
    shard = "shard-00000-of-00001"
    assert names(tmp_path) == ["manifest.json", f"{shard}.json", f"{shard}.safetensors"]


def test_what_is_there_is_not_replaced_unasked(tmp_path: Path) -> None:
    save(state_of(1), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with refused(AlreadyExists, "overwrite=True"):
        save(state_of(2), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_who_is_overtaken_between_the_door_and_the_end_fails(tmp_path: Path) -> None:
    class Overtaken(LocalBackend):
        async def create(self, path, data):
            await super().write(path, b"somebody else's")
            await super().create(path, data)

    with refused(AlreadyExists, "manifest.json"):
        save(state_of(1), dt.StorageWriter(Overtaken(tmp_path)))
    assert (tmp_path / "manifest.json").read_bytes() == b"somebody else's"


def test_who_is_overtaken_takes_nothing_of_the_other_away(tmp_path: Path) -> None:
    theirs = tmp_path / "shard-00001-of-00002.safetensors"

    class Overtaken(LocalBackend):
        async def write(self, path, data):
            await super().write(path, data)
            for name in (theirs.name, "manifest.json"):
                await super().write(name, b"somebody else's")

    with refused(AlreadyExists, "manifest.json"):
        save(state_of(1), dt.StorageWriter(Overtaken(tmp_path)))
    assert theirs.exists()


def test_what_a_rank_saved_alone_does_not_take_the_place_of_what_is_damaged(tmp_path: Path) -> None:
    save(state_of(1), tmp_path / "alone", use_collectives=False)
    assert equal(load(blank(), tmp_path / "alone"), state_of(1))
    save(state_of(2), tmp_path / "all")
    for path in (tmp_path / "alone").iterdir():
        path.rename(tmp_path / "all" / path.name)
    assert equal(load(blank(), tmp_path / "all"), state_of(2))
    (tmp_path / "all" / "manifest.json").write_bytes(b"{")
    with refused_to_read("manifest.json is no valid manifest"):
        load(blank(), tmp_path / "all")


@pytest.mark.parametrize("times", [1, 3])
def test_overwriting_leaves_the_new_one_alone(tmp_path: Path, times: int) -> None:
    for n in range(times + 1):
        save(state_of(n), dt.StorageWriter(tmp_path, overwrite=True))
    assert equal(load(blank(), tmp_path), state_of(times))
    assert torch.equal(load_stock({"w": torch.zeros(1000)}, tmp_path)["w"], state_of(times)["w"])
    prefix = f"save-{times + 1}.shard-00000-of-00001"
    assert names(tmp_path) == ["manifest.json", f"{prefix}.json", f"{prefix}.safetensors"]


def test_overwriting_where_nothing_is_makes_a_first_one(tmp_path: Path) -> None:
    save(state_of(1), dt.StorageWriter(tmp_path / "new", overwrite=True))
    assert "shard-00000-of-00001.safetensors" in names(tmp_path / "new")


class Killed(BaseException):
    """The end of a process: nothing of ours runs after it."""


def save_killed_at(folder: Path, state: State, nth: int, *, overwrite: bool) -> bool:
    """Saves until the n-th call of the storage; whether it came to that."""
    backend = FaultyBackend(LocalBackend(folder))
    backend.when("*", "*", killed(Killed()), nth=nth)
    try:
        save(state, dt.StorageWriter(backend, overwrite=overwrite))
    except CheckpointException as error:
        (cause,) = (cause for cause, _ in error.failures.values())
        if not isinstance(cause, Killed):
            raise
        return True
    return False


def test_a_kill_at_any_call_leaves_the_old_one_or_the_new(tmp_path: Path) -> None:
    ended, nth = [], 0
    while True:
        nth += 1
        folder = tmp_path / str(nth)
        save(state_of(1), folder)
        was_killed = save_killed_at(folder, state_of(2), nth, overwrite=True)
        found = load(blank(), folder)
        assert equal(found, state_of(1)) or equal(found, state_of(2))
        ended.append(found["step"])
        save(state_of(3), dt.StorageWriter(folder, overwrite=True))
        assert equal(load(blank(), folder), state_of(3))
        assert len(names(folder)) == 3
        if not was_killed:
            break
    assert set(ended) == {1, 2} and ended == sorted(ended)


def test_what_a_killed_save_left_is_no_checkpoint_and_is_written_over(tmp_path: Path) -> None:
    nth, was_killed = 1, True
    while was_killed:
        folder = tmp_path / str(nth)
        was_killed = save_killed_at(folder, {"old": torch.ones(3), **state_of(1)}, nth, overwrite=False)
        if was_killed:
            with refused_to_read("no checkpoint"):
                load(blank(), folder)
            save(state_of(2), folder)
            assert equal(load(blank(), folder), state_of(2))
        nth += 1


def test_files_of_more_ranks_that_died_do_not_confuse_stock_readers(tmp_path: Path) -> None:
    for rank in range(2):
        name = f"shard-0000{rank}-of-00002"
        save_file({"w": torch.zeros(500), "gone": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
        (tmp_path / f"{name}.json").write_text("{}")
    save(state_of(2), tmp_path)
    stock = HuggingFaceStorageReader(str(tmp_path)).read_metadata()
    assert list(stock.state_dict_metadata) == ["w"]
    assert torch.equal(load_stock({"w": torch.zeros(1000)}, tmp_path)["w"], state_of(2)["w"])


def test_what_is_not_ours_stays(tmp_path: Path) -> None:
    others = [
        "notes.txt", "shard-1-of-2.safetensors", "save-1.shard-00000-of-00001.json", "save-2.manifest.json",
        "shard-00001-model-00001-of-00001.safetensors", "manifest.json.bak", "sub/manifest.json",
        "sub/shard-00000-of-00002.json", "rank-3.manifest.json", "shard-00000-of-00001.delta",
    ]  # fmt: skip
    (tmp_path / "sub").mkdir()
    for name in others:
        (tmp_path / name).write_bytes(b"mine")
    for n in range(3):
        save(state_of(n), dt.StorageWriter(tmp_path, overwrite=True))
    assert all((tmp_path / name).read_bytes() == b"mine" for name in others)


def test_temporary_files_of_a_killed_save_go_and_those_below_stay(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    left, below = tmp_path / ".tmp-0123456789abcdef", tmp_path / "sub" / ".tmp-0123456789abcdef"
    left.write_bytes(b"half")
    below.write_bytes(b"another's")
    save(state_of(1), tmp_path)
    assert not left.exists() and below.exists()


def test_a_damaged_manifest_is_replaced_when_that_was_asked_for(tmp_path: Path) -> None:
    save(state_of(1), tmp_path)
    (tmp_path / "manifest.json").write_bytes(b"{")
    save(state_of(2), dt.StorageWriter(tmp_path, overwrite=True))
    assert equal(load(blank(), tmp_path), state_of(2))


def test_what_is_replaced_while_it_is_opened_is_opened_anew(tmp_path: Path) -> None:
    save(state_of(1), tmp_path)

    class Replaced(LocalBackend):
        async def read(self, path):
            data = await super().read(path)
            if path == "manifest.json" and not reads:
                reads.append(path)
                await in_thread(partial(save, state_of(2), dt.StorageWriter(tmp_path, overwrite=True)))
            return data

    reads: list[str] = []
    metadata = dt.StorageReader(Replaced(tmp_path)).read_metadata()
    assert metadata.storage_data.parts[0].attempt.endswith("-2")


def test_what_is_replaced_while_it_is_loaded_is_no_damage(tmp_path: Path) -> None:
    save(state_of(1), tmp_path)

    class Replacing(DefaultLoadPlanner):
        def create_local_plan(self):
            save(state_of(2), dt.StorageWriter(tmp_path, overwrite=True))
            return super().create_local_plan()

    with refused(LoadFailed, "was replaced while it was loaded"):
        load(blank(), tmp_path, planner=Replacing())


def test_a_managers_checkpoint_is_never_replaced(tmp_path: Path) -> None:
    with dt.CheckpointManager(tmp_path) as manager:
        folder = tmp_path / manager.save(state_of(1), 1).path
        with refused(InvalidArgument, "CheckpointManager"):
            save(state_of(2), dt.StorageWriter(folder, overwrite=True))
        assert manager.verify().ok


def test_old_files_that_cannot_be_deleted_fail_no_save(tmp_path: Path, caplog) -> None:
    save(state_of(1), tmp_path)
    backend = FaultyBackend(LocalBackend(tmp_path))
    backend.when("delete", "*", not_done(), nth=None)
    save(state_of(2), dt.StorageWriter(backend, overwrite=True))
    assert "stay in" in caplog.text
    assert equal(load(blank(), tmp_path), state_of(2))


def test_a_commit_whose_answer_is_lost_is_looked_up(tmp_path: Path) -> None:
    backend = FaultyBackend(LocalBackend(tmp_path))
    backend.when("create", "manifest.json", lost_answer())
    save(state_of(1), dt.StorageWriter(backend))
    assert equal(load(blank(), tmp_path), state_of(1))


def test_a_commit_that_did_not_happen_fails_the_save(tmp_path: Path) -> None:
    backend = FaultyBackend(LocalBackend(tmp_path))
    backend.when("create", "manifest.json", not_done())
    with refused(StorageError, "was not done"):
        save(state_of(1), dt.StorageWriter(backend))
    assert not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize("kind", ["data", "part"])
def test_a_write_that_fails_leaves_no_checkpoint(tmp_path: Path, kind: str) -> None:
    backend = FaultyBackend(LocalBackend(tmp_path))
    backend.when("write", "*.safetensors" if kind == "data" else "*.json", not_done())
    with refused(StorageError, "was not done"):
        save(state_of(1), dt.StorageWriter(backend))
    with refused_to_read("no checkpoint"):
        load(blank(), tmp_path)


def test_an_empty_folder_and_none_at_all_are_no_checkpoint(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with refused_to_read("there is no checkpoint in"):
            load(blank(), folder)
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize("options", [{"chunk_bytes": 0}, {"chunk_bytes": 1.5}, {"target": 7}, {"target": ""}])
def test_arguments_that_make_no_sense_are_refused(options) -> None:
    with pytest.raises(InvalidArgument):
        dt.StorageWriter(**options)


def test_without_any_folder_both_say_so() -> None:
    with refused(InvalidArgument, "no folder is named"):
        save(state_of(1), dt.StorageWriter())
    with refused_to_read("no folder is named"):
        load(blank(), dt.StorageReader())


@pytest.mark.parametrize("place", ["/mnt/x", "relative", Path("/mnt/y"), "s3://bucket/x", "file:///mnt/z"])
def test_which_checkpoint_ids_are_taken(place) -> None:
    expected = "s3" not in str(place)
    assert dt.StorageWriter.validate_checkpoint_id(place) == expected
    assert dt.StorageReader.validate_checkpoint_id(place) == expected
