"""What the ranks do in `test_loads.py`; each function is one scenario, run on every rank.

All of them hold the same whole tensors, cut in different ways, so that any can load what any other saved.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

import dtruntime_torch as dt
from dtruntime_torch.checkpoint.loading import node_memory, placement
from dtruntime_torch.checkpoint.state.local_shard import local_part
from dtruntime_torch.errors import BarrierTimeout
from dtruntime_torch.storage import LocalBackend
from tests.distributed.in_turn import GROUPS, MESHES, main
from tests.distributed.ownership import assert_same, gathered

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
CHUNK = 4096
SHAPES = {"wide": (37, 2001), "tall": (2001, 37), "cube": (12, 10, 64), "small": (7,), "scalar": ()}

State = dict[str, torch.Tensor]


class PartsNotingBackend(LocalBackend):
    """Notes of which ranks the part manifests were read."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.parts: set[int] = set()

    async def read(self, path: str):
        if found := re.search(r"/shard-(\d+)-of-\d+\.json$", path):
            self.parts.add(int(found[1]))
        return await super().read(path)


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


def cut(state: State, placements: Sequence[Placement], sizes: tuple[int, ...]) -> State:
    """The same on a mesh; what has too few dimensions is replicated."""

    def fits(tensor: torch.Tensor) -> list[Placement]:
        return [p if not isinstance(p, Shard) or p.dim < tensor.dim() else Replicate() for p in placements]

    return {name: distribute_tensor(tensor, MESHES[sizes], fits(tensor)) for name, tensor in state.items()}


def cut_as(kind: str, state: State, ranks: int) -> State:
    """rows: FSDP2. hybrid: HSDP. columns: tensor parallel. both: tensor parallel and FSDP2. plain: DDP."""
    if kind == "plain":
        return state
    if kind in ("rows", "columns"):
        return cut(state, [Shard(0 if kind == "rows" else 1)], (ranks,))
    first = Replicate() if kind == "hybrid" else Shard(1)
    return cut(state, [first, Shard(0)], (2, ranks // 2))


# How it is cut and by how many ranks it is saved, and who loads that.
LOADS: dict[tuple[str, int], list[tuple[str, int]]] = {
    ("rows", 4): [("rows", 4), ("columns", 4), ("rows", 2), ("rows", 3), ("columns", 2)],
    ("hybrid", 4): [("hybrid", 4), ("rows", 3), ("plain", 2)],
    ("both", 4): [("both", 4), ("columns", 3), ("rows", 1)],
    ("plain", 4): [("plain", 4), ("plain", 1), ("both", 2)],
    ("plain", 1): [("plain", 4), ("rows", 2)],
}


def save_and_load(saved: str, ranks: int, folder: Path) -> None:
    """Saves in one way and loads in every other."""
    if ranks > RANK:
        with dt.CheckpointManager(folder, chunk_bytes=CHUNK, process_group=GROUPS[ranks]) as manager:
            manager.save({"model": cut_as(saved, whole_state(), ranks)}, 1)
    dist.barrier()
    for kind, some in LOADS[saved, ranks]:
        if some > RANK:
            load(folder, kind, some)
        dist.barrier()


def load(folder: Path, kind: str, ranks: int) -> None:
    """Every bit comes back, straight into place and through memory that is shared; then no byte is read twice."""
    expected = cut_as(kind, whole_state(), ranks)
    state = cut_as(kind, {name: torch.zeros_like(t) for name, t in whole_state().items()}, ranks)
    with dt.CheckpointManager(folder, chunk_bytes=CHUNK, process_group=GROUPS[ranks]) as manager:
        manager.load({"model": state})
    check_same(state, expected)
    vars(placement)["JOIN_BYTES"] = 0  # else short gaps are read along, which may be what another rank wants
    backend = NotingBackend(folder)
    state = cut_as(kind, {name: torch.zeros_like(t) for name, t in whole_state().items()}, ranks)
    with dt.CheckpointManager(backend, chunk_bytes=CHUNK, process_group=GROUPS[ranks]) as manager:
        manager.load({"model": state})
    check_same(state, expected)
    (folder / f"read-{kind}-{ranks}-{RANK}").write_text(json.dumps(backend.ranges))
    dist.barrier(GROUPS[ranks])
    notes = [json.loads((folder / f"read-{kind}-{ranks}-{rank}").read_text()) for rank in range(ranks)]
    ranges = sorted(tuple(found) for note in notes for found in note)
    assert ranges and all(
        one[0] != other[0] or one[2] <= other[1] for one, other in itertools.pairwise(ranges)
    )
    assert no_memory_is_left(manager)


def check_same(state: State, expected: State) -> None:
    for name, tensor in state.items():
        mine, wanted = (local_part(t) for t in (tensor, expected[name]))
        assert torch.equal(mine, wanted), name


def make_fsdp(ranks: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(7)
    model = torch.nn.Sequential(torch.nn.Linear(16, 33), torch.nn.ReLU(), torch.nn.Linear(33, 5, bias=False))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=MESHES[ranks,])
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    torch.manual_seed(100 + RANK)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 16)).square().mean().backward()
        optimizer.step()


