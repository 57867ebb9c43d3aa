"""Planners of the user's choice, and what DCP does with them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor import init_from_local_shards
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed._shard.sharded_tensor.shard import Shard
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as Placed
from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper

import dtruntime_torch as dt
from dtruntime_torch.errors import InvalidArgument, UnsupportedType
from tests.checkpoint.dcp.calls import State, equal, load, load_stock, refused, save


@pytest.fixture(autouse=True)
def no_kept_plans() -> None:
    for cache in (
        SavePlanner._cached_save_plan, SavePlanner._cached_all_plans, SavePlanner._cached_global_plan,
        SavePlanner._cached_metadata, SavePlanner._cached_final_save_plan,
    ):  # fmt: skip
        cache.clear()


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Renaming(DefaultSavePlanner):
    """Saves under other names, in another dtype."""

    def set_up_planner(self, state_dict, storage_meta=None, is_coordinator=False):
        super().set_up_planner({f"new.{k}": v for k, v in state_dict.items()}, storage_meta, is_coordinator)

    def transform_object(self, write_item, object):
        found = super().transform_object(write_item, object)
        return found.bfloat16() if isinstance(found, torch.Tensor) else found


def test_what_a_planner_makes_of_a_tensor_is_what_is_saved(tmp_path: Path) -> None:
    save({"w": torch.ones(4)}, tmp_path, planner=Renaming())
    metadata = dt.StorageReader(tmp_path).read_metadata()
    assert metadata.state_dict_metadata["new.w"].properties.dtype == torch.bfloat16  # type: ignore[union-attr]
    target = load({"new.w": torch.zeros(4)}, tmp_path)
    assert target["new.w"].tolist() == [1.0] * 4


class Scaling(DefaultLoadPlanner):
    """Loads beside the state, and brings it there at the end."""

    def resolve_tensor(self, read_item):
        return torch.zeros(read_item.lengths)

    def commit_tensor(self, read_item, tensor):
        super().resolve_tensor(read_item).copy_(tensor * 2)


def test_a_planner_may_load_beside_the_state(tmp_path: Path) -> None:
    save({"w": torch.arange(4.0)}, tmp_path)
    assert load({"w": torch.zeros(4)}, tmp_path, planner=Scaling())["w"].tolist() == [0, 2, 4, 6]


def test_a_planner_that_does_not_flatten(tmp_path: Path) -> None:
    state = {"w": torch.ones(3), "n": [1, {"a": 2}]}
    save(state, tmp_path, planner=DefaultSavePlanner(flatten_state_dict=False))
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    assert equal(load({"w": torch.zeros(3), "n": None}, tmp_path, planner=planner), state)


def test_a_part_of_a_checkpoint_loads(tmp_path: Path) -> None:
    save({"w": torch.ones(3), "v": torch.ones(2)}, tmp_path)
    target = load(
        {"w": torch.zeros(3), "new": torch.zeros(1)},
        tmp_path,
        planner=DefaultLoadPlanner(allow_partial_load=True),
    )
    assert target["w"].tolist() == [1, 1, 1] and target["new"].tolist() == [0]


class Remembering(DefaultSavePlanner):
    """Keeps something of its own in the metadata."""

    kept: object = {"version": 3, ("a", 1): [None, 2.5]}

    def create_global_plan(self, all_plans):
        plans, metadata = super().create_global_plan(all_plans)
        return plans, replace(metadata, planner_data=self.kept)


def test_what_a_planner_keeps_in_the_metadata_comes_back(tmp_path: Path) -> None:
    save({"w": torch.ones(3)}, tmp_path, planner=Remembering())
    assert dt.StorageReader(tmp_path).read_metadata().planner_data == Remembering.kept


def test_what_a_planner_keeps_and_cannot_be_stored_is_refused(tmp_path: Path) -> None:
    planner = Remembering()
    planner.kept = object()
    with refused(UnsupportedType, "planner_data"):
        save({"w": torch.ones(3)}, tmp_path, planner=planner)
    assert not (tmp_path / "manifest.json").exists()


def spoiled(spoil: Callable[[Any, Any], Any]) -> DefaultSavePlanner:
    class Spoiled(DefaultSavePlanner):
        def resolve_data(self, write_item):
            return spoil(write_item, super().resolve_data(write_item))

    return Spoiled()


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda item, found: found[:1], "w: the planner planned a shard of shape"),
        (lambda item, found: [1], "w: the planner gave a list where it planned a tensor"),
    ],
)
def test_a_planner_that_gives_other_than_it_planned_is_refused(tmp_path: Path, spoil, match: str) -> None:
    with refused(InvalidArgument, match):
        save({"w": torch.ones(3)}, tmp_path, planner=spoiled(spoil))
    assert list(tmp_path.iterdir()) == []


def test_a_planner_that_gives_no_bytes_is_refused(tmp_path: Path) -> None:
    with refused(InvalidArgument, "n: the planner gave a int where it planned bytes"):
        save({"n": 3}, tmp_path, planner=spoiled(lambda item, found: 3))


class Forgetful(DefaultSavePlanner):
    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return super().finish_plan(replace(new_plan, storage_data=None))


def test_a_planner_that_drops_what_the_writer_put_in_its_plan_is_refused(tmp_path: Path) -> None:
    with refused(InvalidArgument, "finish_plan has to keep"):
        save({"w": torch.ones(3)}, tmp_path, planner=Forgetful())


def test_plans_are_kept_from_save_to_save(tmp_path: Path) -> None:
    for n in range(4):
        state: State = {"w": torch.full((3,), float(n)), "n": n, **({"v": torch.ones(n)} if n > 1 else {})}
        save(state, tmp_path / str(n), planner=DefaultSavePlanner(enable_plan_caching=True))
        target = {name: torch.zeros_like(value) if name != "n" else None for name, value in state.items()}
        assert equal(load(target, tmp_path / str(n)), state)


def test_a_kept_plan_overwrites_too(tmp_path: Path) -> None:
    for n in range(3):
        writer = dt.StorageWriter(tmp_path, overwrite=True)
        save({"n": n}, writer, planner=DefaultSavePlanner(enable_plan_caching=True))
        assert load({"n": None}, tmp_path)["n"] == n


def sharded(value: torch.Tensor, cuts: list[int]) -> ShardedTensor:
    bounds = [0, *cuts, len(value)]
    shards = [
        Shard.from_tensor_and_offsets(value[a:b].clone(), [a, 0], 0) for a, b in itertools.pairwise(bounds)
    ]
    return init_from_local_shards(shards, list(value.shape))


@pytest.mark.parametrize(
    ("saved", "wanted"), [([4], []), ([2, 5], [1, 3, 6]), ([], [3]), ([0], []), ([0, 3], [3])]
)
def test_several_shards_of_a_sharded_tensor(
    tmp_path: Path, alone: None, saved: list[int], wanted: list[int]
) -> None:
    value = torch.arange(16.0).reshape(8, 2)
    folder = tmp_path / "one"
    save({"s": sharded(value, saved), "n": 1}, dt.StorageWriter(folder, chunk_bytes=16))
    target = sharded(torch.zeros(8, 2), wanted)
    load({"s": target, "n": None}, folder)
    assert torch.equal(torch.cat([shard.tensor for shard in target.local_shards()]), value)
    assert torch.equal(load_stock({"s": torch.zeros(8, 2)}, folder)["s"], value)


def wrapped(value: torch.Tensor) -> DTensor:
    """As torchrec holds a table: two shards of it on one rank."""
    shards = LocalShardsWrapper([value[:3].clone(), value[3:].clone()], [(0, 0), (3, 0)])
    shape = torch.Size(value.shape)
    mesh = init_device_mesh("cpu", (1,))
    return DTensor.from_local(shards, mesh, [Placed(0)], run_check=False, shape=shape, stride=(shape[1], 1))


@pytest.mark.parametrize("staged", [False, True])
def test_several_shards_in_one_dtensor(tmp_path: Path, alone: None, staged: bool) -> None:
    value, folder = torch.arange(16.0).reshape(8, 2), tmp_path / "one"
    state: State = {"first": torch.ones(3), "d": wrapped(value)}
    save(dt.PinnedStager().stage(state) if staged else state, folder)
    target = wrapped(torch.zeros(8, 2))
    load({"d": target}, folder)
    local: Any = target.to_local()
    assert torch.equal(torch.cat(local.local_shards()), value)
    assert torch.equal(load_stock({"d": torch.zeros(8, 2)}, folder)["d"], value)


def test_a_staged_sharded_tensor_is_saved(tmp_path: Path, alone: None) -> None:
    value = torch.arange(16.0).reshape(8, 2)
    staged = dt.PinnedStager().stage({"s": sharded(value, [3])})
    save(staged, tmp_path / "one")
    assert torch.equal(load({"s": torch.zeros(8, 2)}, tmp_path / "one")["s"], value)
