"""What is saved comes back bit for bit, through a real manager on a real folder."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

import dtruntime_torch as dt
from dtruntime_torch.errors import CheckpointMismatch, InvalidArgument

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.uint16,
    torch.int32,
    torch.uint32,
    torch.int64,
    torch.uint64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
]


def random_bits(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Any bit pattern, NaNs with payloads included."""
    nbytes = math.prod(shape) * dtype.itemsize
    high = 2 if dtype == torch.bool else 256
    return torch.randint(0, high, (nbytes,), dtype=torch.uint8).view(dtype).view(shape)


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    as_bytes = [t.contiguous().view(-1).view(torch.uint8) for t in (left, right)]
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(*as_bytes)


def save_and_reload(folder: Path, state: object) -> object:
    with dt.CheckpointManager(folder) as manager:
        manager.save(state, 1)
        return manager.load_checkpoint(step=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_keeps_its_bits(tmp_path, dtype):
    tensor = random_bits(dtype, (3, 5, 2))
    loaded = save_and_reload(tmp_path, {"t": tensor})
    assert isinstance(loaded, dict) and same_bits(loaded["t"], tensor)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (1, 1, 1, 1)], ids=str)
def test_odd_shapes_come_back(tmp_path, shape):
    tensor = torch.randn(shape)
    loaded = save_and_reload(tmp_path, {"t": tensor, "behind": torch.arange(3)})
    assert isinstance(loaded, dict)
    assert same_bits(loaded["t"], tensor) and torch.equal(loaded["behind"], torch.arange(3))


def test_a_strided_tensor_is_saved_as_it_reads(tmp_path):
    base = torch.randn(6, 8)
    state = {"transposed": base.t(), "sliced": base[:, ::2], "expanded": base[0].expand(4, 8)}
    loaded = save_and_reload(tmp_path, state)
    assert isinstance(loaded, dict) and all(torch.equal(loaded[k], v) for k, v in state.items())


def test_a_strided_tensor_is_filled_in_place(tmp_path):
    base = torch.randn(6, 8)
    with dt.CheckpointManager(tmp_path) as manager:
        manager.save({"t": base.t()}, 1)
        target = torch.zeros(6, 8)
        manager.load({"t": target.t()})
    assert torch.equal(target, base)


def test_tied_tensors_are_tied_again(tmp_path):
    weight = torch.randn(4, 4)
    loaded = save_and_reload(tmp_path, {"embedding": weight, "head": weight, "like": weight.clone()})
    assert isinstance(loaded, dict)
    assert loaded["embedding"].data_ptr() == loaded["head"].data_ptr() != loaded["like"].data_ptr()


def test_ten_thousand_small_tensors_come_back(tmp_path):
    state = {f"layer{i // 100}.t{i}": torch.full((i % 7, 3), i, dtype=torch.int32) for i in range(10_000)}
    loaded = save_and_reload(tmp_path, state)
    assert isinstance(loaded, dict) and list(loaded) == list(state)
    assert all(torch.equal(loaded[key], tensor) for key, tensor in state.items())


def test_bytes_come_back_as_bytes(tmp_path):
    blob = bytes(range(256)) * 5000
    assert save_and_reload(tmp_path, blob) == blob


def test_empty_bytes_come_back(tmp_path):
    assert save_and_reload(tmp_path, b"") == b""


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=4) | st.integers() | st.booleans() | st.none(), inner, max_size=3)
    ),
    max_leaves=12,
)


def exact(value: object) -> object:
    """A form in which 1, 1.0 and True differ, and nan equals nan."""
    if isinstance(value, dict):
        return ("dict", [(exact(k), exact(v)) for k, v in value.items()])
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, [exact(v) for v in value])
    return (type(value).__name__, value.hex() if isinstance(value, float) else value)


# Keys without dots: what "a.b" and "a" -> "b" have in common is told by another test.
@given(st.dictionaries(st.from_regex(r"[a-z]{1,5}", fullmatch=True), VALUES, min_size=1, max_size=4))
def test_any_nest_of_plain_values_comes_back_exactly(state):
    with dt.CheckpointManager(dt.MemoryBackend()) as manager:
        manager.save(state, 1)
        assert exact(manager.load_checkpoint()) == exact(state)