def fsdp_round_trip(folder: Path) -> None:
    """Two ranks save; they, three and one load it."""
    if RANK < 2:
        model, optimizer = make_fsdp(2)
        train(model, optimizer, 2)
        before = gathered(model, optimizer)
        with dt.CheckpointManager(folder, process_group=GROUPS[2]) as manager:
            manager.save({"model": model, "optimizer": optimizer}, 2)
        if RANK == 0:
            torch.save(before, folder / "expected.pt")
    for ranks in (2, 3, 1):
        fsdp_load(folder, ranks)


def fsdp_reads_few_parts(folder: Path) -> None:
    """A rank that loads as it saved reads its own part, and that of who writes what is replicated, or empty here."""
    model, optimizer = make_fsdp(4)
    train(model, optimizer, 1)
    backend = PartsNotingBackend(folder)
    with dt.CheckpointManager(backend) as manager:
        manager.save({"model": model, "optimizer": optimizer, "epoch": 3}, 1)
        before = gathered(model, optimizer)
        fresh, its_optimizer = make_fsdp(4)
        manager.load({"model": fresh, "optimizer": its_optimizer, "epoch": 0})
    assert backend.parts == {RANK, 0}
    assert_same(gathered(fresh, its_optimizer), before)


def fsdp_deltas(folder: Path) -> None:
    """A layer is frozen after the first save: the others write what the rest of the model became."""
    if RANK < 2:
        model, optimizer = make_fsdp(2)
        train(model, optimizer, 2)
        state = {"model": model, "optimizer": optimizer}
        policy = dt.DeltaPolicy(max_changed=1.0)
        with dt.CheckpointManager(folder, delta=policy, keep_last_n=2, process_group=GROUPS[2]) as manager:
            full = manager.save(state, 2)
            model.get_submodule("0").requires_grad_(False)
            for step in (3, 4, 5):
                train(model, optimizer, 1)
                info = manager.save(state, step)
                assert full.full and not info.full and 0 < info.written < full.nbytes / 2, info
        before = gathered(model, optimizer)
        if RANK == 0:
            torch.save(before, folder / "expected.pt")
    for ranks in (3, 1):
        fsdp_load(folder, ranks)


def fsdp_load(folder: Path, ranks: int) -> None:
    dist.barrier()
    if ranks <= RANK:
        return
    model, optimizer = make_fsdp(ranks)
    with dt.CheckpointManager(folder, process_group=GROUPS[ranks]) as manager:
        manager.load({"model": model, "optimizer": optimizer})
    assert_same(gathered(model, optimizer), torch.load(folder / "expected.pt", weights_only=True))


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


SCENARIOS: dict[str, Callable[[Path], None]] = {
    **{f"{saved}_by_{ranks}": partial(save_and_load, saved, ranks) for saved, ranks in LOADS},
    "fsdp_round_trip": fsdp_round_trip,
    "fsdp_reads_few_parts": fsdp_reads_few_parts,
    "fsdp_deltas": fsdp_deltas,
    "parts_of_the_state": parts_of_the_state,
}


if __name__ == "__main__":
    main({**SCENARIOS, "dies_while_sharing": dies_while_sharing})
