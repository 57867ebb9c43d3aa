"""Optimizers restored into fresh ones, for every optimizer of torch that runs on the CPU."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from dtruntime_torch.checkpoint import objects
from dtruntime_torch.checkpoint.flatten import PerRank, flatten_state
from dtruntime_torch.checkpoint.loading.targets import bind_targets
from dtruntime_torch.checkpoint.state.optimizer_groups import scalar_device
from dtruntime_torch.errors import CorruptCheckpoint
from tests.checkpoint.memory_checkpoint import checkpoint_of, differences, exact, load, same_bits, save
from tests.checkpoint.optimizers import OPTIMIZERS, make_model, train


def optimizer_state(optimizer: torch.optim.Optimizer) -> object:
    return exact(optimizer.state_dict())


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("used", [False, True], ids=["into a fresh one", "into a used one"])
def test_a_restored_optimizer_goes_on_bit_for_bit(kind, used):
    model = make_model(kind)
    optimizer = OPTIMIZERS[kind](model)
    train(model, optimizer, 3)
    checkpoint = save({"model": model, "optimizer": optimizer})
    at_save = optimizer_state(optimizer)
    checkpoint.tensors = {fqn: tensor.clone() for fqn, tensor in checkpoint.tensors.items()}
    train(model, optimizer, 3, seed=1)

    other = make_model(kind)
    restored = OPTIMIZERS[kind](other)
    if used:
        train(other, restored, 2, seed=2)
    load(checkpoint, {"model": other, "optimizer": restored})
    assert optimizer_state(restored) == at_save
    train(other, restored, 3, seed=1)
    assert optimizer_state(restored) == optimizer_state(optimizer)
    assert exact(dict(other.state_dict())) == exact(dict(model.state_dict()))


def adam(**options: object) -> dict[str, Any]:
    model = make_model("Adam")
    return {"model": model, "optimizer": torch.optim.Adam(model.parameters(), **options)}


def trained(state: dict[str, Any], steps: int = 2) -> dict[str, Any]:
    train(state["model"], state["optimizer"], steps)
    return state


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
def test_the_dtype_of_state_is_never_cast(used):
    state = trained(adam())
    optimizer = state["optimizer"]
    for entry in optimizer.state.values():
        entry["exp_avg"] = entry["exp_avg"].double()
    target = trained(adam(), steps=1) if used else adam()
    load(save(state), target)
    assert optimizer_state(target["optimizer"]) == optimizer_state(optimizer)


def test_bf16_parameters_keep_their_fp32_state():
    def make():
        model = torch.nn.Linear(3, 3).to(torch.bfloat16)
        optimizer = torch.optim.SGD(model.parameters())
        return model.weight, optimizer, {"m": model, "o": optimizer}

    weight, optimizer, state = make()
    optimizer.state[weight]["master"] = torch.randn(3, 3)
    other, restored, fresh = make()
    load(save(state), fresh)
    assert same_bits(restored.state[other]["master"], optimizer.state[weight]["master"])


def test_what_fits_is_filled_in_place():
    state, used = trained(adam()), trained(adam(), steps=5)
    entries = [dict(entry) for entry in used["optimizer"].state.values()]
    load(save(state), used)
    after = list(used["optimizer"].state.values())
    assert all(
        entry[key] is tensor
        for entry, before in zip(after, entries, strict=True)
        for key, tensor in before.items()
    )


def test_state_that_shares_memory_is_not_filled_twice():
    model, other = torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False)
    optimizer, restored = torch.optim.SGD(model.parameters()), torch.optim.SGD(other.parameters())
    optimizer.state[model.weight].update(
        a=torch.full((2, 2), 1.0), b=torch.full((2, 2), 2.0), c=torch.full((2, 2), 3.0)
    )
    shared = torch.zeros(2, 2)
    restored.state[other.weight].update(a=shared, b=shared, c=other.weight.detach())
    load(save({"m": model, "o": optimizer}), {"m": other, "o": restored})
    assert exact(restored.state_dict()) == exact(optimizer.state_dict())
    assert torch.equal(other.weight, model.weight)


def test_a_parameter_without_saved_state_loses_its_own():
    state, used = adam(), trained(adam())
    model, optimizer = state["model"], state["optimizer"]
    model[0].bias.grad = torch.ones_like(model[0].bias)
    optimizer.step()
    load(save(state), used)
    assert list(used["optimizer"].state) == [used["model"][0].bias]


def test_an_optimizer_saved_fresh_is_fresh_again():
    used = trained(adam())
    load(save(adam()), used)
    assert not used["optimizer"].state


def test_new_state_has_the_strides_of_its_parameter():
    def make() -> dict[str, Any]:
        model = torch.nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
        return {"m": model, "o": torch.optim.Adam(model.parameters())}

    state, fresh = make(), make()
    for parameter in state["m"].parameters():
        parameter.grad = torch.ones_like(parameter)
    state["o"].step()
    load(save(state), fresh)
    weight = fresh["m"].weight
    assert fresh["o"].state[weight]["exp_avg"].stride() == weight.stride() != (12, 4, 2, 1)


def test_groups_stay_the_dicts_that_schedulers_hold():
    state, fresh = adam(lr=0.5), adam(lr=0.1)
    group = fresh["optimizer"].param_groups[0]
    load(save(state), fresh)
    assert fresh["optimizer"].param_groups[0] is group
    assert group["lr"] == 0.5
    assert group["params"] == list(fresh["model"].parameters())


@pytest.mark.parametrize("saved", [torch.tensor(0.5), 0.5])
def test_a_tensor_lr_is_filled_in_place(saved):
    lr = torch.tensor(0.1)
    state, fresh = adam(lr=saved, foreach=False), adam(lr=lr, foreach=False)
    load(save(state), fresh)
    assert fresh["optimizer"].param_groups[0]["lr"] is lr
    assert lr == 0.5


def test_a_saved_tensor_lr_replaces_a_number():
    fresh = adam(lr=0.1, foreach=False)
    load(save(adam(lr=torch.tensor(0.5), foreach=False)), fresh)
    assert same_bits(fresh["optimizer"].param_groups[0]["lr"], torch.tensor(0.5))


def test_tensor_betas_are_filled_in_place():
    def make(value: float) -> dict[str, Any]:
        return adam(
            betas=(torch.tensor(value), torch.tensor(value)),
            lr=torch.tensor(0.1),
            foreach=False,
            capturable=True,
        )

    try:
        state, fresh = make(0.5), make(0.9)
    except (ValueError, RuntimeError):
        pytest.skip("this torch takes no tensor betas on the CPU")
    betas = fresh["optimizer"].param_groups[0]["betas"]
    load(save(state), fresh)
    after = fresh["optimizer"].param_groups[0]["betas"]
    assert type(after) is tuple
    assert all(a is b and a == 0.5 for a, b in zip(after, betas, strict=True))


def test_options_that_were_not_saved_stay():
    state, fresh = adam(), adam()
    fresh["optimizer"].param_groups[0]["mine"] = 7
    state["optimizer"].param_groups[0]["theirs"] = {"a": [1]}
    load(save(state), fresh)
    group = fresh["optimizer"].param_groups[0]
    assert (group["mine"], group["theirs"]) == (7, {"a": [1]})


def test_no_step_is_taken_and_no_hook_called():
    state, fresh = trained(adam()), adam()
    called: list[object] = []
    fresh["optimizer"].register_step_pre_hook(lambda *a: called.append(a))
    load(save(state), fresh)
    assert not called
    assert all(p.grad is None for p in fresh["model"].parameters())


def test_parameters_are_matched_by_name():
    state = trained(adam())
    model = make_model("Adam")
    optimizer = torch.optim.Adam(list(model.parameters())[::-1])
    load(save(state), {"model": model, "optimizer": optimizer})
    saved = state["optimizer"].state
    for ours, theirs in zip(model.parameters(), state["model"].parameters(), strict=True):
        assert exact(dict(optimizer.state[ours])) == exact(dict(saved[theirs]))


def grouped(*members: str, lrs: tuple[float, ...] = (0.1, 0.2)) -> dict[str, Any]:
    """A model of layers a, b, c, ... whose optimizer has a group for each string of names."""
    model = torch.nn.ModuleDict(
        {name: torch.nn.Linear(1, 1, bias=False) for name in sorted("".join(members))}
    )
    groups = [
        {"params": [model[name].weight for name in group], "lr": lr}
        for group, lr in zip(members, lrs, strict=False)
    ]
    return {"m": model, "o": torch.optim.SGD(groups)}


def lrs(state: dict[str, Any]) -> list[float]:
    return [group["lr"] for group in state["o"].param_groups]


def test_groups_are_matched_by_their_parameters():
    fresh = grouped("cd", "ba", lrs=(1, 1))
    load(save(grouped("ab", "dc")), fresh)
    assert lrs(fresh) == [0.2, 0.1]


@pytest.mark.parametrize(
    ("saved", "own", "line"),
    [
        (("ab",), ("a", "b"), r"o.param_groups[0, 1]: their parameters [a.weight, b.weight] are in one group in the checkpoint"),
        (("a", "b"), ("ab",), "o.param_groups[0]: its parameters [a.weight, b.weight] are in groups of different options in the checkpoint"),
        (("a",), ("a", "b"), "o.param_groups[1]: its parameters [b.weight] are in no group of the checkpoint"),
    ],
)  # fmt: skip
def test_groups_that_do_not_match_are_a_difference(saved, own, line):
    assert line in differences(save(grouped(*saved)), grouped(*own))


def test_parameters_that_the_optimizer_lacks_are_a_difference():
    lines = differences(save(grouped("ab", "c")), grouped("ab"))
    assert "o.param_groups.c.weight: in the checkpoint, not in the state" in lines


def test_a_group_without_parameters_is_matched_by_its_place():
    saved, fresh = grouped("ab", "", lrs=(0.1, 0.7)), grouped("ab", "", lrs=(1, 1))
    load(save(saved), fresh)
    assert lrs(fresh) == [0.1, 0.7]


def stages(*members: str, lr: float = 0.1) -> list[dict[str, Any]]:
    states = [grouped(names, lrs=(lr,)) for names in members]
    for state in states:
        for parameter in state["m"].parameters():
            state["o"].state[parameter]["n"] = torch.randn(1, 1)
    return states


@pytest.mark.parametrize("own", [("ab", "cd"), ("abcd",), ("a", "bcd"), ("a", "b", "c", "d")], ids="-".join)
def test_pipeline_stages_may_be_cut_anew(own):
    saved = stages("ab", "cd")
    checkpoint = checkpoint_of(*(flatten_state(state, r) for r, state in enumerate(saved)))
    fresh = stages(*own, lr=1)
    unexpected = []
    for state in fresh:
        targets = bind_targets(state)
        wanted = targets.want(checkpoint.saved)
        assert not wanted.differences
        unexpected.append(set(wanted.unexpected))
        targets.apply(*checkpoint.read(wanted))
    assert not set.intersection(*unexpected)
    assert all(lrs(state) == [0.1] for state in fresh)
    assert all(set(state["o"].state) == set(state["m"].parameters()) for state in fresh)
    entries = {
        name: state["o"].state[layer.weight]["n"]
        for state in saved + fresh
        for name, layer in state["m"].items()
    }
    expected = {n: s["o"].state[m.weight]["n"] for s in saved for n, m in s["m"].items()}
    assert all(torch.equal(entries[name], tensor) for name, tensor in expected.items())


def test_experts_beside_shared_parameters():
    saved, fresh = stages("sa", "sb"), stages("sa", "sb", lr=1)
    checkpoint = checkpoint_of(*(flatten_state(state, r) for r, state in enumerate(saved)))
    targets = bind_targets(fresh[1])
    wanted = targets.want(checkpoint.saved)
    assert not wanted.differences
    targets.apply(*checkpoint.read(wanted))
    assert lrs(fresh[1]) == [0.1]
    b = saved[1]["m"]["b"].weight, fresh[1]["m"]["b"].weight
    assert torch.equal(saved[1]["o"].state[b[0]]["n"], fresh[1]["o"].state[b[1]]["n"])


def test_a_missing_optimizer_is_a_difference():
    state = adam()
    assert differences(save({"model": state["model"]}), state) == [
        "optimizer: in the state, not in the checkpoint"
    ]
    assert not differences(
        save({"model": state["model"]}), {**state, "optimizer": PerRank(state["optimizer"])}
    )


def test_comparing_changes_nothing():
    state, used = trained(adam(lr=0.7)), trained(adam(), steps=1)
    before = exact(copy.deepcopy(used["optimizer"].state_dict()))
    differences(save(state), used)
    assert exact(used["optimizer"].state_dict()) == before


@pytest.mark.parametrize(
    ("options", "device"),
    [({}, "cpu"), ({"fused": True}, "meta"), ({"capturable": True}, "meta"), ({"fused": None}, "cpu")],
)
def test_step_counts_lie_where_the_step_is_computed(options, device):
    # The parameter of a GPU: a device that is not the host.
    assert scalar_device(options, torch.empty(1, device="meta")).type == device


def test_state_beside_that_of_parameters_comes_back():
    state, fresh = grouped("a"), grouped("a")
    state["o"].state["global"] = {"n": 3, "t": torch.ones(2)}
    load(save(state), fresh)
    assert exact(fresh["o"].state["global"]) == exact({"n": 3, "t": torch.ones(2)})


def test_several_optimizers():
    model = make_model("SGD")

    def state() -> dict[str, Any]:
        return {
            "m": model,
            "a": torch.optim.SGD(model[0].parameters(), lr=0.3),
            "deep": {"b": torch.optim.SGD(model[3].parameters(), lr=0.4)},
        }

    fresh = state()
    fresh["a"].param_groups[0]["lr"] = fresh["deep"]["b"].param_groups[0]["lr"] = 0
    load(save(state()), fresh)
    assert fresh["a"].param_groups[0]["lr"] == 0.3
    assert fresh["deep"]["b"].param_groups[0]["lr"] == 0.4


@pytest.mark.parametrize("value", [3, {"lr": 0.1}, {"params": 3}])
def test_what_is_no_group_is_corrupt(value):
    saved = save(grouped("a")).saved
    fqn = "o.param_groups.a.weight"
    saved.objects[fqn] = replace(saved.objects[fqn], value=objects.encode(value, fqn))
    with pytest.raises(CorruptCheckpoint, match=r"^o\.param_groups\.a\.weight: .*no parameter group"):
        bind_targets(grouped("a")).want(saved)
