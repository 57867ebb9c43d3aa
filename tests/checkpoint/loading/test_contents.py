"""Which part manifests a rank reads of a checkpoint: its own, and those of others only if it wants more than it saved."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from dtruntime_torch.checkpoint.info import CheckpointInfo
from dtruntime_torch.storage import MemoryBackend
from dtruntime_torch.testing.faulty_backend import FaultyBackend
from tests.checkpoint.thread_ranks import make_ranks, together

RANKS = 4
ROWS, COLUMNS = 0, 1
WHOLE = torch.arange(64.0).view(8, 8)


def cut(whole: torch.Tensor, dim: int, rank: int) -> DTensor:
    """What a rank holds of a tensor that all ranks share evenly."""
    # Ranks that are threads have no process group to learn their place from; a mesh is told it by these.
    mesh = DeviceMesh("cpu", torch.arange(RANKS), _init_backend=False, _rank=rank)
    local = whole.chunk(RANKS, dim)[rank].contiguous()
    return DTensor.from_local(
        local, mesh, [Shard(dim)], run_check=False, shape=whole.shape, stride=whole.stride()
    )


def ranks_read(backend: FaultyBackend) -> list[int]:
    """The ranks whose part manifests were read, in that order."""
    read = [path for operation, path in backend.calls if operation == "read"]
    return [int(part[1]) for path in read if (part := re.search(r"shard-(\d+)-of-\d+\.json$", path))]


@pytest.fixture
def saved() -> MemoryBackend:
    """A checkpoint of a tensor that was cut by rows."""
    backend = MemoryBackend()
    ranks = make_ranks(RANKS, backend)
    results = together(*[partial(one.save, {"w": cut(WHOLE, ROWS, n)}, 1) for n, one in enumerate(ranks)])
    assert all(isinstance(result, CheckpointInfo) for result in results), results
    return backend


def load(saved: MemoryBackend, dim: int) -> tuple[list[DTensor], list[FaultyBackend]]:
    """Loads into a tensor that is cut along `dim`; returns what each rank has then, and how each has read."""
    backends = [FaultyBackend(saved) for _ in range(RANKS)]
    tensors = [cut(torch.zeros_like(WHOLE), dim, rank) for rank in range(RANKS)]
    ranks = make_ranks(RANKS, backends)
    results = together(
        *[partial(one.load, {"w": tensor}) for one, tensor in zip(ranks, tensors, strict=True)]
    )
    assert all(isinstance(result, CheckpointInfo) for result in results), results
    return tensors, backends


def test_who_wants_what_it_saved_reads_no_other_part(saved):
    _, backends = load(saved, ROWS)
    assert [ranks_read(backend) for backend in backends] == [[rank] for rank in range(RANKS)]


def test_who_wants_another_cut_than_it_saved_reads_the_other_parts_as_well(saved):
    _, backends = load(saved, COLUMNS)
    assert [sorted(ranks_read(backend)) for backend in backends] == [list(range(RANKS))] * RANKS


@pytest.mark.parametrize("dim", [ROWS, COLUMNS], ids=["rows", "columns"])
def test_as_many_ranks_as_saved_get_their_shards_whatever_the_cut(saved, dim):
    tensors, _ = load(saved, dim)
    assert torch.equal(torch.cat([tensor.to_local() for tensor in tensors], dim), WHOLE)
