"""Ranks whose optimizers share some parameters and have others of their own, as experts and tied embeddings make them."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from dtruntime_torch import PerRank
from dtruntime_torch.checkpoint.info import CheckpointInfo
from dtruntime_torch.checkpoint.restore import load_fresh
from dtruntime_torch.errors import CheckpointMismatch, InvalidArgument
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


def test_a_rank_whose_optimizer_has_no_state_yet_saves_and_resumes_with_others_that_have() -> None:
    """A frozen stage, or an expert that had nothing to do."""
    backend = MemoryBackend()
    ranks, pairs = make_ranks(2, backend), [make(rank) for rank in (0, 1)]
    train(*pairs[1], seed=1)
    for parameter in pairs[1][0].get_submodule("shared").parameters():
        del pairs[1][1].state[parameter]
    save(ranks, pairs, 1)
    fresh = [make(rank) for rank in (0, 1)]
    load(ranks, fresh)
    assert not fresh[0][1].state
    assert len(fresh[1][1].state) == 2
    whole = load_fresh(backend, "model", 1, 0)
    assert isinstance(whole, dict) and whole["optimizer"]["state"].keys() == {
        "expert1.weight",
        "expert1.bias",
    }


def test_an_empty_dict_of_one_rank_takes_what_the_other_had_in_it() -> None:
    ranks = make_ranks(2, MemoryBackend())
    states: list[State] = [{"m": {}}, {"m": {"a": torch.ones(3)}}]
    results = together(*[partial(r.save, s, 1) for r, s in zip(ranks, states, strict=True)])
    assert all(isinstance(result, CheckpointInfo) for result in results), results
    fresh: list[State] = [{"m": {}}, {"m": {"a": torch.zeros(3)}}]
    results = together(*[partial(r.load, s) for r, s in zip(ranks, fresh, strict=True)])
    assert all(isinstance(result, CheckpointInfo) for result in results), results
    for state in fresh:
        assert isinstance(state["m"], dict) and torch.equal(state["m"]["a"], torch.ones(3))


def test_a_group_all_of_whose_parameters_are_here_in_other_groups_is_not_unexpected() -> None:
    backend = MemoryBackend()
    model = nn.ModuleDict({"shared": nn.Linear(2, 2)})
    two = [make(0), (model, torch.optim.AdamW(model.parameters(), lr=0.1))]
    for pair in two:
        train(*pair, seed=1)
    save(make_ranks(2, backend), two, 1)
    alone = make(0)
    load(make_ranks(1, backend), [alone])
    assert len(alone[1].state) == len(list(alone[0].parameters()))


def test_groups_without_parameters_are_matched_by_position() -> None:
    """A frozen backbone, split into what decays and what does not."""

    def make_split(*lrs: float) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Linear(2, 2)
        groups = [
            {"params": [], "lr": lrs[0]},
            {"params": list(model.parameters())},
            {"params": [], "lr": lrs[1]},
        ]
        return model, torch.optim.AdamW(groups, lr=0.1)

    ranks = make_ranks(1, MemoryBackend())
    save(ranks, [make_split(0.5, 0.7)], 1)
    fresh = make_split(9.0, 9.0)
    load(ranks, [fresh])
    assert [group["lr"] for group in fresh[1].param_groups] == [0.5, 0.1, 0.7]


def test_options_in_another_order_are_the_same_options() -> None:
    backend = MemoryBackend()

    def with_groups(rank: int, **options: float) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.ModuleDict({f"stage{rank}": nn.Linear(2, 2)})
        return model, torch.optim.SGD(
            [{"params": list(model.parameters()), **options}], lr=0.1, weight_decay=0.2
        )

    save(make_ranks(2, backend), [with_groups(0), with_groups(1, weight_decay=0.2)], 1)
    model = nn.ModuleDict({f"stage{rank}": nn.Linear(2, 2) for rank in (0, 1)})
    load(make_ranks(1, backend), [(model, torch.optim.SGD(model.parameters(), lr=9.0))])


@pytest.mark.parametrize("theirs", [0.1, 0.2])
def test_tensors_in_the_options_of_groups_that_become_one_must_be_equal(theirs: float) -> None:
    """As the learning rates of capturable optimizers."""
    backend = MemoryBackend()

    def stages(*numbers: int, lr: float) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.ModuleDict({f"stage{number}": nn.Linear(2, 2) for number in numbers})
        return model, torch.optim.SGD(model.parameters(), lr=torch.tensor(lr))

    save(make_ranks(2, backend), [stages(0, lr=0.1), stages(1, lr=theirs)], 1)
    alone, whole = make_ranks(1, backend)[0], stages(0, 1, lr=9.0)
    if theirs == 0.1:
        alone.load(state_of(whole))
        assert torch.equal(whole[1].param_groups[0]["lr"], torch.tensor(0.1))
    else:
        with pytest.raises(CheckpointMismatch, match="different values of 'lr'"):
            alone.load(state_of(whole))


class Keeper:
    """A stateful object with names of its rank."""

    def __init__(self, **state: object) -> None:
        self.state = state

    def state_dict(self) -> dict[str, object]:
        return self.state

    def load_state_dict(self, state: dict[str, object]) -> None:
        self.state = state


@pytest.mark.parametrize(
    "theirs", [{"own1": 1}, {"own1": torch.ones(2)}, {}], ids=["object", "tensor", "nothing"]
)
def test_a_stateful_object_that_has_other_names_on_other_ranks_is_refused(theirs: State) -> None:
    """Each would be given the names of all, and from the second save on those of other ranks would be stale."""
    ranks = make_ranks(2, MemoryBackend())
    states: list[State] = [{"k": Keeper(own0=0)}, {"k": Keeper(**theirs)}]
    results = together(*[partial(r.save, s, 1) for r, s in zip(ranks, states, strict=True)])
    assert all(
        isinstance(result, InvalidArgument) and "PerRank" in str(result) for result in results
    ), results


def test_a_stateful_object_of_each_rank_is_kept_with_per_rank() -> None:
    ranks = make_ranks(2, MemoryBackend())
    keepers = [Keeper(own0=0), Keeper(own1=1)]
    together(*[partial(r.save, {"k": PerRank(k)}, 1) for r, k in zip(ranks, keepers, strict=True)])
    fresh = [Keeper(), Keeper()]
    results = together(*[partial(r.load, {"k": PerRank(k)}) for r, k in zip(ranks, fresh, strict=True)])
    assert all(isinstance(result, CheckpointInfo) for result in results), results
    assert [keeper.state for keeper in fresh] == [{"own0": 0}, {"own1": 1}]
