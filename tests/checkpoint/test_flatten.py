"""A state as specs, data and values."""

from __future__ import annotations

import re
from enum import IntEnum

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.optim import ZeroRedundancyOptimizer

from dtruntime_torch.checkpoint import objects
from dtruntime_torch.checkpoint.flatten import PerRank, flatten_state
from dtruntime_torch.checkpoint.specs import ObjectSpec, PathKey, TensorSpec
from dtruntime_torch.errors import InvalidArgument, UnsupportedType
from tests.checkpoint.optimizers import OPTIMIZERS, Make, make_model, train


def tensor_specs(state: object) -> dict[str, TensorSpec]:
    return {spec.fqn: spec for spec in flatten_state(state, 0).specs.tensors}


def test_a_tensor_leaf():
    tensor = torch.zeros(2, 3, dtype=torch.bfloat16)
    flat = flatten_state({"n": 1, "a": {"w": tensor}}, 0)
    assert flat.specs.tensors == (
        TensorSpec(
            fqn="a.w",
            path=(PathKey("dict", "a"), PathKey("dict", "w")),
            index=1,
            dtype="bfloat16",
            global_shape=(2, 3),
            offsets=(0, 0),
            shape=(2, 3),
        ),
    )
    assert flat.tensors["a.w"].data_ptr() == tensor.data_ptr()


def test_an_object_leaf():
    flat = flatten_state({"a": {"n": 1 << 80, "list": [1, (2, None)]}}, 0)
    assert flat.specs.objects == (
        ObjectSpec("a.n", (PathKey("dict", "a"), PathKey("dict", "n")), 0),
        ObjectSpec("a.list", (PathKey("dict", "a"), PathKey("dict", "list")), 1),
    )
    assert {fqn: objects.decode(value, fqn) for fqn, value in flat.values.items()} == {
        "a.n": 1 << 80,
        "a.list": [1, (2, None)],
    }


@pytest.mark.parametrize("data", [b"", b"abc"])
def test_bytes_are_a_tensor(data):
    flat = flatten_state({"b": data}, 0)
    (spec,) = flat.specs.tensors
    assert (spec.dtype, spec.global_shape, spec.shape, spec.is_bytes) == (
        "uint8",
        (len(data),),
        (len(data),),
        True,
    )
    assert flat.tensors["b"].numpy().tobytes() == data


def test_a_state_that_is_bytes():
    (spec,) = flatten_state(b"abc", 0).specs.tensors
    assert (spec.path, spec.is_bytes) == ((), True)


def test_the_same_bytes_twice_are_not_tied():
    data = b"abc"
    assert [spec.alias for spec in tensor_specs({"a": data, "b": data}).values()] == [None, None]


class Factored(torch.optim.SGD):
    """Keeps numbers and lists beside tensors, as Adafactor and its likes do."""

    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            state["step"] = state.get("step", 0) + 1
            state["rms"] = 0.5
            state["row"] = torch.ones(parameter.shape[:1])
            state["history"] = [torch.ones(2), {"t": torch.zeros(1), "n": 3}]


MORE_OPTIMIZERS: dict[str, Make] = {
    "Factored": lambda m: Factored(m.parameters()),
    "with a frozen parameter": lambda m: torch.optim.AdamW([m[0].bias.requires_grad_(False), m[3].weight]),  # type: ignore[index]
    "without a frozen parameter": lambda m: torch.optim.AdamW([m[3].weight]),  # type: ignore[index]
}


