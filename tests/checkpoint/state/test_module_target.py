"""Modules filled by their own `load_state_dict`."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from dtruntime_torch.checkpoint.flatten import PerRank
from dtruntime_torch.errors import UnsupportedType
from tests.checkpoint.memory_checkpoint import differences, exact, load, save


@pytest.fixture(scope="module")
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def net() -> torch.nn.Sequential:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    model(torch.randn(5, 2))
    return model


def state_of(module: torch.nn.Module) -> object:
    return exact(dict(module.state_dict()))


def test_parameters_and_buffers_come_back_into_the_same_tensors():
    model, fresh = net(), net()
    before = [tensor.data_ptr() for tensor in fresh.state_dict().values()]
    load(save({"m": model}), {"m": fresh})
    assert state_of(fresh) == state_of(model)
    assert [tensor.data_ptr() for tensor in fresh.state_dict().values()] == before
    assert all(parameter.requires_grad for parameter in fresh.parameters())


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("saved", ["plain", "ddp", "compiled"])
@pytest.mark.parametrize("loaded", ["plain", "ddp", "compiled"])
def test_a_wrapper_may_come_or_go(saved, loaded):
    wrap = {"plain": lambda m: m, "ddp": DistributedDataParallel, "compiled": torch.compile}
    model, fresh = net(), net()
    load(save({"m": wrap[saved](model)}), {"m": wrap[loaded](fresh)})
    assert state_of(fresh) == state_of(model)


def test_a_tied_model_stays_tied():
    def tied():
        model = torch.nn.ModuleDict(
            {"embed": torch.nn.Embedding(4, 3), "head": torch.nn.Linear(3, 4, bias=False)}
        )
        model["head"].weight = model["embed"].weight
        return model

    model, fresh = tied(), tied()
    load(save({"m": model}), {"m": fresh})
    assert fresh["head"].weight is fresh["embed"].weight
    assert torch.equal(fresh["head"].weight, model["embed"].weight)


class Extra(torch.nn.Module):
    def __init__(self, extra: object) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.extra = extra

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


@pytest.mark.parametrize(
    "extra",
    [{"n": 1, "t": [torch.ones(1)]}, {}, [1, (2, None)], torch.ones(5), b"abc", {3: torch.ones(1)}, None],
    ids=lambda e: str(e)[:20],
)
@pytest.mark.parametrize(
    "current", [None, torch.zeros(2), {"n": 2, "more": 3}], ids=["none", "tensor", "dict"]
)
def test_extra_state_becomes_what_was_saved(extra, current):
    fresh = torch.nn.Sequential(Extra(current))
    load(save({"m": torch.nn.Sequential(Extra(copy.deepcopy(extra)))}), {"m": fresh})
    assert exact(fresh[0].extra) == exact(extra)


class Renaming(torch.nn.Linear):
    """Stores its weight transposed and under another name."""

    def __init__(self) -> None:
        super().__init__(2, 3)
        self.register_state_dict_post_hook(self._rename)
        self.register_load_state_dict_pre_hook(self._rename_back)

    @staticmethod
    def _rename(module, state, prefix, metadata):
        state[prefix + "kernel"] = state.pop(prefix + "weight").t()

    @staticmethod
    def _rename_back(module, state, prefix, *rest):
        state[prefix + "weight"] = state.pop(prefix + "kernel").t()


def test_hooks_are_honoured():
    model, fresh = torch.nn.Sequential(Renaming()), torch.nn.Sequential(Renaming())
    checkpoint = save({"m": model})
    assert checkpoint.tensors["m.0.kernel"].shape == (2, 3)
    load(checkpoint, {"m": fresh})
    assert torch.equal(fresh[0].weight, model[0].weight)


class Versioned(torch.nn.Module):
    _version = 7

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = None

    def _load_from_state_dict(self, state, prefix, metadata, *rest):
        self.seen = metadata.get("version")
        super()._load_from_state_dict(state, prefix, metadata, *rest)


def test_modules_see_their_version():
    fresh = torch.nn.Sequential(Versioned())
    load(save({"m": torch.nn.Sequential(Versioned())}), {"m": fresh})
    assert fresh[0].seen == 7


def test_buffers_that_are_not_saved_are_not_asked_for():
    def make(value):
        module = torch.nn.Linear(1, 1)
        module.register_buffer("cache", torch.full((1,), value), persistent=False)
        return module

    fresh = make(2.0)
    load(save({"m": make(1.0)}), {"m": fresh})
    assert fresh.cache == 2


def test_all_differences_are_listed():
    saved = torch.nn.ModuleDict({"head": torch.nn.Linear(4, 10), "old": torch.nn.Linear(1, 1, bias=False)})
    state = torch.nn.ModuleDict({"head": torch.nn.Linear(4, 12), "new": torch.nn.Linear(1, 1)})
    state["head"].bias = torch.nn.Parameter(torch.zeros(10, dtype=torch.float64))
    assert differences(save({"model": saved}), {"model": state}) == [
        "model.head.weight: checkpoint (10, 4) float32, state (12, 4) float32",
        "model.head.bias: checkpoint (10,) float32, state (10,) float64",
        "model.new.weight: in the state, not in the checkpoint",
        "model.new.bias: in the state, not in the checkpoint",
        "model.old.weight: in the checkpoint, not in the state",
    ]


def test_what_is_no_tensor_is_a_difference():
    saved = {"m": {"weight": {"deep": torch.ones(1)}, "bias": b"abc"}}
    assert differences(save(saved), {"m": torch.nn.Linear(3, 1)}) == [
        "m.weight: checkpoint no tensor, state (1, 3) float32",
        "m.bias: checkpoint no tensor, state (1,) float32",
    ]


def test_a_module_without_state_is_no_difference():
    load(save({"m": torch.nn.ReLU()}), {"m": torch.nn.ReLU()})
    assert not differences(save({"a": 1}), {"a": 1, "m": torch.nn.ReLU()})


def test_a_missing_module_lists_its_names():
    assert differences(save({"a": 1}), {"a": 1, "m": torch.nn.Linear(1, 1)}) == [
        "m.weight: in the state, not in the checkpoint",
        "m.bias: in the state, not in the checkpoint",
    ]
    assert not differences(save({"a": 1}), {"a": 1, "m": PerRank(torch.nn.Linear(1, 1))})


def test_a_plain_state_dict_fits_the_module():
    model, fresh = net(), net()
    load(save({"m": OrderedDict(model.state_dict())}), {"m": fresh})
    assert state_of(fresh) == state_of(model)
    other = {"m": net().state_dict()}
    load(save({"m": model}), other)
    assert exact(dict(other["m"])) == state_of(model)


def test_a_model_without_memory_is_refused():
    with torch.device("meta"):
        fresh = torch.nn.Linear(1, 1)
    with pytest.raises(UnsupportedType, match=r"^m\.weight: .*to_empty"):
        differences(save({"m": torch.nn.Linear(1, 1)}), {"m": fresh})


def test_comparing_changes_nothing():
    fresh = net()
    before = state_of(fresh)
    differences(save({"m": net()}), {"m": fresh})
    assert state_of(fresh) == before
