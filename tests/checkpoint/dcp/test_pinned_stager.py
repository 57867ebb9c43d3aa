"""The memory that states are staged in: once, complete, reused, and written from where it lies."""

from __future__ import annotations

import gc
from collections import OrderedDict, namedtuple
from collections.abc import Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import dtruntime_torch as dt
from dtruntime_torch.checkpoint.saving.layout import PAGE
from dtruntime_torch.errors import UnsupportedType
from dtruntime_torch.storage import MemoryBackend
from tests.checkpoint.dcp.calls import equal, load, save

BOTH = pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def make_state() -> dict[str, Any]:
    torch.manual_seed(3)
    weight = torch.randn(40, 30)
    return {
        "weight": weight,
        "tied": weight,
        "strided": torch.randn(7, 5).t(),
        "large": torch.randn(1 << 19),
        "bytes": torch.arange(9, dtype=torch.uint8),
        "scalar": torch.tensor(5),
        "empty": torch.empty(0, 3, dtype=torch.float64),
        "nested": [{"flag": torch.tensor(True)}, {"pair": torch.ones(2)}],
        "object": {"history": [1, 2]},
    }


def base_of(staged: dict[str, Any]) -> int:
    return staged["large"].untyped_storage().data_ptr()  # type: ignore[no-any-return]


@BOTH
def test_a_staged_state_is_the_state(shared: bool) -> None:
    state = make_state()
    assert equal(dict(dt.PinnedStager(shared=shared).stage(state)), state)


@BOTH
def test_what_is_staged_does_not_change_with_the_state(shared: bool) -> None:
    state = make_state()
    staged = dt.PinnedStager(shared=shared).stage(state)
    for tensor in (state["weight"], state["strided"], state["large"], state["nested"][1]["pair"]):
        tensor.zero_()
    state["object"]["history"].append(3)
    assert equal(dict(staged), make_state())


def test_all_lies_in_one_memory_behind_each_other_as_in_the_file() -> None:
    staged = dt.PinnedStager().stage(make_state())
    in_order = ["scalar", "weight", "strided", "large", "bytes"]  # by element size, then as they come
    at = [staged[name].data_ptr() - base_of(staged) for name in in_order]
    assert at == [0, 8, 8 + 4800, 8 + 4800 + 140, 8 + 4800 + 140 + (4 << 19) + 2 * 4]


def test_tied_tensors_are_staged_once() -> None:
    staged = dt.PinnedStager().stage(make_state())
    assert staged["tied"].data_ptr() == staged["weight"].data_ptr()


def test_containers_keep_their_kinds() -> None:
    Point = namedtuple("Point", "x y")  # noqa: PYI024  # one that a user's state may hold
    state = {"o": OrderedDict(a=torch.ones(1)), "p": Point(torch.ones(1), 2), "l": [torch.ones(1)]}
    staged = dt.PinnedStager().stage(state)
    assert [type(staged[key]) for key in state] == [OrderedDict, Point, list]


def test_parameters_come_without_their_history() -> None:
    staged = dt.PinnedStager().stage({"p": torch.nn.Parameter(torch.ones(3))})
    assert not staged["p"].requires_grad


@BOTH
def test_the_memory_is_used_again_once_nobody_uses_it(shared: bool) -> None:
    stager = dt.PinnedStager(shared=shared)
    places = set()
    for _ in range(4):
        staged = stager.stage(make_state())
        places.add(base_of(staged))
        del staged
        gc.collect()
    assert len(places) == 1


@BOTH
def test_what_is_still_used_is_not_overwritten(shared: bool) -> None:
    stager = dt.PinnedStager(shared=shared)
    first = stager.stage({"w": torch.ones(1000)})
    second = stager.stage({"w": torch.zeros(1000)})
    assert (first["w"] == 1).all() and (second["w"] == 0).all()


def test_one_tensor_of_it_is_use_enough() -> None:
    stager = dt.PinnedStager()
    kept = stager.stage({"w": torch.ones(1000), "v": torch.ones(1)})["w"]
    stager.stage({"w": torch.zeros(1000), "v": torch.ones(1)})
    assert (kept == 1).all()


@BOTH
def test_a_state_of_another_size_gets_its_own_memory(shared: bool) -> None:
    stager = dt.PinnedStager(shared=shared)
    for size in (1000, 100_000, 10, 0):
        assert equal(stager.stage({"w": torch.arange(size)})["w"], torch.arange(size))


def test_what_was_staged_outlives_the_stager() -> None:
    stager = dt.PinnedStager()
    staged = stager.stage(make_state())
    stager.close()
    del stager
    gc.collect()
    assert equal(staged, make_state())


def test_staged_tensors_are_written_from_where_they_lie(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    class Watching(MemoryBackend):
        async def write(self, path, data):
            if path.endswith(".safetensors"):
                seen.extend(
                    (np.frombuffer(view, np.uint8).ctypes.data, memoryview(view).nbytes) for view in data[1:]
                )
                headers.append(len(data[0]))
            await super().write(path, data)

    headers: list[int] = []
    # Without the tied one, which the file has twice, and in the order of the file.
    state = {"a": torch.randn(1 << 18), "b": torch.randn(1 << 18), "c": torch.arange(3, dtype=torch.uint8)}
    staged = dt.PinnedStager().stage(state)
    backend = Watching()
    save(staged, dt.StorageWriter(backend))
    assert seen == [(staged["a"].data_ptr(), (2 << 20) + 3)]
    assert headers == [PAGE]  # so that each page of memory is one of the file
    assert equal(
        load({name: torch.zeros_like(state[name]) for name in state}, dt.StorageReader(backend)), state
    )


def test_a_meta_tensor_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedType, match=r"model\.w: a meta tensor"):
        dt.PinnedStager().stage({"model": {"w": torch.empty(3, device="meta")}})


def test_a_dtensor_stays_one_and_can_be_sent_to_another_process(alone: None) -> None:
    mesh = init_device_mesh("cpu", (1,))
    whole = distribute_tensor(torch.arange(12).reshape(4, 3), mesh, [Shard(0)])
    state = {"first": torch.ones(5), "d": torch.nn.Parameter(whole.float()), "e": whole}
    stager = dt.PinnedStager(shared=True)
    staged = stager.stage(state)
    assert isinstance(staged["d"], DTensor) and isinstance(staged["e"], DTensor)
    assert staged["d"].placements == whole.placements and staged["d"].device_mesh == mesh
    assert torch.equal(staged["e"].to_local(), whole.to_local())
    assert staged["d"].to_local().storage_offset() > 0
    ForkingPickler.dumps(staged)


@BOTH
def test_it_is_what_async_save_takes(tmp_path: Path, alone: None, shared: bool) -> None:
    stager = dt.PinnedStager(shared=shared)
    assert isinstance(stager, AsyncStager) and not stager.should_synchronize_after_execute
    for n in range(3):
        state = make_state() | {"n": n}
        saving = async_save(state, storage_writer=dt.StorageWriter(tmp_path / str(n)), async_stager=stager)
        state["weight"].zero_()
        saving.result()  # type: ignore[union-attr]  # a plain future, for staging has ended
        target = {"weight": torch.zeros(40, 30), "n": None}
        assert equal(load(target, tmp_path / str(n)), {"weight": make_state()["weight"], "n": n})
    stager.close()
