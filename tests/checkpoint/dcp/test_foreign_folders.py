"""Folders that others wrote: by the stock writer of DCP, and models as Hugging Face has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

import dtruntime_torch as dt
from dtruntime_torch.checkpoint.dtypes import _DTYPES, safetensors_code
from dtruntime_torch.errors import CorruptCheckpoint, LoadFailed
from dtruntime_torch.storage import LocalBackend, MemoryBackend, run_sync
from dtruntime_torch.testing.faulty_backend import FaultyBackend, not_done
from tests.checkpoint.dcp.calls import State, equal, load, load_whole, raw, refused, refused_to_read, save


def make_state() -> State:
    torch.manual_seed(5)
    return {"w": torch.randn(30, 4), "v": torch.arange(7), "s": torch.tensor(2.0), "e": torch.empty(0, 2)}


def blank() -> State:
    return {name: torch.zeros_like(tensor) for name, tensor in make_state().items()}


def write_header(path: Path, table: dict[str, Any], data: bytes = b"") -> None:
    text = json.dumps(table).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def write_shards(folder: Path, whole: torch.Tensor, *rows: tuple[int, int]) -> None:
    for n, (first, last) in enumerate(rows):
        info = json.dumps({"w": {"saved_offsets": [first, 0]}})
        shard = {"w": whole[first:last].contiguous()}
        save_file(shard, folder / f"{n}.safetensors", {"DCP_SHARDING_INFO": info})


@pytest.mark.parametrize("distributed", [False, True])
def test_what_the_stock_writer_wrote_loads(tmp_path: Path, distributed: bool) -> None:
    save(make_state(), HuggingFaceStorageWriter(str(tmp_path), save_distributed=distributed))  # type: ignore[arg-type]
    assert equal(load(blank(), tmp_path), make_state())


def test_what_the_stock_writer_wrote_in_several_files_loads(tmp_path: Path) -> None:
    files = {"w": 1, "v": 2, "s": 3, "e": 3}
    save(make_state(), HuggingFaceStorageWriter(str(tmp_path), fqn_to_index_mapping=files))  # type: ignore[arg-type]
    assert equal(load(blank(), tmp_path), make_state())
    assert equal(load_whole(tmp_path)["w"], make_state()["w"])


def test_a_model_in_one_file_loads(tmp_path: Path) -> None:
    save_file(make_state(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert equal(load(blank(), tmp_path), make_state())


def test_only_the_files_that_an_index_names_are_read(tmp_path: Path) -> None:
    state = make_state()
    save_file({"w": state["w"]}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({name: state[name] for name in "vse"}, tmp_path / "model-00002-of-00002.safetensors")
    save_file({"w": torch.zeros(1), "other": torch.zeros(1)}, tmp_path / "consolidated.safetensors")
    weights = {name: f"model-0000{1 if name == 'w' else 2}-of-00002.safetensors" for name in state}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    assert equal(load(blank(), tmp_path), state)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with refused_to_read("model-00002-of-00002.safetensors.*missing"):
        load(blank(), tmp_path)


def test_shards_of_one_tensor_in_several_files_are_put_together(tmp_path: Path) -> None:
    whole = torch.arange(24).reshape(6, 4)
    write_shards(tmp_path, whole, (0, 1), (1, 4), (4, 6))
    assert torch.equal(load({"w": torch.zeros_like(whole)}, tmp_path)["w"], whole)


def test_a_tensor_of_which_a_shard_is_missing_is_refused(tmp_path: Path) -> None:
    whole = torch.arange(24).reshape(6, 4)
    write_shards(tmp_path, whole, (0, 1), (4, 6))
    with refused_to_read(r"w: of its \[6, 4\] elements 12 are in no file"):
        load({"w": torch.zeros_like(whole)}, tmp_path)


def test_a_shard_that_is_there_twice_fills_no_gap(tmp_path: Path) -> None:
    whole = torch.arange(24).reshape(6, 4)
    write_shards(tmp_path, whole, (0, 3), (4, 6), (0, 3))
    with refused_to_read("w: of its .* 4 are in no file"):
        load({"w": torch.zeros_like(whole)}, tmp_path)


@pytest.mark.parametrize("dtype", sorted(name for name in _DTYPES if safetensors_code(name)))
def test_every_dtype_of_safetensors_loads(tmp_path: Path, dtype: str) -> None:
    kind = getattr(torch, dtype)
    bits = torch.arange(6 * kind.itemsize).to(torch.uint8) & (1 if dtype == "bool" else 255)
    save_file({"x": bits.view(kind)}, tmp_path / "model.safetensors")
    target = torch.zeros_like(bits).view(kind)
    assert raw(load({"x": target}, tmp_path)["x"]) == raw(bits.view(kind))


def test_a_storage_in_memory_serves_too(tmp_path: Path) -> None:
    save_file(make_state(), tmp_path / "model.safetensors")
    backend = MemoryBackend()
    run_sync(backend.write("hub/m/model.safetensors", (tmp_path / "model.safetensors").read_bytes()))
    assert equal(load(blank(), dt.StorageReader(backend), checkpoint_id="hub/m"), make_state())


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "table",
    [
        [], {"w": 3}, {"w": {**F32, "shape": [3]}}, {"w": {**F32, "shape": [-2]}}, {"w": {**F32, "shape": "2"}},
        {"w": {**F32, "data_offsets": [0, 8, 9]}}, {"w": {**F32, "data_offsets": [4, 12]}},
        {"w": {**F32, "data_offsets": [8, 0]}}, {"w": {**F32, "shape": [2**60, 2**60], "data_offsets": [0, 2**53]}},
        {"w": {**F32, "shape": [1] * 65}}, {"w": {"dtype": "F32"}}, {"w": {**F32, "shape": [True, 2]}},
        {"__metadata__": {"DCP_SHARDING_INFO": "["}, "w": F32},
        {"__metadata__": {"DCP_SHARDING_INFO": '{"w": {"saved_offsets": [0, 0]}}'}, "w": F32},
        {"__metadata__": {"DCP_SHARDING_INFO": '{"w": {"saved_offsets": [-1]}}'}, "w": F32},
        {"__metadata__": 3, "w": F32},
    ],
    ids=str,
)  # fmt: skip
def test_a_header_that_does_not_fit_its_file_is_refused(tmp_path: Path, table) -> None:
    write_header(tmp_path / "model.safetensors", table, bytes(8))
    with refused_to_read("model.safetensors"):
        load({"w": torch.zeros(2)}, tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        (2**63).to_bytes(8, "little"),
        (100).to_bytes(8, "little") + b"{}",
        bytes(8),
        b"\x02" + bytes(7) + b"}{",
    ],
    ids=repr,
)
def test_a_file_that_has_no_header_is_refused_before_memory_is_taken(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with refused_to_read("model.safetensors"):
        load({"w": torch.zeros(2)}, tmp_path)


def test_a_name_that_occurs_twice_in_a_header_is_refused(tmp_path: Path) -> None:
    text = f'{{"w": {json.dumps(F32)}, "w": {json.dumps(F32)}}}'.encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with refused_to_read("occurs twice"):
        load({"w": torch.zeros(2)}, tmp_path)


def test_an_unknown_dtype_is_named(tmp_path: Path) -> None:
    write_header(
        tmp_path / "model.safetensors", {"w": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, b"0"
    )
    with refused_to_read("w: the dtype 'F4'"):
        load({"w": torch.zeros(2)}, tmp_path)


@pytest.mark.parametrize(
    "index", ["[]", "{", '{"weight_map": 3}', '{"weight_map": {"w": 3}}', '{"weight_map": {"w": "../x"}}']
)
def test_an_index_that_names_no_files_of_the_folder_is_refused(tmp_path: Path, index: str) -> None:
    save_file(make_state(), tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with refused_to_read("index.json|missing"):
        load(blank(), tmp_path)


def test_a_file_that_vanishes_is_damage(tmp_path: Path) -> None:
    save_file(make_state(), tmp_path / "model.safetensors")
    reader = dt.StorageReader(tmp_path)

    class Vanishing(LocalBackend):
        async def read_chunks(self, *arguments):
            (tmp_path / "model.safetensors").unlink(missing_ok=True)
            return await super().read_chunks(*arguments)

        async def read_range(self, path, offset, length, *, into=None):
            if into is not None:
                (tmp_path / "model.safetensors").unlink(missing_ok=True)
            return await super().read_range(path, offset, length, into=into)

    reader = dt.StorageReader(Vanishing(tmp_path))
    with refused(CorruptCheckpoint, "model.safetensors.*missing"):
        load(blank(), reader)


def test_a_storage_that_fails_is_no_damage(tmp_path: Path) -> None:
    save_file(make_state(), tmp_path / "model.safetensors")
    backend = FaultyBackend(LocalBackend(tmp_path))
    backend.when("read_range", "*", not_done(), nth=3)  # after length and header
    with refused(LoadFailed, "was not done"):
        load(blank(), dt.StorageReader(backend))
