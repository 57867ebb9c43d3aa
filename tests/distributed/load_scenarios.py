"""What the ranks do in `test_loads.py`; each function is one scenario, run on every rank.

All of them hold the same whole tensors, cut in different ways, so that any can load what any other saved.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

import dtruntime_torch as dt
from dtruntime_torch.checkpoint.loading import node_memory, placement
from dtruntime_torch.checkpoint.state.local_shard import local_part
from dtruntime_torch.errors import BarrierTimeout
from dtruntime_torch.storage import LocalBackend

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
CHUNK = 4096
SHAPES = {"wide": (37, 2001), "tall": (2001, 37), "cube": (12, 10, 64), "small": (7,), "scalar": ()}

State = dict[str, torch.Tensor]


class NotingBackend(LocalBackend):
    """Notes which bytes of data files were asked for."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.ranges: list[tuple[str, int, int]] = []

    # As other storage: read once per node, into memory that its ranks share.
    read_chunks = None  # type: ignore[assignment]

    async def read_range(self, path: str, offset: int, length: int, *, into: memoryview | None = None):
        self.ranges.append((path, offset, offset + length))
        return await super().read_range(path, offset, length, into=into)


def no_memory_is_left(manager: dt.CheckpointManager) -> bool:
    mine = f"dtruntime-{manager._members.run_id}"
    return not any(name.startswith(mine) for name in os.listdir("/dev/shm"))


def whole_state() -> State:
    """What is saved, whole."""
    generator = torch.Generator().manual_seed(5)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def cut(state: State, placements: Sequence[Placement], sizes: Sequence[int]) -> State:
    """The same on a mesh; what has too few dimensions is replicated."""
    mesh = init_device_mesh("cpu", tuple(sizes))

    def fits(tensor: torch.Tensor) -> list[Placement]:
        return [p if not isinstance(p, Shard) or p.dim < tensor.dim() else Replicate() for p in placements]

    return {name: distribute_tensor(tensor, mesh, fits(tensor)) for name, tensor in state.items()}


def cut_as(kind: str, state: State) -> State:
    """rows: FSDP2. hybrid: HSDP. columns: tensor parallel. both: tensor parallel and FSDP2. plain: DDP."""
    if kind == "plain":
        return state
    if kind in ("rows", "columns"):
        return cut(state, [Shard(0 if kind == "rows" else 1)], [WORLD])
    first = Replicate() if kind == "hybrid" else Shard(1)
    return cut(state, [first, Shard(0)], [2, WORLD // 2])


def save(folder: Path, kind: str) -> None:
    with dt.CheckpointManager(folder, chunk_bytes=CHUNK) as manager:
        manager.save({"model": cut_as(kind, whole_state())}, 1)


def load(folder: Path, kind: str) -> None:
    """Every bit comes back, straight into place and through memory that is shared; then no byte is read twice."""
    expected = cut_as(kind, whole_state())
    state = cut_as(kind, {name: torch.zeros_like(t) for name, t in whole_state().items()})
    with dt.CheckpointManager(folder, chunk_bytes=CHUNK) as manager:
        manager.load({"model": state})
    check_same(state, expected)
    vars(placement)["JOIN_BYTES"] = 0  # else short gaps are read along, which may be what another rank wants
    backend = NotingBackend(folder)
    state = cut_as(kind, {name: torch.zeros_like(t) for name, t in whole_state().items()})
    with dt.CheckpointManager(backend, chunk_bytes=CHUNK) as manager:
        manager.load({"model": state})
    check_same(state, expected)
    (folder / f"read-{kind}-{WORLD}-{RANK}").write_text(json.dumps(backend.ranges))
    dist.barrier()
    notes = [json.loads((folder / f"read-{kind}-{WORLD}-{rank}").read_text()) for rank in range(WORLD)]
    ranges = sorted(tuple(found) for note in notes for found in note)
    assert ranges and all(
        one[0] != other[0] or one[2] <= other[1] for one, other in itertools.pairwise(ranges)
    )
    assert no_memory_is_left(manager)


def check_same(state: State, expected: State) -> None:
    for name, tensor in state.items():
        mine, wanted = (local_part(t) for t in (tensor, expected[name]))
        assert torch.equal(mine, wanted), name


def dies_while_sharing(folder: Path) -> None:
    """Rank 1 dies when it has made its shared memory; the others name it, and nothing stays behind."""
    with dt.CheckpointManager(NotingBackend(folder / "ckpt"), timeout=5) as manager:
        manager.save({"model": whole_state()}, 1)
        state = {name: torch.zeros_like(t) for name, t in whole_state().items()}
        if RANK == 1:
            node_memory._attach = lambda *_: os._exit(137)  # type: ignore[assignment]
        with pytest.raises(BarrierTimeout, match=r"\b1\b"):
            manager.load({"model": state})
        assert not any(tensor.any() for tensor in state.values())
        assert no_memory_is_left(manager)
    os._exit(0)  # the others cannot wait for the dead


def parts_of_the_state(folder: Path) -> None:
    """Keys and strict=False give the same names on all ranks, whichever of them lack what."""
    with dt.CheckpointManager(folder) as manager:
        manager.save({f"stage{RANK}": {"w": torch.ones(3)}, "shared": torch.ones(2), "old": 1}, 1)
        state: dict[str, Any] = {
            f"stage{RANK}": {"w": torch.zeros(3), f"new{RANK}": 7},
            "shared": torch.zeros(2),
        }
        loaded = manager.load(state, keys=["shared"])
        assert state["shared"].all() and not state[f"stage{RANK}"]["w"].any()
        assert (loaded.missing_keys, loaded.unexpected_keys) == ([], [])
        loaded = manager.load(state, strict=False)
        assert state[f"stage{RANK}"]["w"].all() and state[f"stage{RANK}"][f"new{RANK}"] == 7
        assert loaded.missing_keys == [f"stage{rank}.new{rank}" for rank in range(WORLD)]
        assert loaded.unexpected_keys == ["old"]
        with pytest.raises(dt.errors.CheckpointMismatch) as caught:
            manager.load(state)
        assert all(
            f"stage{r}.new{r}: in the state, not in the checkpoint (rank {r})" in str(caught.value)
            for r in range(WORLD)
        )


if __name__ == "__main__":
    dist.init_process_group(
        "gloo", init_method=os.environ.get("INIT_METHOD", "env://"), rank=RANK, world_size=WORLD
    )
    scenario, _, kind = sys.argv[1].partition(":")
    globals()[scenario](Path(sys.argv[2]), *([kind] if kind else []))
    dist.barrier()
    dist.destroy_process_group()
