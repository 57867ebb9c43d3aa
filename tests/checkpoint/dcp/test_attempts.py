"""What a CheckpointManager saved, loaded through DCP."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

import dtruntime_torch as dt
from dtruntime_torch.errors import CorruptCheckpoint
from dtruntime_torch.storage import LocalBackend, MemoryBackend
from tests.checkpoint.dcp.calls import State, equal, load, load_whole, refused, refused_to_read

CHUNK = 4096


def state_of(step: int) -> State:
    weight = torch.arange(8000.0)
    weight[:10] = step
    return {"model": {"w": weight, "l": [torch.ones(2), 3]}, "step": step, "blob": b"bytes", "pair": (1, "a")}


def blank() -> State:
    return {"model": {"w": torch.zeros(8000), "l": [torch.zeros(2), 0]}, "step": 0, "blob": 0, "pair": 0}


def saved(root: Any, steps: int, *, delta: bool) -> list[dt.CheckpointInfo]:
    with dt.CheckpointManager(root, delta=delta, chunk_bytes=CHUNK, keep_last_n=10) as manager:
        return [manager.save(state_of(step), step) for step in range(1, steps + 1)]


def test_a_full_save_loads(tmp_path: Path) -> None:
    (info,) = saved(tmp_path, 1, delta=False)
    assert equal(load(blank(), tmp_path / info.path), state_of(1))


def test_a_full_save_that_was_copied_away_loads(tmp_path: Path) -> None:
    (info,) = saved(tmp_path / "root", 1, delta=False)
    shutil.copytree(tmp_path / "root" / info.path, tmp_path / "away")
    assert equal(load(blank(), tmp_path / "away"), state_of(1))


def test_a_delta_loads_where_it_was_saved(tmp_path: Path) -> None:
    infos = saved(tmp_path, 3, delta=True)
    assert [info.full for info in infos] == [True, False, False]
    for step, info in enumerate(infos, 1):
        assert equal(load(blank(), tmp_path / info.path), state_of(step))


def test_a_delta_in_a_storage_loads_by_its_path() -> None:
    backend = MemoryBackend()
    info = saved(backend, 2, delta=True)[-1]
    assert equal(load(blank(), dt.StorageReader(backend), checkpoint_id=info.path), state_of(2))


def test_a_delta_that_was_copied_away_is_refused(tmp_path: Path) -> None:
    info = saved(tmp_path / "root", 2, delta=True)[-1]
    shutil.copytree(tmp_path / "root" / info.path, tmp_path / "away")
    with refused_to_read("is a delta.*name it where it was saved"):
        load(blank(), tmp_path / "away")


def test_all_of_it_comes_without_a_state_to_fill(tmp_path: Path) -> None:
    (info,) = saved(tmp_path, 1, delta=False)
    assert equal(load_whole(tmp_path / info.path), state_of(1))


def test_what_is_not_committed_is_no_checkpoint(tmp_path: Path) -> None:
    infos = saved(tmp_path, 2, delta=False)
    (commit,) = (tmp_path / "model" / "commits").glob("*-00000001.json")
    commit.unlink()
    with refused_to_read("not committed"):
        load(blank(), tmp_path / infos[0].path)


def test_a_manifest_that_is_not_the_committed_one_is_damage(tmp_path: Path) -> None:
    (info,) = saved(tmp_path, 1, delta=False)
    path = tmp_path / info.path / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"nbytes":', b'"nbytes":1'))
    with refused_to_read("manifest.json.*SHA-256"):
        load(blank(), tmp_path / info.path)


def test_damage_in_the_file_of_an_earlier_attempt_is_named(tmp_path: Path) -> None:
    first, second = saved(tmp_path, 2, delta=True)
    data = tmp_path / first.path / "shard-00000-of-00001.safetensors"
    content = bytearray(data.read_bytes())
    content[-2000] ^= 1
    data.write_bytes(content)
    with refused(CorruptCheckpoint, "model.w") as found:
        load(blank(), tmp_path / second.path)
    assert {damage.file for damage in found[0].damage} == {f"{first.path}/{data.name}"}  # type: ignore[attr-defined]


def test_what_differs_by_rank_is_that_of_the_rank(tmp_path: Path) -> None:
    with dt.CheckpointManager(tmp_path) as manager:
        info = manager.save({"rng": dt.PerRank(torch.arange(4)), "w": torch.ones(2)}, 1)
    target = load({"rng": torch.zeros(4, dtype=torch.int64), "w": torch.zeros(2)}, tmp_path / info.path)
    assert target["rng"].tolist() == [0, 1, 2, 3]


def test_an_optimizers_state_loads_by_the_names_of_dcp(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    with dt.CheckpointManager(LocalBackend(tmp_path)) as manager:
        info = manager.save({"model": model, "optimizer": optimizer}, 1)
    target = {"optimizer": {"state": {"weight": {"exp_avg": torch.zeros(2, 3)}}}}
    found = load(target, tmp_path / info.path)["optimizer"]["state"]["weight"]["exp_avg"]
    assert torch.equal(found, optimizer.state[model.weight]["exp_avg"])
