"""What the ranks do in `test_late_saves.py`; each function is one scenario, run on every rank.

The copies of a save are as late as can be: what is large is read when a step asks for it, or at the end.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import dtruntime_torch as dt
from dtruntime_torch.checkpoint.state.local_shard import local_part
from dtruntime_torch.errors import SaveFailed, SaveSkipped
from dtruntime_torch.storage import LocalBackend
from dtruntime_torch.testing.faulty_backend import FaultyBackend, Stopped, not_done
from tests.checkpoint.late_jobs import LateJobs, late_copies
from tests.distributed.in_turn import GROUPS, MESHES, main
from tests.distributed.ownership import assert_same, everything

RANK = int(os.environ.get("RANK", 0))
SIZE = 256  # a quarter of a weight of so many rows and columns is large enough to be late

Optimizers = Sequence[torch.optim.Optimizer]
Made = tuple[torch.nn.Module, Optimizers]
Make = Callable[[int], Made]


def plain() -> torch.nn.Sequential:
    torch.manual_seed(7)
    return torch.nn.Sequential(torch.nn.Linear(SIZE, SIZE), torch.nn.Tanh(), torch.nn.Linear(SIZE, SIZE))


def fsdp(ranks: int, **how: bool) -> Made:
    model = plain()
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=MESHES.get((ranks,)))
    return model, [torch.optim.AdamW(model.parameters(), lr=0.01, **how)]


def ddp(ranks: int) -> Made:
    model = DistributedDataParallel(plain(), process_group=GROUPS[ranks])
    return model, [torch.optim.AdamW(model.parameters(), lr=0.01)]


def one_optimizer_each(ranks: int) -> Made:
    model, _ = fsdp(ranks)
    return model, [torch.optim.SGD([one], lr=0.1, momentum=0.9) for one in model.parameters()]


def backward(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(100 * seed + RANK)
    model(torch.randn(4, SIZE, generator=generator)).square().mean().backward()


def train(made: Made, seed: int) -> None:
    model, optimizers = made
    backward(model, seed)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def state_of(made: Made) -> dict[str, object]:
    model, optimizers = made
    return {"model": model, **{f"optimizer{i}": one for i, one in enumerate(optimizers)}}


def shards(made: Made) -> dict[str, torch.Tensor]:
    """What this rank holds of everything, as it is now."""
    model, optimizers = made
    found = {
        f"{i}.{key}": it for i, one in enumerate(optimizers) for key, it in everything(model, one).items()
    }
    return {key: local_part(tensor).clone() for key, tensor in found.items()}


@dataclass(frozen=True)
class Saving:
    """A save that is under way.

    Attributes:
        made: what is saved.
        at_the_call: what this rank held of it then.
        jobs: its copies.
    """

    made: Made
    at_the_call: dict[str, torch.Tensor]
    jobs: LateJobs


@contextmanager
def saving(make: Make, ranks: int, folder: Path) -> Iterator[Saving]:
    """What was begun ends with this, and a load then gives each rank what it held at the call, bit for bit."""
    with dt.CheckpointManager(folder, process_group=GROUPS[ranks]) as manager, late_copies() as jobs:
        made = make(ranks)
        train(made, 1)
        handle = manager.save_async(state_of(made), 1)
        at_the_call = shards(made)
        assert not handle.staged()
        yield Saving(made, at_the_call, jobs)
        assert not any(
            torch.equal(now, at_the_call[key]) for key, now in shards(made).items() if now.dim() == 2
        )
        jobs.release()
        handle.result(60)
        loaded = make(ranks)
        manager.load(state_of(loaded))
    assert_same(shards(loaded), at_the_call)


def a_step_waits(make: Make, late: Collection[int], ranks: int, folder: Path) -> None:
    """It asks for all that is late on this rank, of which there are so many tensors, and for nothing else."""
    if ranks > RANK:
        with saving(make, ranks, folder) as save:
            asked = len(save.jobs.asked)
            train(save.made, 2)
            assert len(save.jobs.asked) - asked in late
    dist.barrier()


def a_step_in_the_backward_pass_waits(ranks: int, folder: Path) -> None:
    """That of each large parameter for its own shard and momentum alone, that of a small one for nothing."""
    if ranks > RANK:
        with saving(one_optimizer_each, ranks, folder) as save:
            waited: list[list[int]] = []
            model, optimizers = save.made

            def step(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter) -> None:
                asked = len(save.jobs.asked)
                optimizer.step()
                waited.append(save.jobs.asked[asked:])
                parameter.grad = None

            for parameter, optimizer in zip(model.parameters(), optimizers, strict=True):
                parameter.register_post_accumulate_grad_hook(partial(step, optimizer))
            backward(model, 2)
            assert sorted(map(len, waited)) == [0, 0, 2, 2]
            assert len({number for numbers in waited for number in numbers}) == 4
    dist.barrier()


def a_rank_that_is_busy_skips_for_all(folder: Path) -> None:
    """What failed on rank 0 rank 1 still takes away, for its storage stands still: the others hear of it all the same."""
    backend, stopped = FaultyBackend(LocalBackend(folder)), Stopped()
    if RANK == 0:
        backend.when("write", "*/step-00000001/*", not_done())
    if RANK == 1:
        backend.when("delete", "*/step-00000001/*", stopped)
    state = {f"own{RANK}": torch.full((3,), float(RANK))}
    with dt.CheckpointManager(backend, on_busy="skip") as manager, ExitStack() as at_exit:
        at_exit.callback(stopped.release)
        first = manager.save_async(state, 1)
        if RANK == 1:
            assert stopped.reached.wait(60)
        else:
            with pytest.raises(SaveFailed, match="rank 0"):
                first.result(60)
        with pytest.raises(SaveSkipped, match="rank 1 was still saving step 1"):
            manager.save_async(state, 2).result(60)
        dist.barrier()
        if RANK == 1:
            assert not first.done()
            stopped.release()
            with pytest.raises(SaveFailed, match="rank 0"):
                first.result(60)
        dist.barrier()
        assert manager.save_async(state, 3).result(60).step == 3
        state[f"own{RANK}"].zero_()
        manager.load(state)
        assert (state[f"own{RANK}"] == RANK).all()


def all_skip_while_one_writes(folder: Path) -> None:
    """Nobody has time as long as the storage of one rank stands still; what was begun before is saved."""
    backend, stopped = FaultyBackend(LocalBackend(folder)), Stopped()
    if RANK == 1:
        backend.when("write", "*.safetensors", stopped)
    state = {f"own{RANK}": torch.ones(3)}
    with dt.CheckpointManager(backend, on_busy="skip") as manager, ExitStack() as at_exit:
        at_exit.callback(stopped.release)
        first = manager.save_async(state, 1)
        for step in (2, 3):
            with pytest.raises(SaveSkipped, match="was still saving step 1"):
                manager.save_async(state, step).result(60)
        dist.barrier()
        stopped.release()
        assert first.result(60).step == 1
        dist.barrier()
        assert manager.save_async(state, 4).result(60).step == 4
        assert [info.step for info in manager.list()] == [1, 4]


def dies_while_staging(folder: Path) -> None:
    """All ranks get SIGKILL behind the call of the second save, whose copies have not ended."""
    made = fsdp(dist.get_world_size())
    with dt.CheckpointManager(folder / "ckpt") as manager, late_copies() as jobs:
        train(made, 1)
        first = manager.save_async(state_of(made), 1)
        train(made, 2)
        jobs.release()
        first.result(60)
        jobs.released = False
        second = manager.save_async(state_of(made), 2)
        # Who dies keeps nobody waiting: the Store is a file.
        store = _get_default_store()
        store.set(f"called/{RANK}", "")
        store.wait([f"called/{rank}" for rank in range(dist.get_world_size())])
        assert not second.staged()
        os.kill(os.getpid(), signal.SIGKILL)


def goes_on_as_if_nobody_had_died(folder: Path) -> None:
    """From step 1, the only one that was committed, to where a run without saves is after four steps."""
    ranks = dist.get_world_size()
    straight, resumed = fsdp(ranks), fsdp(ranks)
    for step in range(1, 5):
        train(straight, step)
    with dt.CheckpointManager(folder / "ckpt") as manager:
        assert manager.load(state_of(resumed)).step == 1
        for step in range(2, 5):
            train(resumed, step)
            manager.save_async(state_of(resumed), step)
    assert_same(shards(resumed), shards(straight))
    with dt.CheckpointManager(folder / "ckpt") as manager:
        assert [info.step for info in manager.list()][-3:] == [2, 3, 4]
        assert all(manager.verify(step).ok for step in (2, 3, 4))


# Of three times two large tensors each rank copies its shards; of replicas what it writes.
WAITS: dict[str, tuple[Make, Collection[int]]] = {
    "foreach_on_shards": (partial(fsdp, foreach=True), {6}),
    "fused_on_shards": (partial(fsdp, fused=True), {6}),
    "on_replicas": (ddp, range(1, 7)),
}

SCENARIOS: dict[str, Callable[[Path], None]] = {
    **{
        f"{name}_of_{ranks}": partial(a_step_waits, make, late, ranks)
        for name, (make, late) in WAITS.items()
        for ranks in (1, 2, 4)
    },
    **{
        f"in_the_backward_pass_of_{ranks}": partial(a_step_in_the_backward_pass_waits, ranks)
        for ranks in (1, 2, 4)
    },
    "a_rank_that_is_busy_skips_for_all": a_rank_that_is_busy_skips_for_all,
    "all_skip_while_one_writes": all_skip_while_one_writes,
}


if __name__ == "__main__":
    alone = (dies_while_staging, goes_on_as_if_nobody_had_died)
    main({**SCENARIOS, **{one.__name__: one for one in alone}})
