"""What the ranks do with DCP in `test_dcp.py`; each function is one scenario, run on every rank of four."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, async_save
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import dtruntime_torch as dt
from dtruntime_torch.errors import AlreadyExists, CorruptCheckpoint, SaveFailed, StorageError
from dtruntime_torch.storage import LocalBackend
from dtruntime_torch.testing.faulty_backend import FaultyBackend, not_done
from tests.distributed.dcp_states import (
    RANK,
    WORLD,
    Rows,
    State,
    assert_equal,
    flat,
    full,
    load_by,
    members,
    save_by,
    state_of,
    trained,
)
from tests.distributed.in_turn import GROUPS, MESHES, main


def fsdp_and_adamw_resharded(folder: Path) -> None:
    """Saved by two, loaded by one, saved again, loaded by four."""
    if members(2):
        saved = save_by(2, folder)
        assert_equal(load_by(2, folder), saved)
    dist.barrier()
    if members(1):
        whole = load_by(1, folder)
        dcp_save(whole, storage_writer=dt.StorageWriter(folder / "again"), process_group=GROUPS[1])
    dist.barrier()
    found = load_by(4, folder / "again")
    expected: list[Any] = [whole if RANK == 0 else None]
    dist.broadcast_object_list(expected)
    assert_equal(found, expected[0])
    assert_equal(load_by(4, folder), found)


def stock_reads_the_shards(folder: Path) -> None:
    saved = save_by(4, folder)
    model, optimizer = trained(2, MESHES[2, 2], 1)  # another way to cut
    of_model, of_optimizer = get_state_dict(model, optimizer)
    tensors = {"model": of_model, "optimizer": {"state": of_optimizer["state"]}}
    dcp_load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)))
    found = flat(full(tensors))
    for name, tensor in found.items():
        assert torch.equal(tensor, flat(saved)[name]), name


def hybrid_shards_are_written_once(folder: Path) -> None:
    model, optimizer = trained(1, MESHES[2, 2], 2)
    state = state_of(model, optimizer)
    dcp_save(state, storage_writer=dt.StorageWriter(folder))
    if RANK == 0:
        metadata = dt.StorageReader(folder).read_metadata()
        chunks = metadata.state_dict_metadata["model.0.weight"].chunks  # type: ignore[union-attr]
        assert [(tuple(one.offsets), tuple(one.sizes)) for one in chunks] == [
            ((0, 0), (3, 6)),
            ((3, 0), (2, 6)),
        ]
    dist.barrier()
    assert_equal(load_by(4, folder), full(state))


def other_placements(folder: Path) -> None:
    whole = torch.arange(7 * 6).reshape(7, 6)
    ways = [[Shard(0)], [Shard(1)], [Replicate()]]
    for n, saved in enumerate(ways):
        tensor = distribute_tensor(whole, MESHES[4,], saved)
        dcp_save({"w": tensor}, storage_writer=dt.StorageWriter(folder / str(n), chunk_bytes=16))
        for wanted in ways:
            target = distribute_tensor(torch.zeros_like(whole), MESHES[4,], wanted)
            dcp_load({"w": target}, storage_reader=dt.StorageReader(folder / str(n)))
            assert torch.equal(target.full_tensor(), whole)


def a_mesh_of_two_dimensions(folder: Path) -> None:
    whole = torch.arange(7 * 6).reshape(7, 6)
    saved = distribute_tensor(whole, MESHES[2, 2], [Shard(0), Shard(1)])
    dcp_save({"w": saved}, storage_writer=dt.StorageWriter(folder, chunk_bytes=16))
    for mesh, placements in ((MESHES[2, 2], [Shard(1), Shard(0)]), (MESHES[4,], [Shard(0)])):
        target = distribute_tensor(torch.zeros_like(whole), mesh, placements)
        dcp_load({"w": target}, storage_reader=dt.StorageReader(folder))
        assert torch.equal(target.full_tensor(), whole)


def a_tensor_of_some_ranks_only(folder: Path) -> None:
    """The others hold a DTensor of which nothing is theirs."""
    whole = torch.arange(6.0)
    state: State = {"w": distribute_tensor(whole, MESHES[2,], [Shard(0)]), "v": torch.ones(2)}
    dcp_save(state, storage_writer=dt.StorageWriter(folder))
    target: State = {"w": distribute_tensor(torch.zeros(6), MESHES[2,], [Shard(0)]), "v": torch.zeros(2)}
    dcp_load(target, storage_reader=dt.StorageReader(folder))
    assert torch.equal(target["v"], state["v"])
    if members(2):
        assert torch.equal(target["w"].full_tensor(), whole)


def a_module_on_the_meta_device(folder: Path) -> None:
    saved = save_by(4, folder)
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 1))
    for layer in model:
        fully_shard(layer, mesh=MESHES[4,])
    model.to_empty(device="cpu")
    state = {"model": dict(model.state_dict())}
    dcp_load(state, storage_reader=dt.StorageReader(folder))
    assert_equal(full(state), {"model": {name: saved["model"][name] for name in state["model"]}})


def an_async_save_that_fails_says_so_and_the_next_one_works(folder: Path) -> None:
    state, stager = {"w": torch.full((4,), float(RANK))}, dt.PinnedStager()
    dcp_save({"w": torch.ones(1)}, storage_writer=dt.StorageWriter(folder / "taken"))
    dist.barrier()
    for place, ends in (("taken", False), ("free", True)):
        saving: Any = async_save(state, storage_writer=dt.StorageWriter(folder / place), async_stager=stager)
        if ends:
            saving.result()
        else:
            with pytest.raises(CheckpointException, match="holds a checkpoint already"):
                saving.result()
    dist.barrier()
    target = {"w": torch.zeros(4)}
    dcp_load(target, storage_reader=dt.StorageReader(folder / "free"))
    assert (target["w"] == 0).all()  # the first rank's, as DCP has it


def ranks_hold_different_names(folder: Path) -> None:
    state = {f"stage{RANK}": torch.full((3,), float(RANK)), f"object{RANK}": RANK}
    dcp_save(state, storage_writer=dt.StorageWriter(folder))
    target: State = {f"stage{RANK}": torch.zeros(3), f"object{RANK}": None}
    dcp_load(target, storage_reader=dt.StorageReader(folder))
    assert target[f"object{RANK}"] == RANK and (target[f"stage{RANK}"] == RANK).all()


def several_shards_of_a_name_on_one_rank(folder: Path) -> None:
    whole = torch.arange(12 * 2.0).reshape(12, 2)
    state: State = {"w": distribute_tensor(whole, MESHES[4,], [Shard(0)]), "x": 5}
    dcp_save(state, storage_writer=dt.StorageWriter(folder), planner=Rows())
    for reader in (dt.StorageReader(folder), HuggingFaceStorageReader(str(folder))):
        target: State = {"w": distribute_tensor(torch.zeros(12, 2), MESHES[4,], [Shard(1)])}
        dcp_load(target, storage_reader=reader)
        assert torch.equal(target["w"].full_tensor(), whole)


def plans_are_kept(folder: Path) -> None:
    """The structure stays, then changes on one rank alone, then on all."""
    for cache in (
        SavePlanner._cached_save_plan, SavePlanner._cached_all_plans, SavePlanner._cached_global_plan,
        SavePlanner._cached_metadata, SavePlanner._cached_final_save_plan,
    ):  # fmt: skip
        cache.clear()
    whole = torch.arange(8.0)
    extra: State = {}
    for n in range(5):
        if n == 2 and RANK == 1:
            extra["one"] = torch.ones(2)
        if n == 4:
            extra[f"own{RANK}"] = torch.full((2,), float(RANK))
        state: State = {"w": distribute_tensor(whole + n, MESHES[4,], [Shard(0)]), "n": n, **extra}
        planner = DefaultSavePlanner(enable_plan_caching=True)
        dcp_save(state, storage_writer=dt.StorageWriter(folder / str(n)), planner=planner)
        blank = {name: torch.zeros(2) for name in extra}
        target: State = {"w": distribute_tensor(torch.zeros(8), MESHES[4,], [Shard(0)]), "n": None, **blank}
        dcp_load(target, storage_reader=dt.StorageReader(folder / str(n)))
        assert torch.equal(target["w"].full_tensor(), whole + n) and target["n"] == n
        assert all(torch.equal(target[name], extra[name]) for name in extra)


def each_rank_saves_alone(folder: Path) -> None:
    for overwrite in (False, True):
        state: State = {
            "w": distribute_tensor(torch.arange(8) + overwrite, MESHES[4,], [Shard(0)]),
            "rank": RANK,
        }
        writer = dt.StorageWriter(folder, overwrite=overwrite)
        dcp_save(state, storage_writer=writer, use_collectives=False)
        target: State = {
            "w": distribute_tensor(torch.zeros(8, dtype=torch.int64), MESHES[4,], [Shard(0)]),
            "rank": None,
        }
        dcp_load(target, storage_reader=dt.StorageReader(folder))
        assert target["rank"] == RANK
        assert torch.equal(target["w"].full_tensor(), torch.arange(8) + overwrite)
        dist.barrier()
    assert len(list(folder.iterdir())) == 3 * WORLD
    with pytest.raises(AlreadyExists):
        dcp_save(state, storage_writer=dt.StorageWriter(folder), use_collectives=False)


def refused_at_every_door(folder: Path) -> None:
    state = {"w": torch.ones(3)}
    dcp_save(state, storage_writer=dt.StorageWriter(folder))
    with pytest.raises(CheckpointException) as caught:
        dcp_save(state, storage_writer=dt.StorageWriter(folder))
    assert {rank: type(error) for rank, (error, _) in caught.value.failures.items()} == dict.fromkeys(
        range(WORLD), AlreadyExists
    )


def overwritten_by_fewer(folder: Path) -> None:
    saved = save_by(4, folder)
    dist.barrier()
    if members(2):
        state = state_of(*trained(3, MESHES[2,], 2))
        writer = dt.StorageWriter(folder, overwrite=True)
        dcp_save(state, storage_writer=writer, process_group=GROUPS[2])
        assert_equal(load_by(2, folder), full(state))
    dist.barrier()
    assert len(list(folder.iterdir())) == 2 * 2 + 1
    assert flat(load_by(4, folder)).keys() == flat(saved).keys()


def a_rank_that_cannot_write_leaves_the_old_one(folder: Path) -> None:
    saved = save_by(4, folder)
    backend = FaultyBackend(LocalBackend(folder))
    if RANK == 2:
        backend.when("write", "*.json", not_done())
    with pytest.raises(CheckpointException) as caught:
        dcp_save({"w": torch.ones(3)}, storage_writer=dt.StorageWriter(backend, overwrite=True))
    ((rank, (error, _)),) = caught.value.failures.items()
    assert rank == 2 and isinstance(error, StorageError)
    assert_equal(load_by(4, folder), saved)


def ranks_that_see_different_folders_commit_nothing(folder: Path) -> None:
    """As where somebody else commits between the looks of two ranks."""
    if RANK == 1:
        dcp_save({"w": torch.ones(3)}, storage_writer=dt.StorageWriter(folder), no_dist=True)

    class Blind(LocalBackend):
        async def list(self, prefix: str, delimiter: str | None = None) -> Any:
            return [] if RANK == 0 else await super().list(prefix, delimiter)

    dist.barrier()
    before = (folder / "manifest.json").read_bytes()
    with pytest.raises(CheckpointException) as caught:
        dcp_save({"w": torch.zeros(3)}, storage_writer=dt.StorageWriter(Blind(folder), overwrite=True))
    assert isinstance(caught.value.failures[0][0], SaveFailed)
    assert (folder / "manifest.json").read_bytes() == before


def damage_is_told_by_the_rank_that_meets_it(folder: Path) -> None:
    state: State = {"w": distribute_tensor(torch.arange(64), MESHES[4,], [Shard(0)])}
    dcp_save(state, storage_writer=dt.StorageWriter(folder))
    if RANK == 0:
        path = folder / "shard-00002-of-00004.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    dist.barrier()
    with pytest.raises(CheckpointException) as caught:
        dcp_load(state, storage_reader=dt.StorageReader(folder))
    ((rank, (error, _)),) = caught.value.failures.items()
    assert rank == 2 and isinstance(error, CorruptCheckpoint) and "shard-00002-of-00004" in str(error)


def stock_writes_and_ours_reads(folder: Path) -> None:
    model, _ = trained(1, MESHES[4,], 1)
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    dcp_save(dict(model.state_dict()), storage_writer=writer)
    other, _ = trained(2, MESHES[2, 2], 1)
    state = dict(other.state_dict())
    dcp_load(state, storage_reader=dt.StorageReader(folder))
    assert_equal(full(state), full(dict(model.state_dict())))


def _async(folder: Path, kind: AsyncCheckpointerType, shared: bool) -> None:
    model, optimizer = trained(1, MESHES[4,], 2)
    stager = dt.PinnedStager(shared=shared)
    for n in range(3):
        state = state_of(model, optimizer)
        expected = full(state)
        saving = async_save(
            state,
            storage_writer=dt.StorageWriter(folder / str(n)),
            async_stager=stager,
            async_checkpointer_type=kind,
            process_group=GROUPS[4],
        )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
        saving.result()  # type: ignore[union-attr]  # a plain future, for staging has ended
        dist.barrier()
        assert_equal(load_by(4, folder / str(n)), expected)
    stager.close()


def async_in_a_thread(folder: Path) -> None:
    _async(folder, AsyncCheckpointerType.THREAD, shared=False)


def async_in_a_process(folder: Path) -> None:
    _async(folder, AsyncCheckpointerType.PROCESS, shared=False)


def async_in_a_process_that_shares_memory(folder: Path) -> None:
    _async(folder, AsyncCheckpointerType.PROCESS, shared=True)


SCENARIOS: dict[str, Callable[[Path], None]] = {
    scenario.__name__: scenario
    for scenario in (
        fsdp_and_adamw_resharded,
        stock_reads_the_shards,
        hybrid_shards_are_written_once,
        other_placements,
        a_mesh_of_two_dimensions,
        a_tensor_of_some_ranks_only,
        a_module_on_the_meta_device,
        an_async_save_that_fails_says_so_and_the_next_one_works,
        ranks_hold_different_names,
        several_shards_of_a_name_on_one_rank,
        plans_are_kept,
        each_rank_saves_alone,
        refused_at_every_door,
        overwritten_by_fewer,
        a_rank_that_cannot_write_leaves_the_old_one,
        ranks_that_see_different_folders_commit_nothing,
        damage_is_told_by_the_rank_that_meets_it,
        stock_writes_and_ours_reads,
        async_in_a_thread,
        async_in_a_process,
        async_in_a_process_that_shares_memory,
    )
}

if __name__ == "__main__":
    main(SCENARIOS)
