"""Who writes what, on four ranks under torchrun: each function is run on every rank, one after the other."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.two_tensor import TwoTensor

import dtruntime_torch as dt
from dtruntime_torch.errors import SaveFailed
from dtruntime_torch.hook import _derive_seed
from dtruntime_torch.storage import LocalBackend
from dtruntime_torch.testing.faulty_backend import FaultyBackend, not_done
from tests.distributed.in_turn import GROUPS, MESHES, main

RANK, WORLD = int(os.environ.get("RANK", 0)), 4


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(
        left.detach().reshape(-1).view(torch.uint8), right.detach().reshape(-1).view(torch.uint8)
    )


def step_with(model: torch.nn.Module, optimizer: torch.optim.Optimizer, seed: int, idle: str = "-") -> None:
    """A step whose gradients depend on the names alone, so that replicas stay equal; the idle have none."""
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(seed + len(name) + sum(name.encode()))
        gradient = torch.randn(parameter.shape, generator=generator)
        parameter.grad = None if name.startswith(idle) else gradient
    optimizer.step()


def everything(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """All tensors of a model and its optimizer, by names."""
    found = {f"model.{key}": value.detach().clone() for key, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"optimizer.state.{name}.{key}"] = value.detach().clone()
    return found


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys(), actual.keys() ^ expected.keys()
    assert [key for key in expected if not same_bits(actual[key], expected[key])] == []


def writers(folder: Path, info: dt.CheckpointInfo) -> dict[str, list[int]]:
    """By whom each tensor was written."""
    found: dict[str, list[int]] = {}
    for rank in range(info.world_size):
        part = json.loads((folder / info.path / f"shard-{rank:05}-of-{info.world_size:05}.json").read_bytes())
        for tensor in part["tensors"]:
            found.setdefault(tensor["fqn"], []).append(rank)
    return found


def layers(*names: str) -> tuple[torch.nn.ModuleDict, torch.optim.Optimizer]:
    """Layers that are alike wherever they are made, each known by its name."""
    model = torch.nn.ModuleDict()
    for name in names:
        torch.manual_seed(sum(name.encode()))
        model[name] = torch.nn.Linear(5, 7)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def stages_hold_different_names(folder: Path) -> None:
    """Two stages on two ranks each; then cut anew, a layer for each rank."""
    model, optimizer = layers(*(["a", "b"] if RANK < 2 else ["c", "d"]))
    step_with(model, optimizer, 1)
    before = everything(model, optimizer)
    with dt.CheckpointManager(folder) as manager:
        info = manager.save({"model": model, "optimizer": optimizer}, 1)
        written = writers(folder, info)
        assert len(written) == 4 * 2 * 4 and all(len(ranks) == 1 for ranks in written.values())
        assert all(
            (ranks[0] < 2) == (name.split(".weight")[0].split(".bias")[0][-1] in "ab")
            for name, ranks in written.items()
        )
        assert set(Counter(ranks[0] for ranks in written.values())) == set(range(WORLD))
        fresh, restored = layers(*(["a", "b"] if RANK < 2 else ["c", "d"]))
        manager.load({"model": fresh, "optimizer": restored})
        assert_same(everything(fresh, restored), before)
        mine = "abcd"[RANK]
        alone, its_optimizer = layers(mine)
        manager.load({"model": alone, "optimizer": its_optimizer})
    if mine in model:
        expected = {key: value for key, value in before.items() if f".{mine}." in key}
        assert_same(everything(alone, its_optimizer), expected)


def experts_lie_on_one_rank_each_and_one_is_idle(folder: Path) -> None:
    """A trunk that all hold, an expert for each rank; that of rank 3 never saw a token, so it has no state."""
    model, optimizer = layers("trunk", f"expert{RANK}")
    step_with(model, optimizer, 1, idle="expert3")
    before = everything(model, optimizer)
    assert any("optimizer.state.expert" in key for key in before) == (RANK != 3)
    with dt.CheckpointManager(folder) as manager:
        info = manager.save({"model": model, "optimizer": optimizer}, 1)
        written = writers(folder, info)
        assert all(len(ranks) == 1 for ranks in written.values())
        assert all(
            ranks == [int(name.split("expert")[1][0])] for name, ranks in written.items() if "expert" in name
        )
        fresh, restored = layers("trunk", f"expert{RANK}")
        manager.load({"model": fresh, "optimizer": restored})
        assert_same(everything(fresh, restored), before)
        used, its_optimizer = layers("trunk", f"expert{RANK}")
        step_with(used, its_optimizer, 9)
        manager.load({"model": used, "optimizer": its_optimizer})
        assert_same(everything(used, its_optimizer), before)


def experts_move_to_other_ranks(folder: Path) -> None:
    model, optimizer = layers("trunk", f"expert{RANK}")
    step_with(model, optimizer, 1, idle="expert3")
    with dt.CheckpointManager(folder) as manager:
        manager.save({"model": model, "optimizer": optimizer}, 1)
        moved, its_optimizer = layers("trunk", f"expert{(RANK + 1) % WORLD}")
        manager.load({"model": moved, "optimizer": its_optimizer})
    expected, reference = layers("trunk", f"expert{(RANK + 1) % WORLD}")
    step_with(expected, reference, 1, idle="expert3")
    assert_same(everything(moved, its_optimizer), everything(expected, reference))


def what_only_some_ranks_hold_is_kept_from_the_lowest(folder: Path) -> None:
    state: dict[str, torch.Tensor] = {"all": torch.full((3,), float(RANK))}
    if RANK in (1, 3):
        state["odd"] = torch.full((4,), float(RANK))
    if RANK == 2:
        state["two"] = torch.full((2,), 2.0)
    with dt.CheckpointManager(folder) as manager:
        info = manager.save(state, 1)
        assert writers(folder, info) == {"all": [0], "odd": [1], "two": [2]}
        manager.load(state)
    assert (state["all"] == 0).all()
    assert RANK not in (1, 3) or (state["odd"] == 1).all()


def statistics_that_differ_are_those_of_rank_zero(folder: Path) -> None:
    """DDP sends the buffers of rank 0 around before a forward, not behind it: in between they differ."""
    torch.manual_seed(3)
    model = DistributedDataParallel(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)))
    torch.manual_seed(10 + RANK)
    model(torch.randn(8, 2)).sum().backward()
    mean = model.module[1].running_mean.clone()
    means = [torch.empty_like(mean) for _ in range(WORLD)]
    dist.all_gather(means, mean)
    assert not torch.equal(means[0], means[1])
    with dt.CheckpointManager(folder) as manager:
        manager.save({"model": model}, 1)
        manager.load({"model": model})
    assert same_bits(model.module[1].running_mean, means[0])


def what_is_per_rank_stays_with_its_rank_on_another_world_size(folder: Path) -> None:
    """Two ranks save; of the four that load, those who are new keep what they have. Then the other way round."""

    def state(offset: float) -> dict[str, Any]:
        own = {"t": torch.full((3,), RANK + offset), "n": RANK + offset, "set": {RANK, "x"}}
        return {"own": dt.PerRank(own), "common": offset}

    if RANK < 2:
        with dt.CheckpointManager(folder / "grown", process_group=GROUPS[2]) as manager:
            manager.save(state(10.0), 1)
    dist.barrier()
    target = state(70.0)
    with dt.CheckpointManager(folder / "grown") as manager:
        manager.load(target)
    expected = RANK + (10.0 if RANK < 2 else 70.0)
    assert (target["own"].value["t"] == expected).all()
    assert (target["own"].value["n"], target["common"]) == (expected, 10.0)

    with dt.CheckpointManager(folder / "shrunk") as manager:
        manager.save(state(10.0), 1)
    target = state(70.0)
    if RANK < 2:
        with dt.CheckpointManager(folder / "shrunk", process_group=GROUPS[2]) as manager:
            manager.load(target)
        assert (target["own"].value["n"], target["own"].value["set"]) == (RANK + 10.0, {RANK, "x"})
    dist.barrier()


def a_rank_that_is_new_derives_its_random_numbers(folder: Path) -> None:
    """From seed, step and rank: alike at each restore, and on no two ranks."""
    model, optimizer = layers("a")

    def restored() -> torch.Tensor:
        with dt.CheckpointManager(folder) as manager:
            hook = dt.CheckpointHook(manager, model=model, optimizer=optimizer, seed=5)
            assert hook.restore() == 6
        return torch.rand(4)

    if RANK < 2:
        with dt.CheckpointManager(folder, process_group=GROUPS[2]) as manager:
            hook = dt.CheckpointHook(manager, model=model, optimizer=optimizer, seed=5)
            torch.manual_seed(30 + RANK)
            hook.current_step = 6
            hook.save().result()
            drawn = torch.rand(4)
    else:
        drawn = torch.rand(4, generator=torch.Generator().manual_seed(_derive_seed(5, 6, RANK)))
    dist.barrier()
    torch.manual_seed(99)
    first, second = restored(), restored()
    assert torch.equal(first, drawn) and torch.equal(second, drawn)
    draws = [torch.empty(4) for _ in range(WORLD)]
    dist.all_gather(draws, drawn)
    assert len({tuple(one.tolist()) for one in draws}) == WORLD


def sharded(ranks: int, seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A model on the first ranks, cut unevenly by any number of them."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 7, bias=False)
    )
    for layer in (*model, model):
        fully_shard(layer, mesh=MESHES[ranks,])
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def gathered(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    found = everything(model, optimizer)
    return {
        key: value.full_tensor() if hasattr(value, "full_tensor") else value for key, value in found.items()
    }


def shards_go_from_four_ranks_to_two_to_three(folder: Path) -> None:
    model, optimizer = sharded(4, seed=1)
    torch.manual_seed(4)
    for _ in range(2):
        model(torch.randn(8, 6)).square().mean().backward()
        optimizer.step()
    expected = gathered(model, optimizer)
    with dt.CheckpointManager(folder) as manager:
        manager.save({"model": model, "optimizer": optimizer}, 1)
    for ranks, step in ((2, 2), (3, 3)):
        dist.barrier()
        if ranks > RANK:
            fresh, restored = sharded(ranks, seed=ranks)
            with dt.CheckpointManager(folder, process_group=GROUPS[ranks]) as manager:
                info = manager.load({"model": fresh, "optimizer": restored})
                assert (info.step, info.world_size) == (step - 1, 4 if ranks == 2 else 2)
                assert_same(gathered(fresh, restored), expected)
                manager.save({"model": fresh, "optimizer": restored}, step)
    dist.barrier()


def collectives_so_far() -> int:
    """How many there were in all process groups of this rank, by the numbers that their backends give them."""
    return sum(
        group._get_backend(torch.device("cpu"))._get_sequence_number_for_group()  # type: ignore[attr-defined]
        for group in dist.distributed_c10d._world.pg_map
        if dist.get_rank(group) >= 0
    )


@contextmanager
def without_collectives() -> Iterator[None]:
    """Lets those of torch.distributed raise, before they wait for other ranks; whatever else there is is counted."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a collective in a save")

    before = collectives_so_far()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_gather", "all_gather_object", "all_reduce", "all_to_all", "barrier", "broadcast", "gather",
                     "broadcast_object_list", "gather_object", "reduce", "scatter", "send", "recv"):  # fmt: skip
            patch.setattr(dist, name, refuse)
        yield
    assert collectives_so_far() == before


