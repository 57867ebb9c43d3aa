"""Tensors that wrap others: saved as what they wrap, filled where they are, refused where that cannot be."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_map_only

import dtruntime_torch as dt
from dtruntime_torch.checkpoint import objects
from dtruntime_torch.checkpoint.flatten import flatten_state
from dtruntime_torch.checkpoint.state.wrappers import Wrapping
from dtruntime_torch.errors import CheckpointMismatch, CorruptCheckpoint, UnsupportedType
from tests.checkpoint.memory_checkpoint import differences, load, load_fresh, same_bits, save


class Scaled(torch.Tensor):
    """Integers and a scale that stand for floats, as quantized weights are kept."""

    codes: torch.Tensor
    scale: torch.Tensor
    group: object

    @staticmethod
    def __new__(
        cls, codes: torch.Tensor, scale: torch.Tensor, group: object, dtype: torch.dtype = torch.float32
    ) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, strides=codes.stride(), dtype=dtype)  # type: ignore[attr-defined]

    def __init__(
        self, codes: torch.Tensor, scale: torch.Tensor, group: object, dtype: torch.dtype = torch.float32
    ) -> None:
        self.codes, self.scale, self.group = codes, scale, group

    def __repr__(self) -> str:  # type: ignore[override]  # torch takes more
        return f"Scaled({self.codes}, {self.scale}, {self.group})"

    def __tensor_flatten__(self) -> tuple[list[str], object]:
        return ["codes", "scale"], {"group": self.group}

    @classmethod
    def __tensor_unflatten__(cls, inner, metadata, outer_size, outer_stride):
        return cls(inner["codes"], inner["scale"], metadata["group"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten.detach.default:
            (one,) = args
            return return_and_correct_aliasing(
                func, args, kwargs, cls(one.codes.detach(), one.scale.detach(), one.group, one.dtype)
            )
        if func is torch.ops.aten.copy_.default:
            to, source = args
            to.codes.copy_(source.codes)
            to.scale.copy_(source.scale)
            return to
        plain = tree_map_only(cls, lambda one: one.codes * one.scale, (args, kwargs))
        return func(*plain[0], **plain[1])


def scaled(start: int = 0, group: object = 32, size: int = 6) -> Scaled:
    return Scaled(torch.arange(start, start + size, dtype=torch.int8), torch.full((1,), 0.5 + start), group)


def two(value: float, *shape: int) -> TwoTensor:
    generator = torch.Generator().manual_seed(int(value * 100))
    return TwoTensor(torch.randn(shape, generator=generator), torch.randn(shape, generator=generator))


def assert_same(actual: Any, expected: Any) -> None:
    """One class, and the same bits inside, to any depth."""
    assert type(actual) is type(expected)
    if hasattr(expected, "__tensor_flatten__"):
        for name in expected.__tensor_flatten__()[0]:
            assert_same(getattr(actual, name), getattr(expected, name))
        assert actual.__tensor_flatten__()[1] == expected.__tensor_flatten__()[1]
    else:
        assert same_bits(actual, expected)


def test_a_wrapper_is_saved_as_what_it_wraps():
    one = scaled()
    flat = flatten_state({"w": one}, 0)
    assert [(s.fqn, s.dtype, s.global_shape) for s in flat.specs.tensors] == [
        ("w.codes", "int8", (6,)),
        ("w.scale", "float32", (1,)),
    ]
    assert flat.tensors["w.codes"].data_ptr() == one.codes.data_ptr()
    assert list(flat.values) == ["w.__tensor_flatten__"]


def test_a_wrapper_in_a_dict_is_filled_inside():
    state = {"w": scaled(), "list": [scaled(3)]}
    target: dict[str, Any] = {"w": scaled(50), "list": [scaled(60)]}
    wrapper, codes = target["w"], target["w"].codes
    load(save(state), target)
    assert target["w"] is wrapper
    assert wrapper.codes is codes
    assert_same(target["w"], state["w"])
    assert_same(target["list"][0], state["list"][0])


def test_wrappers_in_wrappers_are_filled_inside():
    def nested(value: float) -> TwoTensor:
        return TwoTensor(two(value, 2, 3), two(value + 1, 2, 3))

    state, target = {"w": nested(1)}, {"w": nested(7)}
    assert [s.fqn for s in flatten_state(state, 0).specs.tensors] == ["w.a.a", "w.a.b", "w.b.a", "w.b.b"]
    load(save(state), target)
    assert_same(target["w"], state["w"])


def test_a_fresh_state_dict_has_what_was_wrapped():
    loaded: Any = load_fresh(save({"w": scaled(2)}))["w"]  # type: ignore[index]
    assert same_bits(loaded["codes"], scaled(2).codes)
    assert loaded["__tensor_flatten__"] == Wrapping("Scaled", "float32", (6,), (1,), {"group": 32})


def model_of(value: float) -> torch.nn.Module:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    for i, parameter in enumerate(list(model.parameters())):
        layer, name = model[i // 2], ("weight", "bias")[i % 2]
        setattr(layer, name, torch.nn.Parameter(two(value + i, *parameter.shape)))
    return model


def stepped(model: torch.nn.Module, **options: Any) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, **options)
    step(model, optimizer, 0)
    return optimizer


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    for i, parameter in enumerate(model.parameters()):
        parameter.grad = two(100 + seed + i, *parameter.shape)
    optimizer.step()


def assert_same_training(
    one: tuple[torch.nn.Module, torch.optim.Optimizer], other: tuple[torch.nn.Module, torch.optim.Optimizer]
) -> None:
    for ours, theirs in zip(one[0].parameters(), other[0].parameters(), strict=True):
        assert_same(ours.detach(), theirs.detach())
        entries, expected = one[1].state[ours], other[1].state[theirs]
        assert entries.keys() == expected.keys()
        for key, value in expected.items():
            assert_same(entries[key], value)


@pytest.mark.parametrize("used", [False, True], ids=["into a fresh one", "into a used one"])
def test_wrapped_parameters_go_on_bit_for_bit_with_adamw(tmp_path, used):
    model = model_of(1)
    optimizer = stepped(model)
    other = model_of(50)
    restored = stepped(other) if used else torch.optim.AdamW(other.parameters(), lr=0.5)
    parameters = list(other.parameters())
    before = [dict(restored.state[p]) for p in parameters] if used else []
    with dt.CheckpointManager(tmp_path) as manager:
        manager.save({"model": model, "optimizer": optimizer}, 1)
        manager.load({"model": other, "optimizer": restored})
    assert list(other.parameters()) == parameters
    assert_same_training((other, restored), (model, optimizer))
    for parameter, entries in zip(parameters, before, strict=False):
        assert all(restored.state[parameter][key] is value for key, value in entries.items())
    step(model, optimizer, 7)
    step(other, restored, 7)
    assert_same_training((other, restored), (model, optimizer))


def test_what_an_optimizer_owns_is_spread_inside_of_wrappers_too():
    model = model_of(1)
    specs = flatten_state({"m": model, "o": stepped(model)}, 0).specs.tensors
    assert len(specs) == 4 * (2 + 1 + 4)
    assert all(spec.spread for spec in specs)


def test_plain_state_of_a_wrapped_parameter_stays_plain():
    def make() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        model = model_of(1)
        return model, torch.optim.SGD(model.parameters())

    model, optimizer = make()
    for parameter in model.parameters():
        optimizer.state[parameter]["plain"] = torch.randn(parameter.shape)
    for used in (False, True):
        other, restored = make()
        if used:
            for parameter in other.parameters():
                restored.state[parameter]["plain"] = two(3, *parameter.shape)
        load(save({"m": model, "o": optimizer}), {"m": other, "o": restored})
        assert_same_training((other, restored), (model, optimizer))


def with_wrapped_state(wrap: bool) -> dict[str, Any]:
    model = torch.nn.Linear(6, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters())
    if wrap:
        optimizer.state[model.weight]["moments"] = {"deep": scaled(4)}
    return {"m": model, "o": optimizer}


def test_a_wrapper_that_only_a_step_makes_is_a_difference():
    lines = differences(save(with_wrapped_state(True)), with_wrapped_state(False))
    assert lines == [
        "o.state.weight.moments.deep: a Scaled in the checkpoint, and none in the state to make it like; "
        "if the first step makes it, take that first"
    ]


def test_a_wrapper_of_plain_parameters_is_filled_once_it_is_there():
    state, target = with_wrapped_state(True), with_wrapped_state(True)
    wrapper = target["o"].state[target["m"].weight]["moments"]["deep"]
    wrapper.codes.zero_()
    load(save(state), target)
    assert target["o"].state[target["m"].weight]["moments"]["deep"] is wrapper
    assert_same(wrapper, scaled(4))


class Average:
    def __init__(self, value: float) -> None:
        self.state: Any = {"shadow": [two(value, 2)], "n": value}

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


def test_a_stateful_object_gets_wrappers_back():
    state, target = {"ema": Average(1)}, {"ema": Average(2)}
    load(save(state), target)
    assert_same(target["ema"].state["shadow"][0], state["ema"].state["shadow"][0])
    assert target["ema"].state["n"] == 1


@pytest.mark.parametrize(
    ("saved", "own", "says"),
    [
        (scaled(group=32), scaled(group=64), "w: a Scaled of other metadata in the checkpoint: {'group': 32}"),
        (scaled(group=1), scaled(group=True), "w: a Scaled of other metadata"),
        (scaled(), scaled(size=7), "w: a wrapper of shape (6,) in the checkpoint, of shape (7,) in the state"),
        (scaled(), Scaled(scaled().codes, scaled().scale, 32, torch.float64), "w: a wrapper of dtype float32"),
        (two(1, 2, 3), TwoTensor(torch.ones(3, 2).t(), torch.ones(3, 2).t()), "w: a wrapper of strides (3, 1)"),
        (torch.ones(6), scaled(), "w.codes: in the state, not in the checkpoint"),
        (scaled(), torch.ones(6), "w: checkpoint no tensor, state (6,) float32"),
        (scaled(), two(1, 6), "w: a wrapper of class Scaled in the checkpoint, of class TwoTensor"),
        ({"codes": 1, "scale": 2, "__tensor_flatten__": 3}, scaled(), "w: checkpoint no wrapper, state a Scaled"),
    ],
    ids=lambda part: part if isinstance(part, str) else type(part).__name__,
)  # fmt: skip
def test_what_does_not_fit_a_wrapper_is_a_difference(saved, own, says):
    assert any(line.startswith(says) for line in differences(save({"w": saved}), {"w": own}))


def test_a_module_s_wrapper_is_compared_too(tmp_path):
    def make(group: int) -> torch.nn.Module:
        module = torch.nn.Module()
        module.w = torch.nn.Parameter(scaled(group=group), requires_grad=False)
        return module

    with dt.CheckpointManager(tmp_path) as manager:
        manager.save({"m": make(32)}, 1)
        with pytest.raises(CheckpointMismatch, match=r"m\.w: a Scaled of other metadata"):
            manager.load({"m": make(64)})


def test_tied_wrappers_are_tied_inside():
    weight = torch.nn.Parameter(two(1, 3, 3))
    model = torch.nn.ModuleDict(
        {"a": torch.nn.Linear(3, 3, bias=False), "b": torch.nn.Linear(3, 3, bias=False)}
    )
    model["a"].weight = model["b"].weight = weight
    specs = {spec.fqn: spec.alias for spec in flatten_state({"m": model}, 0).specs.tensors}
    assert specs == {
        "m.a.weight.a": None,
        "m.a.weight.b": None,
        "m.b.weight.a": "m.a.weight.a",
        "m.b.weight.b": "m.a.weight.b",
    }


@pytest.mark.parametrize("in_module", [False, True])
def test_one_wrapper_that_was_saved_as_two_is_refused(tmp_path, in_module):
    both = torch.nn.Parameter(two(1, 3))
    target: dict[str, Any] = {"m": {"a": both, "b": both}}
    if in_module:
        target["m"] = torch.nn.ParameterDict(target["m"])
    with dt.CheckpointManager(tmp_path) as manager:
        manager.save({"m": {"a": two(1, 3), "b": two(2, 3)}}, 1)
        with pytest.raises(dt.errors.InvalidArgument, match=r"m\.a\.a and m\.b\.a are one tensor"):
            manager.load(target)


class Halfway(TwoTensor):
    def __tensor_flatten__(self):
        return ["a", "note"], None

    note = "no tensor"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: scaled(group=object()), r"^w\.__tensor_flatten__\['metadata'\]\['group'\]: a builtins\.object .*register_codec"),
        (lambda: Halfway(torch.ones(1), torch.ones(1)), r"^w\.note: a Halfway holds a str"),
        (lambda: TwoTensor(torch.ones(1, device="meta"), torch.ones(1, device="meta")), r"^w\.a: a meta tensor"),
    ],
    ids=["metadata", "no tensor", "meta"],
)  # fmt: skip
def test_what_cannot_be_taken_apart_is_refused_by_its_key(make, says):
    with pytest.raises(UnsupportedType, match=says):
        flatten_state({"w": make()}, 0)


def test_a_shard_that_is_a_wrapper_is_refused():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        tensor = DTensor.from_local(two(1, 2), mesh, [Shard(0)])
        with pytest.raises(UnsupportedType, match=r"^w: the shards of this DTensor are TwoTensors"):
            flatten_state({"w": tensor}, 0)
        sharded = TwoTensor(*(DTensor.from_local(torch.ones(2), mesh, [Shard(0)]) for _ in range(2)))
        specs = flatten_state({"w": sharded}, 0).specs.tensors
        assert [(spec.fqn, spec.holders) for spec in specs] == [("w.a", (0,)), ("w.b", (0,))]
    finally:
        dist.destroy_process_group()


def test_nothing_is_changed_by_taking_apart():
    one = scaled()
    before = copy.deepcopy((one.codes, one.scale))
    flatten_state({"w": one}, 0)
    assert (torch.equal(one.codes, before[0]), torch.equal(one.scale, before[1])) == (True, True)


@pytest.mark.parametrize(
    "stored",
    [
        7,
        {"kind": "A"},
        {"kind": 1, "dtype": "float32", "shape": [1], "stride": [1], "metadata": None},
        {"kind": "A", "dtype": "float32", "shape": [1], "stride": [1, 1], "metadata": None},
        {"kind": "A", "dtype": "float32", "shape": [-1], "stride": [1], "metadata": None},
        {"kind": "A", "dtype": "float32", "shape": [1.0], "stride": [1], "metadata": None},
    ],
    ids=str,
)
def test_a_hostile_wrapping_is_refused(stored):
    encoded = {"~": "dtruntime.Wrapping", "v": objects.encode(stored, "w")}
    with pytest.raises(CorruptCheckpoint, match=r"^w: not a dtruntime\.Wrapping"):
        objects.decode(encoded, "w")