def test_a_full_save_opens_with_stock_safetensors(tmp_path):
    state = {"a": random_bits(torch.bfloat16, (3, 3)), "b": {"c": torch.arange(5), "d": torch.tensor(2.5)}}
    with dt.CheckpointManager(tmp_path) as manager:
        info = manager.save(state, 1)
    with safe_open(tmp_path / info.path / "shard-00000-of-00001.safetensors", "pt") as opened:
        assert set(opened.keys()) == {"a", "b.c", "b.d"}
        assert same_bits(opened.get_tensor("a"), state["a"])
        assert torch.equal(opened.get_tensor("b.c"), torch.arange(5))


def test_several_chunks_and_a_tail(tmp_path):
    tensor = torch.randint(0, 256, (3 * 4096 + 17,), dtype=torch.uint8)
    with dt.CheckpointManager(tmp_path, chunk_bytes=4096) as manager:
        manager.save({"t": tensor}, 1)
        loaded = manager.load_checkpoint()
        assert manager.verify().chunks == 4
    assert isinstance(loaded, dict) and torch.equal(loaded["t"], tensor)


def test_the_state_may_change_as_soon_as_save_async_returns(tmp_path):
    tensor = torch.zeros(1 << 20)
    with dt.CheckpointManager(tmp_path) as manager:
        handle = manager.save_async({"t": tensor}, 1)
        tensor.fill_(1)
        handle.result()
        loaded = manager.load_checkpoint()
    assert isinstance(loaded, dict) and not loaded["t"].any()


@pytest.mark.parametrize("transposed", [False, True], ids=["contiguous", "transposed parameters"])
def test_a_model_and_its_optimizer_go_on_bit_for_bit(tmp_path, transposed):
    def make() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))
        if transposed:
            model[0].weight = torch.nn.Parameter(torch.randn(4, 8).t())
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batches: torch.Tensor) -> None:
        for batch in batches:
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()

    batches = torch.randn(6, 16, 4)
    model, optimizer = make()
    train(model, optimizer, batches[:3])
    with dt.CheckpointManager(tmp_path) as manager:
        manager.save({"model": model, "optimizer": optimizer}, 3)
        train(model, optimizer, batches[3:])
        fresh_model, fresh_optimizer = make()
        manager.load({"model": fresh_model, "optimizer": fresh_optimizer})
    train(fresh_model, fresh_optimizer, batches[3:])
    assert all(
        same_bits(a, b)
        for a, b in zip(model.state_dict().values(), fresh_model.state_dict().values(), strict=True)
    )
    entries = fresh_optimizer.state[fresh_model[0].weight]  # type: ignore[index]
    assert entries["exp_avg"].is_contiguous() != transposed


def test_one_tensor_does_not_take_two_different_values(tmp_path):
    with dt.CheckpointManager(tmp_path) as manager:
        manager.save({"a": torch.ones(3), "b": torch.full((3,), 2.0)}, 1)
        tied = torch.zeros(3)
        with pytest.raises(InvalidArgument, match="a and b are one tensor"):
            manager.load({"a": tied, "b": tied})
    assert not tied.any()


def test_one_tensor_takes_two_equal_values(tmp_path):
    with dt.CheckpointManager(tmp_path) as manager:
        manager.save({"a": torch.full((3,), math.nan), "b": torch.full((3,), math.nan)}, 1)
        tied = torch.zeros(3)
        manager.load({"a": tied, "b": tied})
    assert tied.isnan().all()


def test_an_expanded_tensor_cannot_be_filled(tmp_path):
    with dt.CheckpointManager(tmp_path) as manager:
        manager.save({"a": torch.ones(3), "b": torch.ones(2, 3)}, 1)
        first, row = torch.zeros(3), torch.zeros(3)
        with pytest.raises(CheckpointMismatch, match="b: an expanded tensor"):
            manager.load({"a": first, "b": row.expand(2, 3)})
    assert not first.any()
