"""Scenarios of tensors sharded in all the ways that DCP knows; each runs on every rank of four, through both doors."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed._shard import sharded_tensor
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed._shard.sharding_spec import ChunkShardingSpec
from torch.distributed._shard.sharding_spec.api import EnumerableShardingSpec, ShardingSpec
from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, zeros
from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper
from torch.distributed.tensor.placement_types import Placement

from tests.distributed.dcp_doors import Doors, State, assert_same
from tests.distributed.dcp_states import RANK
from tests.distributed.in_turn import MESHES

ROW_CUTS = ((2, 1, 3, 3, 1), (8, 2))


def in_chunks(dim: int, *ranks: int) -> ShardingSpec:
    return ChunkShardingSpec(dim=dim, placements=[f"rank:{rank}/cpu" for rank in ranks])


def in_rows(sizes: tuple[int, ...], *rest: int) -> ShardingSpec:
    """Shards of so many rows, dealt to the ranks from the last to the first."""
    starts = itertools.accumulate(sizes, initial=0)
    return EnumerableShardingSpec(
        [
            ShardMetadata([start, *(0 for _ in rest)], [size, *rest], f"rank:{3 - n % 4}/cpu")
            for n, (start, size) in enumerate(zip(starts, sizes, strict=False))
        ]
    )


def specs(rows: int, *rest: int) -> list[ShardingSpec]:
    scaled = [(*cut[:-1], rows - sum(cut[:-1])) for cut in ROW_CUTS]
    return [in_chunks(0, 0, 1, 2, 3), in_chunks(0, 0, 1, 1, 0), *(in_rows(cut, *rest) for cut in scaled)]


def random(spec: ShardingSpec, *size: int) -> ShardedTensor:
    return sharded_tensor.rand(spec, *size, init_rrefs=False)  # type: ignore[no-untyped-call, no-any-return]


def sharded_tensors_reshard(doors: Doors) -> None:
    """From each way to cut into each other: fewer ranks, several shards on one, uneven ones."""
    tensors = {str(n): random(spec, 10, 20) for n, spec in enumerate(specs(10, 20))}
    doors.save(tensors)
    for wanted in specs(10, 20):
        assert_same(doors.load({name: random(wanted, 10, 20) for name in tensors}), tensors)


def rows_become_columns(doors: Doors) -> None:
    tensor, target = random(in_chunks(0, 0, 1, 2, 3), 10, 20), random(in_chunks(1, 3, 2, 1, 0), 10, 20)
    doors.save({"w": tensor})
    assert_same(doors.load({"w": target})["w"], tensor)


def sharded_and_plain_change_places(doors: Doors) -> None:
    """What was saved sharded loads into a plain tensor, and the other way round."""
    state = {str(n): random(spec, 32) for n, spec in enumerate(specs(32))}
    doors.save(state | {"plain": torch.arange(32.0)})
    for wanted in specs(32):
        target = doors.load({name: torch.zeros(32) for name in state} | {"plain": random(wanted, 32)})
        assert_same(target, state | {"plain": torch.arange(32.0)})


ONE: list[list[Placement]] = [[Shard(0)], [Replicate()], [Shard(1)]]
TWO: list[list[Placement]] = [
    *(list(pair) for pair in itertools.product((Replicate(), Shard(0)), repeat=2)),
    [Shard(0), Shard(1)],
    [Shard(1), Shard(0)],
]


def placements_and_meshes_change(doors: Doors) -> None:
    """Every placement on the mesh in a row and on the one in two rows, into every other."""
    whole = torch.arange(16.0).view(4, 4)
    ways = [(MESHES[4,], way) for way in ONE] + [(MESHES[2, 2], way) for way in TWO]
    doors.save({str(n): distribute_tensor(whole, mesh, saved) for n, (mesh, saved) in enumerate(ways)})
    for mesh, wanted in ways:
        target = {str(n): zeros([4, 4], device_mesh=mesh, placements=wanted) for n in range(len(ways))}
        assert_same(doors.load(target), dict.fromkeys(target, whole))


def shards_are_uneven_or_empty(doors: Doors) -> None:
    """One, five and six rows for four ranks, also cut twice in the same dimension."""
    for rows in (1, 5, 6):
        tensor = torch.arange(rows * 3.0).view(rows, 3)
        state = {
            "row": distribute_tensor(tensor, MESHES[4,], [Shard(0)]),
            "twice": distribute_tensor(tensor, MESHES[2, 2], [Shard(0), Shard(0)]),
        }
        doors.save(state, str(rows))
        target = {
            "row": distribute_tensor(tensor * 0, MESHES[2, 2], [Shard(0), Shard(0)]),
            "twice": distribute_tensor(tensor * 0, MESHES[4,], [Shard(0)]),
        }
        assert_same(doors.load(target, str(rows)), {"row": tensor, "twice": tensor})


def uneven_shards_in_one_dtensor(doors: Doors) -> None:
    """A DTensor that holds several shards of a rank, as tables of embeddings are cut."""
    sizes = ((4,), (2, 2), (2,), (6,))
    first = sum(map(sum, sizes[:RANK]))  # type: ignore[arg-type]
    tensor = torch.arange(16 * 2.0).view(16, 2)

    def held(values: torch.Tensor) -> DTensor:
        starts = list(itertools.accumulate(sizes[RANK], initial=first))
        shards = [values[at : at + size].clone() for at, size in zip(starts, sizes[RANK], strict=False)]
        local = LocalShardsWrapper(shards, [(at, 0) for at in starts[:-1]])
        shape, stride = tensor.size(), tensor.stride()
        return DTensor.from_local(local, MESHES[4,], [Shard(0)], run_check=False, shape=shape, stride=stride)

    doors.save({"w": held(tensor)})
    plain = doors.load({"w": distribute_tensor(tensor * 0, MESHES[2, 2], [Shard(1), Shard(0)])})
    assert_same(plain["w"], tensor)
    again: Any = doors.load({"w": held(tensor * 0)})["w"]
    starts = list(itertools.accumulate(sizes[RANK], initial=first))
    for shard, at, size in zip(again.to_local().local_shards(), starts, sizes[RANK], strict=False):
        assert torch.equal(shard, tensor[at : at + size])


class SelfCut(torch.Tensor):
    """Some rows of a tensor, of which the methods say that DCP asks a tensor for how it is saved and loaded."""

    local: torch.Tensor
    chunk: ChunkStorageMetadata

    @staticmethod
    def __new__(cls, local: torch.Tensor, first: int, size: torch.Size) -> SelfCut:
        made: SelfCut = torch.Tensor._make_wrapper_subclass(cls, size)  # type: ignore[attr-defined]
        made.local = local
        made.chunk = ChunkStorageMetadata(torch.Size([first, 0]), torch.Size(local.shape))
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise NotImplementedError(f"{func} on {cls.__name__}")

    def __create_write_items__(self, fqn: str, value: torch.Tensor) -> list[WriteItem]:
        data = TensorWriteData(self.chunk, TensorProperties.create_from_tensor(self.local), self.size())
        return [WriteItem(MetadataIndex(fqn, self.chunk.offsets), WriteItemType.SHARD, tensor_data=data)]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [self.chunk]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        return self.local


def tensors_that_cut_themselves(doors: Doors) -> None:
    """Uneven shards of a class of the user's own; loaded by it, and into a DTensor."""
    whole = torch.arange(13 * 2.0).view(13, 2)
    starts = (0, 1, 6, 8, 13)
    mine = whole[starts[RANK] : starts[RANK + 1]]
    doors.save({"w": SelfCut(mine.clone(), starts[RANK], whole.size())})
    target = SelfCut(torch.zeros_like(mine), starts[RANK], whole.size())
    doors.load({"w": target})
    assert torch.equal(target.local, mine)
    other = doors.load({"w": distribute_tensor(whole * 0, MESHES[4,], [Shard(0)])})
    assert_same(other["w"], whole)