@pytest.mark.parametrize("kind", [*OPTIMIZERS, *MORE_OPTIMIZERS])
def test_a_state_has_the_names_of_dcp(kind):
    model = make_model(kind)
    optimizer = {**OPTIMIZERS, **MORE_OPTIMIZERS}[kind](model)
    train(model, optimizer, 2)
    expected, _ = flatten_state_dict(
        {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    )
    flat = flatten_state({"model": model, "optimizer": optimizer}, 0)
    # Groups have names of their own, and an optimizer without any state keeps an empty dict.
    named = {name: value for name, value in expected.items() if "param_groups" not in name}
    tensors = {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}
    assert [spec.fqn for spec in flat.specs.tensors if "param_groups" not in spec.fqn] == list(tensors)
    assert all(flat.tensors[name].data_ptr() == tensor.data_ptr() for name, tensor in tensors.items())
    values = [name for name, value in flat.values.items() if "param_groups" not in name]
    assert values == (
        [name for name in named if name not in tensors] or ["optimizer.state"] * (kind == "SGD")
    )


def test_a_group_of_parameters_is_one_object_named_by_the_first_and_a_digest_of_all():
    model = make_model("SGD")
    optimizer = torch.optim.SGD(
        [{"params": model[0].parameters()}, {"params": model[3].parameters(), "lr": 1}]
    )
    flat = flatten_state({"m": model, "o": optimizer}, 0)
    groups = [spec for spec in flat.specs.objects if "param_groups" in spec.fqn]
    assert [re.sub("-[0-9a-f]{16}$", "-*", spec.fqn) for spec in groups] == [
        "o.param_groups.0.weight-*",
        "o.param_groups.3.weight-*",
    ]
    assert [spec.path[-1] for spec in groups] == [PathKey("list", 0), PathKey("list", 1)]


def test_a_group_with_a_tensor_is_taken_apart():
    model = make_model("SGD")
    optimizer = torch.optim.SGD([model[0].weight], lr=torch.tensor(0.5))
    flat = flatten_state({"m": model, "o": optimizer}, 0)
    assert flat.tensors["o.param_groups.0.weight.lr"].item() == 0.5
    assert "o.param_groups.0.weight.momentum" in flat.values


def test_what_an_optimizer_owns_is_spread():
    model = make_model("Adam")
    model[3].bias.requires_grad_(False)
    optimizer = torch.optim.Adam(
        [p for p in model.parameters() if p.requires_grad], lr=torch.tensor(0.1), foreach=False
    )
    train(model, optimizer, 1)
    optimizer.state["more"] = {"t": torch.ones(1)}
    state = {"m": model, "o": optimizer, "copy": {"w": model[0].weight}, "ema": model[0].weight.clone()}
    spread = {fqn for fqn, spec in tensor_specs(state).items() if spec.spread}
    weights = {"0.weight", "0.bias", "1.weight", "1.bias", "3.weight"}
    assert spread == {
        *(f"m.{name}" for name in weights),
        *(f"o.state.{name}.{key}" for name in weights for key in ("step", "exp_avg", "exp_avg_sq")),
        "copy.w",
    }


def test_without_the_optimizer_nothing_is_spread():
    model = make_model("Adam")
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, 1)
    state = {"m": model, "o": optimizer.state_dict()}
    assert not any(spec.spread for spec in tensor_specs(state).values())


def test_what_is_per_rank_is_not_spread():
    model = make_model("Adam")
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, 1)
    specs = tensor_specs({"m": model, "o": PerRank(optimizer)})
    assert {spec.fqn for spec in specs.values() if spec.per_rank} == {f for f in specs if f.startswith("o.")}
    assert not any(spec.spread for spec in specs.values() if spec.per_rank)


@pytest.mark.parametrize("optimizer_first", [False, True])
def test_the_order_of_the_state_does_not_matter(optimizer_first):
    model = make_model("Adam")
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, 1)
    state = {"o": optimizer, "m": model} if optimizer_first else {"m": model, "o": optimizer}
    assert tensor_specs(state)["m.0.weight"].spread


def test_tied_tensors_name_the_first():
    weight = torch.nn.Parameter(torch.randn(3, 3))
    state = {
        "a": weight,
        "b": {"c": weight.detach()},
        "view": weight.detach().view(9),
        "transposed": weight.detach().t(),
        "bits": weight.detach().view(torch.int32),
        "own": PerRank(weight),
        "clone": weight.clone(),
        "empty": weight.detach()[:0],
        "empty too": weight.detach()[:0],
    }
    assert {fqn: spec.alias for fqn, spec in tensor_specs(state).items() if spec.alias} == {"b.c": "a"}


def test_tied_parameters_of_a_module():
    model = torch.nn.ModuleDict(
        {"embed": torch.nn.Embedding(4, 3), "head": torch.nn.Linear(3, 4, bias=False)}
    )
    model["head"].weight = model["embed"].weight
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    specs = tensor_specs({"m": model, "o": optimizer})
    assert specs["m.head.weight"].alias == "m.embed.weight"
    assert specs["m.head.weight"].spread


def test_what_is_conjugated_is_not_tied_to_what_is_not():
    tensor = torch.randn(3, dtype=torch.complex64)
    flat = flatten_state({"a": tensor, "b": tensor.conj()}, 0)
    assert [spec.alias for spec in flat.specs.tensors] == [None, None]
    assert torch.equal(flat.tensors["b"], tensor.conj())


