"""Damaged folders: no wrong byte is loaded, and what is wrong is named as it is called in the folder."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

import dtruntime_torch as dt
from dtruntime_torch.errors import CorruptCheckpoint, NewerFormat, StorageError
from dtruntime_torch.storage import LocalBackend, MemoryBackend, run_sync
from dtruntime_torch.testing.faulty_backend import FaultyBackend, not_done, unreadable
from tests.checkpoint.dcp.calls import State, load, refused, refused_to_read, save

CHUNK = 64
PREFIX = "save-2."
SHARD = "save-2.shard-00000-of-00001"


def make_state() -> State:
    return {"w": torch.arange(40), "b": torch.arange(6).to(torch.int8), "step": 3}


def blank() -> State:
    return {"w": torch.zeros(40, dtype=torch.int64), "b": torch.zeros(6, dtype=torch.int8), "step": 0}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One that was overwritten once, so that its files have other names than the records know."""
    for _ in range(2):
        save(make_state(), dt.StorageWriter(tmp_path / "one", chunk_bytes=CHUNK, overwrite=True))
    return tmp_path / "one"


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["manifest.json", f"{SHARD}.json"])
def test_a_flipped_bit_in_any_byte_of_a_manifest_is_refused(folder: Path, name: str) -> None:
    whole = (folder / name).read_bytes()
    for position in range(len(whole)):
        flip(folder / name, position)
        with pytest.raises((CorruptCheckpoint, NewerFormat)):
            dt.StorageReader(folder).read_metadata()
        (folder / name).write_bytes(whole)
    load(blank(), folder)


def test_a_flipped_bit_in_any_byte_of_the_data_is_refused(folder: Path) -> None:
    path = folder / f"{SHARD}.safetensors"
    for position in range(path.stat().st_size):
        flip(path, position)
        with refused(CorruptCheckpoint):
            load(blank(), folder)
        flip(path, position)
    load(blank(), folder)


def test_a_damaged_chunk_is_named_with_its_digests(folder: Path) -> None:
    path = folder / f"{SHARD}.safetensors"
    flip(path, -50)  # in the last chunk of w, of which 5 chunks of 64 bytes are followed by 6 bytes of b
    with refused(CorruptCheckpoint, "is damaged") as found:
        load(blank(), folder)
    (damage,) = found[0].damage  # type: ignore[attr-defined]
    size = path.stat().st_size
    assert (damage.file, damage.tensor) == (f"{SHARD}.safetensors", "w")
    assert (damage.start, damage.stop) == (size - 6 - CHUNK, size - 6)
    assert re.fullmatch("[0-9a-f]{32}", damage.expected) and re.fullmatch("[0-9a-f]{32}", damage.actual)
    assert str(folder) in str(found[0]) and "step-" not in str(found[0])


def test_a_damaged_header_is_named(folder: Path) -> None:
    flip(folder / f"{SHARD}.safetensors", 10)
    with refused(CorruptCheckpoint) as found:
        load(blank(), folder)
    damage = found[0].damage[0]  # type: ignore[attr-defined]
    assert (damage.file, damage.tensor, damage.start) == (f"{SHARD}.safetensors", None, 0)


def test_a_planner_never_commits_a_tensor_that_is_damaged(folder: Path) -> None:
    committed: list[str] = []

    class Watching(DefaultLoadPlanner):
        def commit_tensor(self, read_item, tensor):
            committed.append(read_item.dest_index.fqn)

    flip(folder / f"{SHARD}.safetensors", -50)
    with refused(CorruptCheckpoint):
        load({"w": torch.zeros(40, dtype=torch.int64)}, folder, planner=Watching())
    assert committed == []


@pytest.mark.parametrize("name", [f"{SHARD}.json", f"{SHARD}.safetensors"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    match = f"{name}.*missing"
    with refused(CorruptCheckpoint, match) if name.endswith(".safetensors") else refused_to_read(match):
        load(blank(), folder)


@pytest.mark.parametrize("change", [b"", b"more"])
def test_a_data_file_of_another_length_is_refused_before_memory_is_taken(folder: Path, change: bytes) -> None:
    path = folder / f"{SHARD}.safetensors"
    path.write_bytes(path.read_bytes() + change if change else path.read_bytes()[:-1])
    with refused(CorruptCheckpoint, f"{SHARD}.safetensors"):
        load(blank(), folder)


def test_a_part_of_another_save_is_refused(folder: Path, tmp_path: Path) -> None:
    save({**make_state(), "step": 4}, tmp_path / "other")
    shutil.copy(tmp_path / "other" / "shard-00000-of-00001.json", folder / f"{SHARD}.json")
    with refused_to_read(f"{SHARD}.json"):
        load(blank(), folder)


def test_a_manifest_without_its_seal_is_refused(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_bytes(re.sub(rb'"seal":"[0-9a-f]*",', b"", path.read_bytes()))
    with refused_to_read("manifest.json.*seal"):
        load(blank(), folder)


def test_a_bad_sector_is_damage(folder: Path) -> None:
    backend = FaultyBackend(LocalBackend(folder))
    backend.when(
        "*", "*.safetensors", unreadable(start=(folder / f"{SHARD}.safetensors").stat().st_size - 3), None
    )
    with refused(CorruptCheckpoint, "could not read it"):
        load(blank(), dt.StorageReader(backend))


def test_a_storage_that_fails_is_no_damage(folder: Path) -> None:
    backend = FaultyBackend(LocalBackend(folder))
    backend.when("read_chunks", "*", not_done(), nth=None)
    with refused(StorageError, "was not done"):
        load(blank(), dt.StorageReader(backend))


def test_damage_in_a_storage_that_reads_no_chunks_is_found_too() -> None:
    backend = MemoryBackend()
    save(make_state(), dt.StorageWriter(backend, chunk_bytes=CHUNK))
    path = "shard-00000-of-00001.safetensors"
    data = bytearray(run_sync(backend.read(path)))
    data[-1] ^= 1
    run_sync(backend.write(path, data))
    with refused(CorruptCheckpoint, "tensor b"):
        load(blank(), dt.StorageReader(backend))


def test_damage_in_what_nobody_wants_stops_nobody(folder: Path) -> None:
    flip(folder / f"{SHARD}.safetensors", -1)
    assert load({"w": blank()["w"]}, folder)["w"].tolist() == list(range(40))
