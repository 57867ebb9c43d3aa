"""Loads from a file system straight into the state: what is read where, and what damage leaves."""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn
from typing_extensions import Buffer

import dtruntime_torch as dt
from dtruntime_torch.errors import (
    CheckpointMismatch,
    CorruptCheckpoint,
    InvalidArgument,
    LoadFailed,
    StorageError,
)
from dtruntime_torch.storage import LocalBackend
from dtruntime_torch.storage.arguments import as_views
from dtruntime_torch.storage.backend import Data
from dtruntime_torch.storage.system_calls import SystemCalls

HALF = "tensors of the state hold bytes of what could not be loaded"


class Watched(SystemCalls):
    """Remembers where bytes of data files go, and fails if it is told to."""

    def __init__(self, fails: bool = False) -> None:
        self.fails = fails
        self.straight: list[tuple[int, int]] = []
        self.beside = 0

    def read_and_digest(
        self, path: str, offsets: Sequence[int], into: Sequence[memoryview], chunk_bytes: int
    ) -> bytes:
        if self.fails:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        for memory in into:
            start = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
            self.straight.append((start, start + memory.nbytes))
        return super().read_and_digest(path, offsets, into, chunk_bytes)

    def read_into(self, path: str, offset: int, target: memoryview, direct: bool) -> None:
        # From offset 0 comes a file's header.
        self.beside += target.nbytes if offset else 0
        super().read_into(path, offset, target, direct)

    def fill_of(self, tensor: torch.Tensor) -> int:
        """How many bytes went straight into the memory of a tensor."""
        first, last = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        return sum(max(0, min(stop, last) - max(start, first)) for start, stop in self.straight)


def make_model(value: float) -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
    for number, parameter in enumerate(model.parameters()):
        nn.init.constant_(parameter, value + number)
    return model


def save(folder: Path, *values: float) -> list[dt.CheckpointInfo]:
    with dt.CheckpointManager(folder, chunk_bytes=4096) as manager:
        return [
            manager.save({"model": make_model(value)}, step) for step, value in enumerate(values, start=1)
        ]


def flip(folder: Path, info: dt.CheckpointInfo, position: int = -5) -> None:
    """Flips a bit of a data file, near its end."""
    (file,) = (folder / info.name / info.path.rpartition(f"{info.name}/")[2]).glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


def values_of(model: nn.Module) -> list[float]:
    return [float(parameter.detach().flatten()[0]) for parameter in model.parameters()]


def test_parameters_are_read_straight_into_place(tmp_path: Path) -> None:
    save(tmp_path, 3)
    calls, model = Watched(), make_model(0)
    with dt.CheckpointManager(LocalBackend(tmp_path, calls=calls)) as manager:
        manager.load({"model": model})
    assert values_of(model) == [3, 4, 5, 6]
    assert [calls.fill_of(parameter) for parameter in model.parameters()] == [
        parameter.nbytes for parameter in model.parameters()
    ]
    assert calls.beside == 0


def test_the_state_of_a_fresh_optimizer_is_read_straight_into_place(tmp_path: Path) -> None:
    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = make_model(1)
        return model, torch.optim.AdamW(model.parameters())

    model, optimizer = make()
    model(torch.ones(2, 64)).sum().backward()
    optimizer.step()
    with dt.CheckpointManager(tmp_path) as manager:
        manager.save({"model": model, "optimizer": optimizer}, 1)
    calls, (fresh, restored) = Watched(), make()
    with dt.CheckpointManager(LocalBackend(tmp_path, calls=calls)) as manager:
        manager.load({"model": fresh, "optimizer": restored})
    for old, new in zip(model.parameters(), fresh.parameters(), strict=True):
        for key, value in optimizer.state[old].items():
            there = restored.state[new][key]
            assert torch.equal(there, value)
            assert calls.fill_of(there) == there.nbytes
    assert calls.beside == 0


def test_a_damaged_step_is_filled_over_by_the_one_before_it(tmp_path: Path) -> None:
    _, newest = save(tmp_path, 3, 13)
    flip(tmp_path, newest)
    model = make_model(0)
    with dt.CheckpointManager(tmp_path) as manager, pytest.warns(RuntimeWarning, match="step 2.*passed over"):
        assert manager.load({"model": model}).step == 1
    assert values_of(model) == [3, 4, 5, 6]


def test_where_nothing_sound_is_left_the_error_says_that_the_state_is_half_filled(tmp_path: Path) -> None:
    (info,) = save(tmp_path, 3)
    flip(tmp_path, info)
    model = make_model(0)
    with (
        dt.CheckpointManager(tmp_path) as manager,
        pytest.warns(RuntimeWarning),
        pytest.raises(CorruptCheckpoint, match=HALF),
    ):
        manager.load({"model": model})


