"""What DCP saves through our writer comes back through our reader, and through stock readers."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

import dtruntime_torch as dt
from dtruntime_torch.checkpoint.dtypes import _DTYPES, safetensors_code
from dtruntime_torch.storage import LocalBackend, MemoryBackend, run_sync
from tests.checkpoint.dcp.calls import State, equal, load, load_stock, load_whole, raw, save

CHUNK = 64


def make_state() -> State:
    torch.manual_seed(1)
    return {
        "model": {"weight": torch.randn(30, 7), "bias": torch.randn(7, dtype=torch.float64)},
        "scalar": torch.tensor(3),
        "empty": torch.empty(0, 4),
        "strided": torch.randn(8, 6).t()[1:],
        "half": torch.randn(5).bfloat16(),
        "flags": torch.tensor([True, False]),
        "list": [torch.arange(4), {"inner": torch.ones(2)}, 7],
        "step": 12,
        "rate": 1e-3,
        "name": "run",
        "pair": (1, "two"),
        "none": None,
        "numbers": [1, 2, 3],
    }


def blank(state: Any) -> Any:
    """The same structure with nothing in it."""
    if isinstance(state, torch.Tensor):
        return torch.zeros_like(state)
    if isinstance(state, dict):
        return {key: blank(value) for key, value in state.items()}
    if isinstance(state, list) and any(isinstance(one, (torch.Tensor, dict)) for one in state):
        return [blank(one) for one in state]
    return "to be filled"


def bits_of(dtype: str, count: int) -> torch.Tensor:
    """Bytes that are all different things, NaNs among them."""
    kind = getattr(torch, dtype)
    raw = torch.arange(count * kind.itemsize).mul(37).to(torch.uint8)
    return (raw & 1 if dtype == "bool" else raw).view(kind)


def test_a_nested_state_comes_back(tmp_path: Path) -> None:
    state = make_state()
    save(state, tmp_path / "one")
    assert equal(load(blank(state), tmp_path / "one"), state)


def test_all_of_it_comes_back_without_a_state_to_fill(tmp_path: Path) -> None:
    state = make_state()
    save(state, tmp_path / "one")
    assert equal(load_whole(tmp_path / "one"), state)


def test_what_dcp_is_told_is_what_its_own_format_tells(tmp_path: Path) -> None:
    state = make_state()
    save(state, tmp_path / "ours")
    save(state, FileSystemWriter(tmp_path / "stock"))
    ours = dt.StorageReader(tmp_path / "ours").read_metadata()
    stock = FileSystemReader(tmp_path / "stock").read_metadata()
    assert ours.planner_data == stock.planner_data
    assert list(ours.state_dict_metadata) == list(stock.state_dict_metadata)
    for fqn, entry in stock.state_dict_metadata.items():
        found = ours.state_dict_metadata[fqn]
        assert type(found) is type(entry)
        if isinstance(entry, TensorStorageMetadata) and isinstance(found, TensorStorageMetadata):
            assert (found.size, found.chunks) == (entry.size, entry.chunks)
            assert found.properties.dtype == entry.properties.dtype


@pytest.mark.parametrize("dtype", sorted(_DTYPES))
def test_every_dtype_comes_back_bit_for_bit(tmp_path: Path, dtype: str) -> None:
    tensor = bits_of(dtype, 33)
    save({"x": tensor}, tmp_path / "one")
    target = torch.zeros(33 * tensor.itemsize, dtype=torch.uint8).view(tensor.dtype)
    load({"x": target}, tmp_path / "one")
    assert raw(target) == raw(tensor)


@settings(max_examples=30)
@given(
    shapes=st.lists(st.lists(st.integers(0, 9), max_size=3), min_size=1, max_size=6),
    chunk=st.integers(1, 100),
    in_memory=st.booleans(),
)
def test_any_shapes_in_any_chunks_come_back(tmp_path_factory, shapes, chunk, in_memory) -> None:
    folder: Any = MemoryBackend() if in_memory else tmp_path_factory.mktemp("any") / "one"
    state = {f"t{n}": torch.randn(shape) for n, shape in enumerate(shapes)}
    save(state, dt.StorageWriter(folder, chunk_bytes=chunk))
    assert equal(load(blank(state), dt.StorageReader(folder)), state)


def test_stock_safetensors_opens_the_files(tmp_path: Path) -> None:
    state = make_state()
    save(state, tmp_path / "one")
    with safe_open(tmp_path / "one" / "shard-00000-of-00001.safetensors", framework="pt") as file:
        assert equal(file.get_tensor("model.weight"), state["model"]["weight"])
        assert equal(file.get_tensor("strided"), state["strided"].contiguous())


def test_the_stock_reader_loads_the_folder(tmp_path: Path) -> None:
    state = {f: bits_of(f, 8).reshape(4, 2) for f in sorted(_DTYPES) if safetensors_code(f)}
    save(state, tmp_path / "one")
    found = load_stock(blank(state), tmp_path / "one")
    assert all(raw(found[name]) == raw(state[name]) for name in state)


def test_a_target_of_another_dtype_or_stride_is_filled(tmp_path: Path) -> None:
    state = {"a": torch.arange(24.0).reshape(4, 6), "scalar": torch.tensor(3)}
    save(state, dt.StorageWriter(tmp_path / "one", chunk_bytes=16))
    target = {"a": torch.zeros(6, 4, dtype=torch.float64).t(), "scalar": torch.tensor(0.0)}
    load(target, tmp_path / "one")
    assert torch.equal(target["a"], state["a"].double())
    assert target["scalar"].item() == 3.0


def test_a_parameter_is_filled_where_it_is(tmp_path: Path) -> None:
    layer = torch.nn.Linear(3, 2)
    save({"model": layer}, tmp_path / "one")
    fresh = torch.nn.Linear(3, 2)
    at = fresh.weight.data_ptr()
    load({"model": fresh}, tmp_path / "one")
    assert torch.equal(fresh.weight, layer.weight) and fresh.weight.data_ptr() == at


@pytest.mark.parametrize(
    "value",
    [
        np.float32(2.5), np.arange(6).reshape(2, 3), np.datetime64("2020-01-01"), np.str_("x"), np.bool_(True),
        torch.Size([2, 3]), torch.bfloat16, torch.device("cpu"), frozenset({1}), {1, 2}, 1 + 2j, b"bytes",
        OrderedDict(), 2**90, float("inf"), [None, [1, (2.0,)]],
    ],
    ids=repr,
)  # fmt: skip
def test_values_come_back_in_their_types(tmp_path: Path, value: object) -> None:
    state = {"x": (value,)}
    save(state, tmp_path / "one")
    (found,) = load({"x": None}, tmp_path / "one")["x"]
    assert type(found) is type(value)
    assert np.array_equal(found, value) if isinstance(value, np.ndarray) else found == value


def range_of(value: Any) -> range:
    return range(*value)


def test_a_type_with_a_codec_comes_back(tmp_path: Path, own_codecs: None) -> None:
    dt.register_codec(range, "builtins.range", lambda r: (r.start, r.stop, r.step), range_of)
    save({"x": range(3)}, tmp_path / "one")
    assert load({"x": None}, tmp_path / "one")["x"] == range(3)


def test_a_folder_in_a_storage_is_named_by_the_checkpoint_id() -> None:
    backend, state = MemoryBackend(), {"w": torch.arange(5)}
    for step in (1, 2):
        save({"w": state["w"] * step}, dt.StorageWriter(backend), checkpoint_id=f"run/{step}")
    found = [load(blank(state), dt.StorageReader(backend), checkpoint_id=f"run/{n}")["w"] for n in (1, 2)]
    assert [one.tolist() for one in found] == [[0, 1, 2, 3, 4], [0, 2, 4, 6, 8]]
    assert {entry.path.rpartition("/")[0] for entry in run_sync(backend.list(""))} == {"run/1", "run/2"}


def test_the_checkpoint_id_takes_the_place_of_a_path(tmp_path: Path) -> None:
    writer, state = dt.StorageWriter(), {"w": torch.arange(5)}
    for step in (1, 2):
        save(state, writer, checkpoint_id=tmp_path / str(step))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


def test_writer_and_reader_can_be_sent_to_another_process(tmp_path: Path) -> None:
    writer = pickle.loads(pickle.dumps(dt.StorageWriter(tmp_path / "one")))  # noqa: S301  # made here
    state = make_state()
    save(state, writer)
    reader = pickle.loads(pickle.dumps(dt.StorageReader(LocalBackend(tmp_path / "one"))))  # noqa: S301
    assert equal(load(blank(state), reader), state)


def test_contiguous_host_tensors_are_written_from_where_they_lie() -> None:
    seen: list[int] = []

    class Watching(MemoryBackend):
        async def write(self, path, data):
            if path.endswith(".safetensors"):
                seen.extend(np.frombuffer(view, np.uint8).ctypes.data for view in data[1:])
            await super().write(path, data)

    state = {"a": torch.randn(64), "b": torch.randn(64).double(), "c": torch.randn(64)[32:]}
    save(state, dt.StorageWriter(Watching()))
    assert seen == [state[name].data_ptr() for name in ("b", "a", "c")]


def test_only_the_chunks_that_are_wanted_are_read(tmp_path: Path) -> None:
    asked: list[int] = []

    class Counting(LocalBackend):
        async def read_chunks(self, path, offsets, into, chunk_bytes):
            asked.extend(view.nbytes for view in into)
            return await super().read_chunks(path, offsets, into, chunk_bytes)

    save({"big": torch.arange(1024), "small": torch.arange(4)}, dt.StorageWriter(tmp_path, chunk_bytes=CHUNK))
    load({"small": torch.zeros(4, dtype=torch.int64)}, dt.StorageReader(Counting(tmp_path)))
    assert sum(asked) == 4 * 8