def test_a_stateful_object_is_asked_for_its_state():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    flat = flatten_state({"s": scheduler, "deep": {"er": scheduler}}, 0)
    assert flat.values["s.step_size"] == flat.values["deep.er.step_size"] == 3


class Extra(torch.nn.Module):
    def __init__(self, extra: object) -> None:
        super().__init__()
        self.extra = extra

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


def test_extra_state_is_saved():
    module = torch.nn.Sequential(Extra({"n": 1, "t": torch.ones(1)}), Extra([1]), Extra(torch.ones(2)))
    flat = flatten_state({"m": module}, 0)
    assert flat.values == {"m.0._extra_state.n": 1, "m.1._extra_state": [1]}
    assert flat.tensors.keys() == {"m.0._extra_state.t", "m.2._extra_state"}


class Color(IntEnum):
    RED = 1


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros(3, object), r"^a\.b: .*numpy\.ndarray .*its dtype is object"),
        ([1, np.zeros((16 << 20) + 1, "i1")], r"^a\.b\[1\]: .*torch\.from_numpy"),
        (np.longdouble(1), r"^a\.b: a numpy\.longdouble"),
        (Color.RED, r"^a\.b: .*Color"),
        (object(), r"^a\.b: a builtins\.object"),
        ([1, {"c": {range(1)}}], r"^a\.b\[1\]\['c'\], a member of it: a builtins\.range"),
        ({1: lambda: None}, r"^a\.b\[1\]: .*function"),
        ({Color.RED: torch.ones(1)}, r"^a\.b, a key of it: .*Color"),
        (torch.ones(1, device="meta"), r"^a\.b: a meta"),
        (bytearray(b"abc"), r"^a\.b: .*bytearray"),
        (torch.Generator(), r"^a\.b: .*Generator"),
        (torch.optim.SGD, r"^a\.b: "),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_cannot_be_encoded_is_refused_at_the_door(value, message):
    with pytest.raises(UnsupportedType, match=message):
        flatten_state({"fine": 1, "a": {"b": value}}, 0)


def test_a_cycle_is_refused():
    cycle: list[object] = [1]
    cycle.append(cycle)
    with pytest.raises(UnsupportedType, match="^a.*contains itself"):
        flatten_state({"a": cycle}, 0)


@pytest.mark.parametrize(
    "state",
    [{"a.b": 1, "a": {"b": torch.ones(1)}}, {"a": {"b": 1}, "a.b": torch.ones(1)}],
    ids=["flat first", "nested first"],
)
def test_two_leaves_of_one_name_are_refused(state):
    with pytest.raises(InvalidArgument, match=r"'a\.b': \[.*\] and \[.*\]") as raised:
        flatten_state(state, 0)
    assert "['a.b']" in str(raised.value)
    assert "['a']['b']" in str(raised.value)


def test_keys_that_differ_in_type_only_are_refused():
    with pytest.raises(InvalidArgument, match=r"\['a'\]\[1\] and \['a'\]\['1'\]"):
        flatten_state({"a": {1: torch.ones(1), "1": 2}}, 0)


class Wrapper(FullyShardedDataParallel):
    def __init__(self) -> None:
        torch.nn.Module.__init__(self)


def test_fsdp1_is_refused():
    with pytest.raises(UnsupportedType, match=r"^m: FSDP1 .*fully_shard"):
        flatten_state({"m": torch.nn.Sequential(Wrapper())}, 0)


class Zero(ZeroRedundancyOptimizer):
    def __init__(self) -> None:
        self.state = {}  # type: ignore[assignment]


def test_zero_redundancy_optimizer_is_refused():
    with pytest.raises(UnsupportedType, match=r"^o: a ZeroRedundancyOptimizer .*fully_shard"):
        flatten_state({"o": Zero()}, 0)


def test_an_optimizer_without_its_module_is_refused():
    with pytest.raises(InvalidArgument, match="^o: .*pass its module too"):
        flatten_state({"o": torch.optim.SGD([torch.zeros(1)])}, 0)


def test_nothing_is_changed():
    model = make_model("Adam")
    optimizer = torch.optim.Adam(model.parameters())
    flatten_state({"m": model, "o": optimizer}, 0)
    assert not optimizer.state
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