class WithExtraState(torch.nn.Module):
    def __init__(self, scale: float, extra: int) -> None:
        super().__init__()
        cut, kept = torch.arange(4.0) * scale, torch.arange(4.0, 8.0) * scale
        self.cut = torch.nn.Parameter(distribute_tensor(cut, MESHES[4,], [Shard(0)]))
        self.kept = torch.nn.Parameter(distribute_tensor(kept, MESHES[4,], [Replicate()]))
        self.extra: State = {"number": extra, "tensor": torch.full((1,), scale)}

    def get_extra_state(self) -> State:
        return self.extra

    def set_extra_state(self, state: State) -> None:
        self.extra = state


def a_module_with_extra_state(doors: Doors) -> None:
    model = WithExtraState(1.0, 1)
    doors.save(dict(model.state_dict()))
    other = WithExtraState(10.0, 10)
    state = doors.load(dict(other.state_dict()))
    other.load_state_dict(state)
    assert other.extra == {"number": 1, "tensor": torch.ones(1)}
    assert_same(dict(other.state_dict()), dict(model.state_dict()))


def what_all_ranks_have_is_stored_once(doors: Doors) -> None:
    """Of replicas that differ, as random states do, one is taken for all."""
    doors.save({"w": torch.full((1000,), float(RANK)), "n": RANK})
    target = doors.load({"w": torch.zeros(1000), "n": None})
    taken = torch.tensor([float(target["n"]), float(target["w"][0])])
    assert (target["w"] == target["w"][0]).all()
    everywhere = [torch.zeros(2) for _ in range(4)]
    dist.all_gather(everywhere, taken)
    assert all(torch.equal(one, taken) for one in everywhere)
    sizes = sum(file.stat().st_size for file in (doors.folder / "one").iterdir())
    assert sizes < 2 * 4000 + 8000


def stock_code_makes_one_file_of_it(folder: Path) -> None:
    """Of what all ranks wrote, whichever way it is cut."""
    whole = torch.arange(5 * 6.0).view(5, 6)
    ways = [(MESHES[4,], way) for way in ONE] + [(MESHES[2, 2], way) for way in TWO]
    state = {str(n): distribute_tensor(whole + n, mesh, way) for n, (mesh, way) in enumerate(ways)}
    Doors(folder, ours=True).save(state)
    dist.barrier()
    if RANK == 0:
        (folder / "whole").mkdir()
        consolidate_safetensors_files(str(folder / "one"), str(folder / "whole"), dict.fromkeys(state, 1))
        found = load_file(folder / "whole" / "model-00001-of-00001.safetensors")
        assert found.keys() == state.keys()
        assert all(torch.equal(found[name], whole + int(name)) for name in state)


CASES = (
    sharded_tensors_reshard,
    rows_become_columns,
    sharded_and_plain_change_places,
    placements_and_meshes_change,
    shards_are_uneven_or_empty,
    uneven_shards_in_one_dtensor,
    tensors_that_cut_themselves,
    a_module_with_extra_state,
    what_all_ranks_have_is_stored_once,
)
# Stock code writes one shard of a tensor to a file, and only tensors.
CASES_OF_SAFETENSORS = (
    placements_and_meshes_change,
    shards_are_uneven_or_empty,
    tensors_that_cut_themselves,
)
OWN_CASES = (stock_code_makes_one_file_of_it,)
