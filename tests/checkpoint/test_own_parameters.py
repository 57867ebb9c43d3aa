"""Ranks whose optimizers share some parameters and have others of their own, as experts and tied embeddings make them."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from dtruntime_torch.checkpoint.info import CheckpointInfo
from dtruntime_torch.errors import CheckpointMismatch
from dtruntime_torch.storage import MemoryBackend
from tests.checkpoint.thread_ranks import Rank, make_ranks, together

State = dict[str, object]


def make(rank: int, lr: float = 0.1) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.ModuleDict({"shared": nn.Linear(2, 2), f"expert{rank}": nn.Linear(2, 2)})
    for parameter in model.get_submodule("shared").parameters():
        nn.init.ones_(parameter)  # alike on all ranks
    return model, torch.optim.AdamW(model.parameters(), lr=lr)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, float(seed + number))
    optimizer.step()


def state_of(pair: tuple[nn.Module, torch.optim.Optimizer]) -> State:
    return {"model": pair[0], "optimizer": pair[1]}


def save(ranks: list[Rank], pairs: list[tuple[nn.Module, torch.optim.Optimizer]], step: int) -> None:
    results = together(*[partial(r.save, state_of(p), step) for r, p in zip(ranks, pairs, strict=True)])
    assert all(isinstance(result, CheckpointInfo) for result in results), results


def load(ranks: list[Rank], pairs: list[tuple[nn.Module, torch.optim.Optimizer]]) -> None:
    results = together(*[partial(r.load, state_of(p)) for r, p in zip(ranks, pairs, strict=True)])
    assert all(isinstance(result, CheckpointInfo) for result in results), results


def check_equal(
    one: tuple[nn.Module, torch.optim.Optimizer], other: tuple[nn.Module, torch.optim.Optimizer]
) -> None:
    assert len(one[1].state) == len(other[1].state)
    for mine, its in zip(one[0].parameters(), other[0].parameters(), strict=True):
        assert torch.equal(mine, its)
        for key, value in other[1].state[its].items():
            assert torch.equal(one[1].state[mine][key], value), key


def test_what_a_rank_trains_alone_is_resumed_again_and_again() -> None:
    ranks = make_ranks(2, MemoryBackend())
    pairs = [make(rank) for rank in (0, 1)]
    for step in (1, 2, 3):
        for pair in pairs:
            train(*pair, seed=step)
        save(ranks, pairs, step)
        fresh = [make(rank) for rank in (0, 1)]
        load(ranks, fresh)
        for before, after in zip(pairs, fresh, strict=True):
            check_equal(after, before)
        pairs = fresh


def test_each_rank_gets_the_options_of_its_own_group() -> None:
    ranks = make_ranks(2, MemoryBackend())
    pairs = [make(0, lr=0.1), make(1, lr=0.2)]
    for pair in pairs:
        train(*pair, seed=1)
    save(ranks, pairs, 1)
    fresh = [make(rank, lr=9.0) for rank in (0, 1)]
    load(ranks, fresh)
    assert [optimizer.param_groups[0]["lr"] for _, optimizer in fresh] == [0.1, 0.2]


def test_the_state_of_parameters_that_nobody_has_is_unexpected() -> None:
    backend = MemoryBackend()
    ranks, pairs = make_ranks(2, backend), [make(rank) for rank in (0, 1)]
    for pair in pairs:
        train(*pair, seed=1)
    save(ranks, pairs, 1)
    alone, (model, optimizer) = make_ranks(1, backend)[0], make(0)
    with pytest.raises(
        CheckpointMismatch, match=r"optimizer\.state\.expert1\.weight\.exp_avg: in the checkpoint"
    ):
        alone.load(state_of((model, optimizer)))
    alone.load(state_of((model, optimizer)), strict=False)
    assert len(optimizer.state) == len(list(model.parameters()))