def no_save_has_a_collective(folder: Path) -> None:
    """Neither the first save of a structure nor a later one, sharded, replicated, per rank; full or delta."""
    model, optimizer = sharded(4, seed=1)
    model(torch.randn(8, 6)).square().mean().backward()
    optimizer.step()
    plain, its_optimizer = layers("trunk", f"expert{RANK}")
    step_with(plain, its_optimizer, 1)
    state: dict[str, Any] = {
        "model": model, "optimizer": optimizer, "plain": plain, "its": its_optimizer, "own": dt.PerRank(torch.ones(RANK)),
        "two": TwoTensor(torch.ones(3), torch.ones(3)), "set": {1, "a"},
    }  # fmt: skip
    for delta in (False, True):
        with dt.CheckpointManager(folder / str(delta), delta=delta) as manager, without_collectives():
            manager.prepare({"small": torch.ones(1)})
            for step in (1, 2):
                manager.save(state, step)
                plain.get_parameter("trunk.bias").data += 1
            manager.save({"small": torch.ones(1)}, 3)
    before = collectives_so_far()
    gathered(model, optimizer)
    assert collectives_so_far() > before


def wrapped_tensors_are_spread_and_loaded(folder: Path) -> None:
    def make(value: float) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        model = torch.nn.Module()
        for name in "abcd":
            parts = (torch.arange(6.0) + value, torch.arange(6.0) - value)
            model.register_parameter(name, torch.nn.Parameter(TwoTensor(*parts)))
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    model, optimizer = make(1.0)
    for parameter in model.parameters():
        parameter.grad = TwoTensor(torch.ones(6), torch.full((6,), 2.0))
    optimizer.step()
    with dt.CheckpointManager(folder) as manager:
        written = writers(folder, manager.save({"model": model, "optimizer": optimizer}, 1))
        assert len(written) == 4 * (2 + 1 + 4) and all(len(ranks) == 1 for ranks in written.values())
        assert len({ranks[0] for ranks in written.values()}) == WORLD
        fresh, restored = make(50.0)
        manager.load({"model": fresh, "optimizer": restored})
    for ours, theirs in zip(fresh.parameters(), model.parameters(), strict=True):
        pairs = [(ours.detach(), theirs.detach()), *((restored.state[ours][k], optimizer.state[theirs][k]) for k in ("exp_avg", "exp_avg_sq"))]  # fmt: skip
        assert all(same_bits(one.a, other.a) and same_bits(one.b, other.b) for one, other in pairs)


