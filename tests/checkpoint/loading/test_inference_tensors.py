"""Tensors that were made under `torch.inference_mode()`: saved as any other, and filled only in that mode."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import dtruntime_torch as dt
from dtruntime_torch.errors import InvalidArgument


@pytest.fixture
def manager(tmp_path) -> Iterator[dt.CheckpointManager]:
    with dt.CheckpointManager(tmp_path) as manager:
        yield manager


def state_of(value: float) -> dict[str, Any]:
    """What a server has: a tensor made outside of the mode, and a model and a tensor made in it."""
    outside = torch.full((4,), value)
    with torch.inference_mode():
        model = torch.nn.Linear(3, 3, bias=False)
        model.weight.fill_(value)
        return {"outside": outside, "model": model, "inside": torch.full((2,), value)}


def values(state: dict[str, Any]) -> set[float]:
    tensors = (state["outside"], state["model"].weight, state["inside"])
    return {value for tensor in tensors for value in tensor.flatten().tolist()}


def test_they_are_saved(manager):
    manager.save(state_of(1.0), 1)
    assert torch.equal(manager.load_checkpoint()["inside"], torch.ones(2))


@pytest.mark.parametrize("all_or_nothing", [False, True])
@pytest.mark.parametrize(("kept", "named"), [("inside", "inside"), ("model", "model.weight")])
def test_outside_of_the_mode_they_are_refused_by_name(manager, kept, named, all_or_nothing):
    manager.save({kept: state_of(1.0)[kept]}, 1)
    with pytest.raises(InvalidArgument, match=f"{named}: it was made under torch.inference_mode"):
        manager.load({kept: state_of(2.0)[kept]}, all_or_nothing=all_or_nothing)


@pytest.mark.parametrize("all_or_nothing", [False, True])
def test_nothing_is_touched_when_one_is_refused(manager, all_or_nothing):
    manager.save(state_of(1.0), 1)
    state = state_of(2.0)
    with pytest.raises(InvalidArgument):
        manager.load(state, all_or_nothing=all_or_nothing)
    assert values(state) == {2.0}


@pytest.mark.parametrize("all_or_nothing", [False, True])
def test_in_the_mode_they_are_filled(manager, all_or_nothing):
    manager.save(state_of(1.0), 1)
    state = state_of(2.0)
    with torch.inference_mode():
        manager.load(state, all_or_nothing=all_or_nothing)
    assert values(state) == {1.0}


def test_in_the_mode_they_are_filled_also_where_a_loop_is_running(manager):
    manager.save(state_of(1.0), 1)
    state = state_of(2.0)

    async def load() -> None:
        with torch.inference_mode():
            manager.load(state)

    asyncio.run(load())
    assert values(state) == {1.0}


def test_what_keys_leave_out_may_be_an_inference_tensor(manager):
    manager.save(state_of(1.0), 1)
    state = state_of(2.0)
    manager.load(state, keys=["outside"])
    assert values(state) == {1.0, 2.0}


@pytest.mark.parametrize("all_or_nothing", [False, True])
def test_those_of_an_optimizer_are_replaced(manager, all_or_nothing):
    def trained(value: float) -> dict[str, Any]:
        model = torch.nn.Linear(1, 1, bias=False)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.5)
        with torch.inference_mode():
            optimizer.state[model.weight]["momentum_buffer"] = torch.full((1, 1), value)
        return {"model": model, "optimizer": optimizer}

    manager.save(trained(1.0), 1)
    state = trained(2.0)
    manager.load(state, all_or_nothing=all_or_nothing)
    (found,) = state["optimizer"].state.values()
    assert found["momentum_buffer"].item() == 1.0 and not found["momentum_buffer"].is_inference()