def test_a_damaged_step_that_was_asked_for_is_named_and_not_replaced(tmp_path: Path) -> None:
    _, newest = save(tmp_path, 3, 13)
    flip(tmp_path, newest)
    with dt.CheckpointManager(tmp_path) as manager:
        with pytest.raises(CorruptCheckpoint, match=f"(?s)safetensors bytes.*{HALF}") as caught:
            manager.load({"model": make_model(0)}, step=2)
        (damage,) = caught.value.damage
        assert damage.tensor is not None
        model = make_model(0)
        manager.load({"model": model}, step=1)
    assert values_of(model) == [3, 4, 5, 6]


def test_a_header_that_changed_is_found_before_anything_is_touched(tmp_path: Path) -> None:
    (info,) = save(tmp_path, 3)
    flip(tmp_path, info, position=3)
    model = make_model(0)
    with dt.CheckpointManager(tmp_path) as manager, pytest.raises(CorruptCheckpoint) as caught:
        manager.load({"model": model}, step=1)
    assert [damage.tensor for damage in caught.value.damage] == [None]
    assert HALF not in str(caught.value)
    assert values_of(model) == [0, 1, 2, 3]


def test_all_or_nothing_touches_nothing_where_a_chunk_is_damaged(tmp_path: Path) -> None:
    (info,) = save(tmp_path, 3)
    flip(tmp_path, info)
    model = make_model(0)
    with dt.CheckpointManager(tmp_path) as manager, pytest.raises(CorruptCheckpoint) as caught:
        manager.load({"model": model}, step=1, all_or_nothing=True)
    assert HALF not in str(caught.value)
    assert values_of(model) == [0, 1, 2, 3]


def test_all_or_nothing_reads_beside_the_state(tmp_path: Path) -> None:
    save(tmp_path, 3)
    calls, model = Watched(), make_model(0)
    with dt.CheckpointManager(LocalBackend(tmp_path, calls=calls)) as manager:
        manager.load({"model": model}, all_or_nothing=True)
    assert values_of(model) == [3, 4, 5, 6]
    assert not calls.straight and calls.beside > 0


def test_no_mixture_of_two_steps_is_left_where_the_older_one_lacks_a_name(tmp_path: Path) -> None:
    def state(value: float, *more: str) -> dict[str, torch.Tensor]:
        return {name: torch.full((2000,), value) for name in ("both", *more)}

    with dt.CheckpointManager(tmp_path, chunk_bytes=4096) as manager:
        manager.save(state(1), 1)
        newest = manager.save(state(2, "late"), 2)
    flip(tmp_path, newest)
    with dt.CheckpointManager(tmp_path) as manager, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(CheckpointMismatch, match=f"(?s)late: holds bytes of a newer step.*{HALF}"):
            manager.load(state(0, "late"), strict=False)


def test_an_optimizer_falls_back_to_a_step_at_which_it_had_no_state_yet(tmp_path: Path) -> None:
    model = make_model(1)
    optimizer = torch.optim.AdamW(model.parameters())
    with dt.CheckpointManager(tmp_path, chunk_bytes=4096) as manager:
        manager.save({"model": model, "optimizer": optimizer}, 1)
        model(torch.ones(2, 64)).sum().backward()
        optimizer.step()
        newest = manager.save({"model": model, "optimizer": optimizer}, 2)
    flip(tmp_path, newest)
    with dt.CheckpointManager(tmp_path) as manager, pytest.warns(RuntimeWarning, match="step 2"):
        assert manager.load({"model": model, "optimizer": optimizer}).step == 1
    assert values_of(model) == [1, 2, 3, 4]
    assert not optimizer.state


def test_an_optimizer_that_the_older_step_lacks_is_no_mixture(tmp_path: Path) -> None:
    model = make_model(1)
    optimizer = torch.optim.AdamW(model.parameters())
    with dt.CheckpointManager(tmp_path, chunk_bytes=4096) as manager:
        manager.save({"model": model}, 1)
        model(torch.ones(2, 64)).sum().backward()
        optimizer.step()
        newest = manager.save({"model": model, "optimizer": optimizer}, 2)
    flip(tmp_path, newest)
    with dt.CheckpointManager(tmp_path) as manager, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(CheckpointMismatch, match="exp_avg: holds bytes of a newer step"):
            manager.load({"model": model, "optimizer": optimizer}, strict=False)