def a_failure_on_one_rank_is_raised_at_the_next_save_of_all(folder: Path) -> None:
    backend = FaultyBackend(LocalBackend(folder))
    if RANK == 1:
        backend.when("write", "*.safetensors", not_done())
    state = {f"own{RANK}": torch.ones(3)}
    with dt.CheckpointManager(backend, on_failure="raise") as manager:
        made = manager.age_of_last_good
        manager.save_async(state, 1)
        with pytest.raises(SaveFailed, match=r"rank 1"):
            manager.save_async(state, 2)
        assert manager.failed_saves == 1 and manager.age_of_last_good > made
        assert manager.save(state, 2).step == 2


SCENARIOS: dict[str, Callable[[Path], None]] = {
    scenario.__name__: scenario
    for scenario in (
        stages_hold_different_names,
        experts_lie_on_one_rank_each_and_one_is_idle,
        experts_move_to_other_ranks,
        what_only_some_ranks_hold_is_kept_from_the_lowest,
        statistics_that_differ_are_those_of_rank_zero,
        what_is_per_rank_stays_with_its_rank_on_another_world_size,
        a_rank_that_is_new_derives_its_random_numbers,
        shards_go_from_four_ranks_to_two_to_three,
        no_save_has_a_collective,
        wrapped_tensors_are_spread_and_loaded,
        a_failure_on_one_rank_is_raised_at_the_next_save_of_all,
    )
}


if __name__ == "__main__":
    main(SCENARIOS)
