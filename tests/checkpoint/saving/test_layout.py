"""The data file, opened by those who have never heard of us: stock safetensors and stock DCP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.state_dict_loader import load

from dtruntime_torch.checkpoint.dtypes import _DTYPES, itemsize, safetensors_code
from dtruntime_torch.checkpoint.saving import layout as layout_module
from dtruntime_torch.checkpoint.saving.layout import ALIGNMENT, PAGE, Layout, make_layout
from dtruntime_torch.checkpoint.specs import SavePlan, TensorSpec, WriteItem
from dtruntime_torch.errors import InvalidArgument
from tests.checkpoint.plan_builders import dtypes, shapes, tensor

ALL_DTYPES = sorted(_DTYPES)


def layout_of(*specs: TensorSpec) -> Layout:
    return make_layout(SavePlan(0, 1, tuple(WriteItem(spec, spec.fqn) for spec in specs), (), ()))


def some(dtype: str, *shape: int) -> torch.Tensor:
    """A tensor whose bytes are all different things, NaNs among them."""
    nbytes = tensor("x", *shape, dtype=dtype).nbytes
    raw = torch.arange(nbytes, dtype=torch.int64).mul(37).to(torch.uint8)
    if dtype == "bool":
        raw &= 1
    return raw.view(getattr(torch, dtype)).view(shape) if shape else raw.view(getattr(torch, dtype))[0]


def raw(value: torch.Tensor) -> bytes:
    return value.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


def spec_of(name: str, value: torch.Tensor, whole: torch.Tensor | None = None, first: int = 0) -> TensorSpec:
    whole = value if whole is None else whole
    dtype = str(value.dtype).removeprefix("torch.")
    offsets = (first,) + (0,) * (value.dim() - 1) if value.dim() else ()
    return tensor(name, *whole.shape, dtype=dtype, offsets=offsets, shape=tuple(value.shape))


def save(path: Path, values: Mapping[str, torch.Tensor], specs: Sequence[TensorSpec] | None = None) -> None:
    layout = layout_of(*(specs or [spec_of(name, value) for name, value in values.items()]))
    data = b"".join(raw(values[slot.item.name]) for slot in layout.slots)
    path.write_bytes(layout.header + data)
    assert path.stat().st_size == layout.length


def load_by_dcp(folder: Path, state: dict[str, torch.Tensor]) -> None:
    reader = HuggingFaceStorageReader(str(folder))
    with pytest.warns(UserWarning, match="single process"):
        load(state, storage_reader=reader, no_dist=True)


def as_stored(value: torch.Tensor) -> torch.Tensor:
    """What stock readers see: bytes, in a last dimension, where safetensors lacks the dtype."""
    dtype = str(value.dtype).removeprefix("torch.")
    if safetensors_code(dtype):
        return value
    return value.reshape(-1).contiguous().view(torch.uint8).reshape(*value.shape, itemsize(dtype))


@pytest.mark.parametrize("data_at", [0, 64, PAGE - 64])
@pytest.mark.parametrize("count", [0, 1, 40, 41, 42, 500])
def test_the_data_begins_where_in_a_page_it_is_wanted(data_at: int, count: int) -> None:
    items = tuple(WriteItem(tensor(f"t{n}", 3), f"t{n}") for n in range(count))
    layout = make_layout(SavePlan(0, 1, items, (), ()), data_at)
    assert len(layout.header) % PAGE == data_at
    assert len(layout.header) - PAGE < len(layout_of(*(item.spec for item in items)).header)


@given(st.lists(st.tuples(dtypes, shapes), max_size=12))
def test_slots_fill_the_file_in_falling_element_size_each_aligned(leaves) -> None:
    specs = [tensor(f"t{n}", *shape, dtype=dtype) for n, (dtype, shape) in enumerate(leaves)]
    layout = layout_of(*specs)
    end = len(layout.header)
    assert end % ALIGNMENT == 0
    for slot in layout.slots:
        assert slot.offset == end
        assert slot.offset % itemsize(slot.item.spec.dtype) == 0
        assert slot.nbytes == slot.item.spec.nbytes
        end += slot.nbytes
    assert layout.length == end
    order = [(-itemsize(slot.item.spec.dtype), int(slot.item.name[1:])) for slot in layout.slots]
    assert order == sorted(order)
    assert len(order) == len(specs)


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_stock_safetensors_reads_every_dtype(tmp_path: Path, dtype: str) -> None:
    values = {
        "matrix": some(dtype, 3, 5),
        "scalar": some(dtype),
        "empty": some(dtype, 0, 4),
        "other": some("int64", 3),
    }
    save(tmp_path / "shard.safetensors", values)
    with safe_open(tmp_path / "shard.safetensors", "pt") as file:
        assert sorted(file.keys()) == sorted(values)
        assert file.metadata()["format"] == "pt"
        for name, value in values.items():
            found, expected = file.get_tensor(name), as_stored(value)
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
            assert raw(found) == raw(expected)


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_stock_dcp_puts_two_shards_together_and_cuts_them_anew(tmp_path: Path, dtype: str) -> None:
    whole, scalar, empty = some(dtype, 7, 3), some(dtype), some(dtype, 0, 4)
    save(
        tmp_path / "shard-00000-of-00002.safetensors",
        {"w": whole[:4], "scalar": scalar},
        [spec_of("w", whole[:4], whole), spec_of("scalar", scalar)],
    )
    save(
        tmp_path / "shard-00001-of-00002.safetensors",
        {"w": whole[4:], "empty": empty},
        [spec_of("w", whole[4:], whole, first=4), spec_of("empty", empty)],
    )
    expected = {"w": as_stored(whole), "scalar": as_stored(scalar), "empty": as_stored(empty)}
    loaded = {name: torch.zeros_like(value) for name, value in expected.items()}
    load_by_dcp(tmp_path, loaded)
    assert {name: raw(value) for name, value in loaded.items()} == {n: raw(v) for n, v in expected.items()}

    thirds = tmp_path / "again"
    thirds.mkdir()
    for rank, (first, last) in enumerate([(0, 2), (2, 5), (5, 7)]):
        cut = whole[first:last]
        save(thirds / f"shard-{rank}.safetensors", {"w": cut}, [spec_of("w", cut, whole, first)])
    again = {"w": torch.zeros_like(expected["w"])}
    load_by_dcp(thirds, again)
    assert raw(again["w"]) == raw(expected["w"])


class Rows(torch.Tensor):
    """Some rows of a larger matrix, as DCP's protocol for shards of one's own wants them."""

    first: int
    whole: torch.Size

    @staticmethod
    def of(whole: torch.Tensor, first: int, last: int) -> Rows:
        rows = torch.zeros_like(whole[first:last]).as_subclass(Rows)
        rows.first, rows.whole = first, whole.shape
        return rows

    def size(self, dim: int | None = None):
        return self.whole if dim is None else self.whole[dim]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size([self.first, 0]), self.shape)]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        assert index.offset == torch.Size([self.first, 0])
        return self.as_subclass(torch.Tensor)


def test_stock_dcp_fills_the_shards_of_another_split(tmp_path: Path) -> None:
    whole = torch.arange(1.0, 71.0).view(10, 7)
    for rank, (first, last) in enumerate([(0, 5), (5, 10)]):
        cut = whole[first:last]
        save(tmp_path / f"shard-{rank}.safetensors", {"w": cut}, [spec_of("w", cut, whole, first)])
    for first, last in [(0, 4), (4, 8), (8, 10)]:
        wanted = Rows.of(whole, first, last)
        load_by_dcp(tmp_path, {"w": wanted})
        assert torch.equal(wanted.as_subclass(torch.Tensor), whole[first:last])


def test_a_rank_that_writes_no_tensor_leaves_a_file_that_opens(tmp_path: Path) -> None:
    save(tmp_path / "shard-0.safetensors", {})
    save(tmp_path / "shard-1.safetensors", {"w": torch.ones(2)})
    with safe_open(tmp_path / "shard-0.safetensors", "pt") as file:
        assert list(file.keys()) == []
    loaded = {"w": torch.zeros(2)}
    load_by_dcp(tmp_path, loaded)
    assert torch.equal(loaded["w"], torch.ones(2))


def test_names_of_any_language_are_kept(tmp_path: Path) -> None:
    names = ["", 'quote"back\\slash', "dé.ключ.鍵", "line\nbreak", "\x00"]
    save(tmp_path / "shard.safetensors", {name: torch.tensor([n]) for n, name in enumerate(names)})
    with safe_open(tmp_path / "shard.safetensors", "pt") as file:
        assert [int(file.get_tensor(name)) for name in names] == [0, 1, 2, 3, 4]
    loaded = {name: torch.zeros(1, dtype=torch.int64) for name in names}
    load_by_dcp(tmp_path, loaded)
    assert [int(value) for value in loaded.values()] == [0, 1, 2, 3, 4]


def test_ten_thousand_small_tensors_are_opened_by_safetensors(tmp_path: Path) -> None:
    layout = layout_of(*[tensor(f"model.layers.{n}.weight", 4, 4) for n in range(10_000)])
    (tmp_path / "shard.safetensors").write_bytes(layout.header + bytes(640_000))
    with safe_open(tmp_path / "shard.safetensors", "pt") as file:
        assert len(list(file.keys())) == 10_000


def test_a_header_beyond_what_safetensors_reads_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout_module, "MAX_HEADER_BYTES", 1000)
    with pytest.raises(InvalidArgument, match="stack small tensors"):
        layout_of(*(tensor(f"t{n}", 1) for n in range(20)))
