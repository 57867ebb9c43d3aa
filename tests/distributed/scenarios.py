"""What the ranks do in the tests beside this file; each function is one scenario, run on every rank.

A scenario asserts on its own; `launch` makes a failed one a failed test.
"""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import dtruntime_torch as dt
from dtruntime_torch.errors import (
    BarrierTimeout,
    CheckpointMismatch,
    CommitConflict,
    LoadFailed,
    SaveFailed,
    UnsupportedType,
)
from dtruntime_torch.storage import LocalBackend
from dtruntime_torch.testing.faulty_backend import FaultyBackend, killed, lost_answer
from tests.distributed.in_turn import main

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(
        left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8)
    )


def make_model() -> torch.nn.Module:
    torch.manual_seed(7)
    return torch.nn.Sequential(torch.nn.Linear(16, 33), torch.nn.BatchNorm1d(33), torch.nn.Linear(33, 5))


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    torch.manual_seed(100 + RANK)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 16)).square().mean().backward()
        optimizer.step()


def snapshot(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    tensors = {f"model.{k}": v.clone() for k, v in model.state_dict().items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors.update({f"optimizer.{i}.{k}": v.clone() for k, v in state.items()})
    return tensors


def ddp_round_trip(folder: Path) -> None:
    model = DistributedDataParallel(make_model())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer, 3)
    before = snapshot(model, optimizer)
    with dt.CheckpointManager(folder) as manager:
        manager.save({"model": model, "optimizer": optimizer}, 3)
        fresh = DistributedDataParallel(make_model())
        fresh_optimizer = torch.optim.AdamW(fresh.parameters(), lr=0.01)
        assert manager.load({"model": fresh, "optimizer": fresh_optimizer}).world_size == WORLD
    after = snapshot(fresh, fresh_optimizer)
    assert before.keys() == after.keys()
    # Running statistics differ between ranks until DDP broadcasts them: rank 0's are the checkpoint's.
    shared = [key for key in before if "running" not in key or RANK == 0]
    assert all(same_bits(before[key], after[key]) for key in shared)


def load_into_ddp(folder: Path) -> None:
    """Loads what `ddp_round_trip` saved, on any number of ranks."""
    model = DistributedDataParallel(make_model())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with dt.CheckpointManager(folder) as manager:
        manager.load({"model": model, "optimizer": optimizer})
        whole = manager.load_checkpoint()
        assert isinstance(whole, dict)
        for key, tensor in model.module.state_dict().items():
            assert same_bits(tensor, whole["model"][key])
        manager.save({"model": model, "optimizer": optimizer}, 4)


def stages(folder: Path) -> None:
    """Ranks that hold different names."""
    state = {f"stage{RANK}": {"w": torch.full((100,), float(RANK))}, "shared": torch.arange(4)}
    with dt.CheckpointManager(folder) as manager:
        manager.save(state, 1)
        state[f"stage{RANK}"]["w"].zero_()  # type: ignore[index]
        manager.load(state)
        assert (state[f"stage{RANK}"]["w"] == RANK).all()  # type: ignore[index]
        whole = manager.load_checkpoint()
        assert isinstance(whole, dict)
        assert set(whole) == {"shared", *(f"stage{r}" for r in range(WORLD))}


def no_rank_has_a_place(folder: Path) -> None:
    with dt.CheckpointManager(folder) as manager:
        manager.save({f"stage{RANK}": torch.ones(2)}, 1)
        with pytest.raises(CheckpointMismatch, match="stage1"):
            manager.load({"stage0": torch.zeros(2)})


def damage_on_one_rank(folder: Path) -> None:
    """Only rank 1 reads the damaged bytes; nobody may take the newer step."""
    state = {f"stage{RANK}": torch.zeros(5000)}
    with dt.CheckpointManager(folder) as manager:
        for step in (1, 2):
            state[f"stage{RANK}"].fill_(step)
            path = folder / manager.save(state, step).path
        if RANK == 0:
            part = path / f"shard-00001-of-{WORLD:05d}.safetensors"
            data = bytearray(part.read_bytes())
            data[-1] ^= 1
            part.write_bytes(data)
        dist.barrier()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert manager.load(state).step == 1
        assert (state[f"stage{RANK}"] == 1).all()
        text = " ".join(str(warning.message) for warning in caught)
        assert ("shard-00001" in text and "stage1" in text) == (RANK == 0)


def missing_on_one_rank(folder: Path) -> None:
    state = {f"stage{RANK}": torch.zeros(50)}
    with dt.CheckpointManager(folder) as manager:
        for step in (1, 2):
            state[f"stage{RANK}"].fill_(step)
            path = folder / manager.save(state, step).path
        if RANK == 0:
            (path / f"shard-00001-of-{WORLD:05d}.safetensors").unlink()
        dist.barrier()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert manager.load(state).step == 1
        assert (state[f"stage{RANK}"] == 1).all()


def bad_value_on_one_rank(folder: Path) -> None:
    """Refused at the door on rank 1; the others learn it at once, in the first save and in a later one."""
    good: dict[str, object] = {"w": torch.ones(3), "note": "fine"}
    bad = {**good, "note": object()} if RANK == 1 else good
    with dt.CheckpointManager(folder) as manager:
        for step in (1, 2):
            if RANK == 1:
                with pytest.raises(UnsupportedType, match="note"):
                    manager.save(bad, step)
            else:
                with pytest.raises(SaveFailed, match="rank"):
                    manager.save(bad, step)
            assert manager.save(good, step).step == step


def leader_refuses(folder: Path) -> None:
    """A value that only rank 0 cannot store."""
    good: dict[str, object] = {"w": torch.ones(3), "note": "fine"}
    bad = {**good, "note": object()} if RANK == 0 else good
    with dt.CheckpointManager(folder) as manager:
        manager.save(good, 1)
        with pytest.raises(UnsupportedType if RANK == 0 else SaveFailed, match="note"):
            manager.save(bad, 2)
        assert manager.save(good, 2).step == 2


def structure_changes_on_one_rank(folder: Path) -> None:
    """The save fails at once on all ranks, and the next one is good."""
    with dt.CheckpointManager(folder) as manager:
        manager.save({"w": torch.ones(3)}, 1)
        state = {"w": torch.ones(3 + (RANK == 1)), f"only{RANK}": torch.ones(1)}
        if RANK == 1:
            with pytest.raises(SaveFailed, match="rank"):
                manager.save(state, 2)
        else:
            with pytest.raises(SaveFailed):
                manager.save({"w": torch.ones(3)}, 2)
        assert manager.save({"w": torch.ones(3)}, 3).step == 3


def conflict_at_the_door(folder: Path) -> None:
    with dt.CheckpointManager(folder) as manager:
        manager.save({"w": torch.ones(3)}, 5)
    with dt.CheckpointManager(folder) as manager:
        with pytest.raises(CommitConflict):
            manager.save({"w": torch.ones(3)}, 5)
        assert manager.save({"w": torch.ones(3)}, 6).generation == 2


def lost_answer_of_the_commit(folder: Path) -> None:
    backend = FaultyBackend(LocalBackend(folder))
    backend.when("create", "*/commits/*", lost_answer())
    with dt.CheckpointManager(backend) as manager:
        assert manager.save({"w": torch.ones(3)}, 1).step == 1
        assert manager.verify().ok


def dies_while_writing(folder: Path) -> None:
    """Rank 1 dies in its second save; the others name it and the first save stays."""
    backend = FaultyBackend(LocalBackend(folder / "ckpt"))
    with dt.CheckpointManager(backend, timeout=5) as manager:
        manager.save({f"stage{RANK}": torch.ones(3)}, 1)
        if RANK == 1:
            backend.when("write", "*.safetensors", killed())
        with pytest.raises(BarrierTimeout, match=r"\b1\b"):
            manager.save({f"stage{RANK}": torch.ones(3)}, 2)
        assert [info.step for info in manager.list()] == [1]
        assert not list((folder / "ckpt").glob(f"model/step-00000002/*/shard-0000{RANK}*"))
    os._exit(0)  # the others cannot wait for the dead


def hook_goes_on_bit_for_bit(folder: Path) -> None:
    """Two runs of four steps each equal one of eight, random numbers and workers included."""
    straight = run_hook(folder / "straight", stop=8)
    run_hook(folder / "broken", stop=5)
    resumed = run_hook(folder / "broken", stop=8)
    assert straight["draws"][4:] == resumed["draws"] and straight["samples"][4:] == resumed["samples"]
    assert all(same_bits(a, b) for a, b in zip(straight["weights"], resumed["weights"], strict=True))


def run_hook(folder: Path, stop: int) -> dict[str, list]:  # type: ignore[type-arg]
    dist.barrier()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(RANK)
    model = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
    torch.manual_seed(50 + RANK)
    model = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    data = torch.arange(48.0)
    sampler = dt.ElasticDistributedSampler(data, WORLD, RANK, seed=3)
    loader: DataLoader[torch.Tensor] = DataLoader(
        data, batch_size=12 // WORLD, sampler=sampler, num_workers=2
    )
    seen: dict[str, list] = {"draws": [], "samples": []}  # type: ignore[type-arg]
    with dt.CheckpointManager(folder) as manager:
        hook = dt.CheckpointHook(
            manager, model=model, optimizer=optimizer, scheduler=scheduler, sampler=sampler, every_n_steps=4
        )
        step = hook.restore()
        for epoch in range(sampler.epoch, 10):
            sampler.set_epoch(epoch)
            for batch in hook.track(loader):
                optimizer.zero_grad()
                model(batch[:, None]).square().mean().backward()
                optimizer.step()
                scheduler.step()
                seen["draws"].append((random.random(), np.random.rand(), torch.rand(()).item()))
                seen["samples"].append(batch.tolist())
                step += 1
                hook.step()
                if step == stop:
                    seen["weights"] = [p.detach().clone() for p in model.parameters()]
                    return seen
    raise AssertionError("the loop ended early")


def load_fails_on_one_rank(folder: Path) -> None:
    """A state whose own code fails on rank 1: every rank hears of it."""

    class Broken:
        def state_dict(self) -> dict[str, int]:
            return {"a": 1}

        def load_state_dict(self, state: object) -> None:
            if RANK == 1:
                raise ValueError("broken on purpose")

    with dt.CheckpointManager(folder) as manager:
        manager.save({"x": Broken()}, 1)
        with pytest.raises(LoadFailed, match="rank 1"):
            manager.load({"x": Broken()})


SCENARIOS: dict[str, Callable[[Path], None]] = {
    scenario.__name__: scenario
    for scenario in (
        ddp_round_trip,
        load_into_ddp,
        stages,
        no_rank_has_a_place,
        damage_on_one_rank,
        missing_on_one_rank,
        bad_value_on_one_rank,
        leader_refuses,
        structure_changes_on_one_rank,
        conflict_at_the_door,
        lost_answer_of_the_commit,
        load_fails_on_one_rank,
        hook_goes_on_bit_for_bit,
        dies_while_writing,
    )
}


if __name__ == "__main__":
    main(SCENARIOS)
