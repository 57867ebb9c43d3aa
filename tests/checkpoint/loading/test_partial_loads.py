"""A part of a state is filled, and what one side lacks is named: `keys` and `strict=False`."""

from __future__ import annotations

import pytest
import torch

import dtruntime_torch as dt
from dtruntime_torch.errors import CheckpointMismatch, InvalidArgument
from dtruntime_torch.storage import MemoryBackend


def model(head: int = 3) -> torch.nn.Module:
    return torch.nn.ModuleDict({"body": torch.nn.Linear(4, 4), "head": torch.nn.Linear(4, head)})


def trained(net: torch.nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(net.parameters())
    sum(p.square().sum() for p in net.parameters()).backward()  # type: ignore[union-attr]
    optimizer.step()
    return optimizer


@pytest.fixture
def saved():
    """A manager that has saved a model, its optimizer and values."""
    net = model()
    state = {"model": net, "optimizer": trained(net), "epoch": 3, "extra": {"a": torch.ones(2), "b": [1, 2]}}
    with dt.CheckpointManager(MemoryBackend()) as manager:
        manager.save(state, 1)
        yield manager, net


def fresh(head: int = 3) -> dict[str, object]:
    net = model(head)
    return {
        "model": net,
        "optimizer": torch.optim.AdamW(net.parameters()),
        "epoch": 0,
        "extra": {"a": torch.zeros(2), "b": []},
    }


def same(left: torch.nn.Module, right: torch.nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left.parameters(), right.parameters(), strict=True))


def test_only_the_keys_are_filled(saved):
    manager, net = saved
    state = fresh()
    loaded = manager.load(state, keys=["model.body", "epoch"])
    assert same(state["model"]["body"], net["body"]) and not same(state["model"]["head"], net["head"])
    assert state["epoch"] == 3 and not state["extra"]["a"].any() and not state["optimizer"].state
    assert (loaded.missing_keys, loaded.unexpected_keys) == ([], [])


def test_a_key_is_a_whole_name(saved):
    manager, _ = saved
    with pytest.raises(CheckpointMismatch, match="model.bod: a key that names nothing"):
        manager.load(fresh(), keys=["model.bod"])


def test_a_key_that_only_the_checkpoint_has_is_unexpected(saved):
    manager, _ = saved
    state = fresh()
    del state["epoch"]
    with pytest.raises(CheckpointMismatch, match="epoch: in the checkpoint, not in the state"):
        manager.load(state, keys=["epoch"])
    assert manager.load(state, keys=["epoch"], strict=False).unexpected_keys == ["epoch"]


def test_an_optimizer_is_loaded_whole(saved):
    manager, _ = saved
    state = fresh()
    with pytest.raises(InvalidArgument, match="'optimizer' of type AdamW, which is loaded whole"):
        manager.load(state, keys=["optimizer.state"])
    manager.load(state, keys=["optimizer"])
    assert len(state["optimizer"].state) == 4


def test_a_new_head_is_named_and_left_as_it_is(saved):
    manager, net = saved
    state = {"model": torch.nn.ModuleDict({**model(), "new": torch.nn.Linear(2, 2)})}
    before = [p.clone() for p in state["model"]["new"].parameters()]
    loaded = manager.load(state, keys=["model"], strict=False)
    assert loaded.missing_keys == ["model.new.weight", "model.new.bias"]
    assert same(state["model"]["body"], net["body"])
    assert all(torch.equal(a, b) for a, b in zip(before, state["model"]["new"].parameters(), strict=True))


def test_names_are_those_that_torch_gives(saved):
    manager, net = saved
    other = torch.nn.ModuleDict({"body": torch.nn.Linear(4, 4), "neck": torch.nn.LayerNorm(2)})
    loaded = manager.load({"model": other}, keys=["model"], strict=False)
    theirs = other.load_state_dict(net.state_dict(), strict=False)
    assert sorted(loaded.missing_keys) == sorted(f"model.{key}" for key in theirs.missing_keys)
    assert sorted(loaded.unexpected_keys) == sorted(f"model.{key}" for key in theirs.unexpected_keys)


def test_shapes_that_differ_are_an_error_though_not_strict(saved):
    manager, _ = saved
    state = fresh(head=5)
    with pytest.raises(CheckpointMismatch, match="model.head.weight: checkpoint"):
        manager.load(state, keys=["model"], strict=False)
    manager.load(state, keys=["model.body"])


def test_an_optimizer_that_the_checkpoint_lacks_is_missing():
    net = model()
    with dt.CheckpointManager(MemoryBackend()) as manager:
        manager.save({"model": net}, 1)
        state = fresh()
        loaded = manager.load({"model": state["model"], "optimizer": state["optimizer"]}, strict=False)
    assert loaded.missing_keys == ["optimizer"] and same(state["model"], net)


def test_strict_changes_nothing_where_names_differ(saved):
    manager, _ = saved
    state = fresh()
    state["more"] = torch.zeros(1)
    with pytest.raises(CheckpointMismatch, match="more: in the state, not in the checkpoint"):
        manager.load(state)
    assert state["epoch"] == 0 and not state["optimizer"].state


@pytest.mark.parametrize("keys", ["model", [], [""], [3], 7])
def test_keys_that_are_no_names_are_refused(saved, keys):
    manager, _ = saved
    with pytest.raises(InvalidArgument, match="keys"):
        manager.load(fresh(), keys=keys)
    with pytest.raises(InvalidArgument, match="keys"):
        manager.load_checkpoint(keys=keys)


def test_a_part_is_read_as_a_fresh_state(saved):
    manager, net = saved
    part = manager.load_checkpoint(keys=["model.head", "extra"])
    assert part.keys() == {"model", "extra"} and part["model"].keys() == {"head.weight", "head.bias"}
    assert torch.equal(part["model"]["head.weight"], net["head"].weight)
    assert part["extra"]["b"] == [1, 2] and part["extra"]["a"].all()


def test_a_key_that_names_nothing_is_an_error_of_a_fresh_state(saved):
    manager, _ = saved
    with pytest.raises(CheckpointMismatch, match="head: nothing of that name is in the checkpoint"):
        manager.load_checkpoint(keys=["head", "model"])


def test_a_load_tells_of_the_checkpoint_that_was_saved(saved):
    manager, _ = saved
    assert manager.load(fresh()) == manager.latest()
    assert hash(manager.load(fresh())) == hash(manager.latest())