def test_what_an_optimizer_keeps_under_a_name_goes_with_the_rest_of_its_state(tmp_path: Path) -> None:
    def make(average: float | None) -> dict[str, object]:
        model = make_model(1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if average is not None:
            state: dict[object, object] = optimizer.state  # type: ignore[assignment]
            state["shared"] = {"average": torch.full((5000,), average)}
        return {"model": model, "optimizer": optimizer}

    with dt.CheckpointManager(tmp_path, chunk_bytes=4096) as manager:
        manager.save(make(None), 1)
        newest = manager.save(make(2), 2)
    flip(tmp_path, newest)
    state = make(0)
    with dt.CheckpointManager(tmp_path) as manager, pytest.warns(RuntimeWarning, match="step 2"):
        assert manager.load(state).step == 1
    optimizer = state["optimizer"]
    assert isinstance(optimizer, torch.optim.Optimizer) and "shared" not in optimizer.state


def test_where_the_only_checkpoint_goes_while_it_is_read_nobody_is_told_to_begin_anew(tmp_path: Path) -> None:
    save(tmp_path, 3)

    class Vanishing(Watched):
        """Takes the commit away, and with it what makes a difference damage."""

        def read_and_digest(
            self, path: str, offsets: Sequence[int], into: Sequence[memoryview], chunk_bytes: int
        ) -> bytes:
            for commit in tmp_path.glob("model/commits/*"):
                commit.unlink()
            return bytes(len(super().read_and_digest(path, offsets, into, chunk_bytes)))

    backend = LocalBackend(tmp_path, calls=Vanishing())
    with dt.CheckpointManager(backend) as manager, pytest.raises(LoadFailed, match=HALF):
        manager.load({"model": make_model(0)})


def test_a_backend_that_reads_in_its_own_way_is_not_read_past_it(tmp_path: Path) -> None:
    class Inverting(LocalBackend):
        """Stores every byte inverted."""

        async def write(self, path: str, data: Data) -> None:
            await super().write(path, bytes(255 - byte for byte in b"".join(as_views(data))))

        async def create(self, path: str, data: Data) -> None:
            await super().create(path, bytes(255 - byte for byte in b"".join(as_views(data))))

        async def read(self, path: str) -> bytes:
            return bytes(255 - byte for byte in bytes(await super().read(path)))

        async def read_range(
            self, path: str, offset: int, length: int, *, into: memoryview | None = None
        ) -> Buffer:
            data = bytes(255 - byte for byte in bytes(await super().read_range(path, offset, length)))
            if into is None:
                return data
            into.cast("B")[:] = data
            return into

    model = make_model(0)
    with dt.CheckpointManager(Inverting(tmp_path)) as manager:
        manager.save({"model": make_model(3)}, 1)
        manager.load({"model": model})
    assert values_of(model) == [3, 4, 5, 6]


def test_a_file_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    (info,) = save(tmp_path, 3)
    (file,) = tmp_path.rglob("*.safetensors")
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size - 1)
    model = make_model(0)
    with dt.CheckpointManager(tmp_path) as manager, pytest.raises(CorruptCheckpoint) as caught:
        manager.load({"model": model}, step=info.step)
    assert HALF not in str(caught.value)
    assert values_of(model) == [0, 1, 2, 3]


def test_a_storage_that_fails_half_way_says_so(tmp_path: Path) -> None:
    save(tmp_path, 3)
    backend = LocalBackend(tmp_path, calls=Watched(fails=True))
    with dt.CheckpointManager(backend) as manager, pytest.raises(StorageError, match=f"EACCES.*{HALF}"):
        manager.load({"model": make_model(0)})


def test_tied_tensors_are_compared_before_anything_is_touched(tmp_path: Path) -> None:
    with dt.CheckpointManager(tmp_path) as manager:
        manager.save({"a": torch.full((9,), 1.0), "b": torch.full((9,), 2.0), "c": torch.full((9,), 3.0)}, 1)
    tied, other = torch.zeros(9), torch.zeros(9)
    with dt.CheckpointManager(tmp_path) as manager, pytest.raises(InvalidArgument, match="a and b are one"):
        manager.load({"a": tied, "b": tied, "c": other})
    assert not tied.any() and not other.any()


def test_views_of_one_buffer_and_transposed_tensors_are_filled_as_well(tmp_path: Path) -> None:
    def make(value: float) -> dict[str, torch.Tensor]:
        whole = torch.full((4, 6), value)
        apart = torch.full((30,), value)
        return {"rows": whole[:2], "transposed": torch.full((3, 5), value).t(), "even": apart[::2]}

    saved = {
        name: tensor + torch.arange(tensor.numel()).view(tensor.shape) for name, tensor in make(1).items()
    }
    with dt.CheckpointManager(tmp_path) as manager:
        manager.save(saved, 1)
    state = make(0)
    with dt.CheckpointManager(tmp_path) as manager:
        manager.load(state)
    assert all(torch.equal(state[name], saved[name]) for name in saved)


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.bfloat16, torch.complex64, torch.float8_e4m3fn, torch.int16]
)
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (0, 4)])
def test_every_dtype_and_shape_arrives_bit_for_bit(
    tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    saved = torch.arange(1, 16)[: max(1, torch.Size(shape).numel())].to(dtype)
    saved = saved.reshape(shape) if torch.Size(shape).numel() else torch.empty(shape, dtype=dtype)
    with dt.CheckpointManager(tmp_path) as manager:
        manager.save({"t": saved}, 1)
    state = {"t": torch.zeros(shape, dtype=dtype)}
    with dt.CheckpointManager(tmp_path) as manager:
        manager.load(state)
    assert torch.equal(state["t"].flatten().view(torch.uint8), saved.flatten().view(torch.uint8))
