"""Names of parameters and the shape of optimizer state, beside the getters of torch.distributed.checkpoint."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.nn.parallel import DistributedDataParallel

from dtruntime_torch.checkpoint.state import fqns
from dtruntime_torch.checkpoint.state.fqns import NameCleaner, named_state, parameter_names
from dtruntime_torch.errors import InvalidArgument, UnsupportedType
from tests.checkpoint.memory_checkpoint import exact
from tests.checkpoint.optimizers import OPTIMIZERS, make_model, train


@pytest.fixture(scope="module")
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def net() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))


WRAPPERS = {
    "plain": net,
    "ddp": lambda: DistributedDataParallel(net()),
    "compiled": lambda: torch.compile(net()),
    "ddp of compiled": lambda: DistributedDataParallel(torch.compile(net())),
    "compiled ddp": lambda: torch.compile(DistributedDataParallel(net())),
    "checkpointed": lambda: torch.nn.Sequential(
        checkpoint_wrapper(net()), checkpoint_wrapper(torch.nn.Linear(1, 1))
    ),
    "compiled inside": lambda: torch.nn.Sequential(
        torch.compile(net()), torch.compile(checkpoint_wrapper(net()))
    ),
    "compiled in place": lambda: compiled_in_place(net()),
    "modules called module": lambda: torch.nn.ModuleDict({"module": net(), "_orig_mod": net()}),
}


def compiled_in_place(module: torch.nn.Module) -> torch.nn.Module:
    module.compile()
    return module


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_names_are_those_of_dcp(wrapper):
    module = WRAPPERS[wrapper]()
    clean = NameCleaner(module)
    assert [clean(key) for key in module.state_dict()] == list(get_model_state_dict(module))


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_an_optimizer_s_state_is_named_as_dcp_names_it(wrapper):
    module = WRAPPERS[wrapper]()
    optimizer = torch.optim.Adam(module.parameters())
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    names = parameter_names(optimizer, {"model": module}, "optimizer")
    assert exact(named_state(optimizer, names, "optimizer")) == exact(
        get_optimizer_state_dict(module, optimizer)
    )


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_state_of_every_optimizer_is_shaped_as_dcp_shapes_it(kind):
    model = make_model(kind)
    optimizer = OPTIMIZERS[kind](model)
    train(model, optimizer, 2)
    names = parameter_names(optimizer, {"model": model}, "optimizer")
    ours = named_state(optimizer, names, "optimizer")
    assert exact(ours) == exact(get_optimizer_state_dict(model, optimizer))


class Experts(torch.nn.Module):
    """One expert is idle, another is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle, self.frozen = (torch.nn.Linear(2, 2) for _ in range(3))
        self.frozen.requires_grad_(False)


@pytest.mark.parametrize("frozen", [False, True], ids=["frozen left out", "frozen given"])
def test_experts_without_state_are_named_as_dcp_names_them(frozen):
    model = Experts()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if frozen or p.requires_grad])
    model.used(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    ours = named_state(optimizer, parameter_names(optimizer, {"model": model}, "o"), "o")
    assert list(ours["state"]) == ["used.weight", "used.bias"]
    assert exact(ours) == exact(get_optimizer_state_dict(model, optimizer))


def test_a_fresh_optimizer_is_named_without_a_step():
    model = Experts()
    optimizer = torch.optim.AdamW(model.parameters())
    names = parameter_names(optimizer, {"model": model}, "o")
    assert named_state(optimizer, names, "o")["state"] == {}
    assert not optimizer.state
    # What the getter of torch does instead, and why it is not used.
    assert get_optimizer_state_dict(model, optimizer)["state"]


def test_a_module_s_own_name_for_a_key_stays():
    module = torch.nn.Linear(1, 1)
    assert NameCleaner(module)("made.by.a.hook") == "made.by.a.hook"


def test_naming_changes_nothing():
    model = net()
    optimizer = torch.optim.Adam(model.parameters())
    before = copy.deepcopy(optimizer.state_dict())
    named_state(optimizer, parameter_names(optimizer, {"m": model}, "o"), "o")
    assert exact(optimizer.state_dict()) == exact(before)
    assert not optimizer.state


def test_a_parameter_of_several_names_has_the_first():
    model = net()
    model.append(model[0])
    assert parameter_names(torch.optim.SGD(model.parameters()), {"m": model}, "o") == (
        "0.weight",
        "0.bias",
        "1.weight",
        "1.bias",
    )


def test_parameters_of_several_modules_have_their_modules_names():
    modules = {"g": torch.nn.Linear(1, 1, bias=False), "d": torch.nn.Linear(1, 1)}
    optimizer = torch.optim.SGD([*modules["d"].parameters(), *modules["g"].parameters()])
    assert parameter_names(optimizer, modules, "o") == ("d.weight", "d.bias", "g.weight")


def test_the_first_module_that_holds_all_gives_the_names():
    model = net()
    modules = {"head": model[1], "raw": model, "again": model}
    assert parameter_names(torch.optim.SGD(model.parameters()), modules, "o")[0] == "0.weight"
    assert parameter_names(torch.optim.SGD(model[1].parameters()), modules, "o") == ("weight", "bias")


def test_a_parameter_of_no_module_is_refused():
    model = net()
    optimizer = torch.optim.SGD([*model.parameters(), torch.nn.Parameter(torch.ones(7))])
    with pytest.raises(InvalidArgument, match=r"^o: .* parameter 4, of shape \[7\].*pass its module too"):
        parameter_names(optimizer, {"m": model}, "o")
    with pytest.raises(InvalidArgument, match=r"optimizer\.state_dict\(\)"):
        parameter_names(optimizer, {}, "o")


def test_the_names_are_found_once(monkeypatch):
    model = net()
    optimizer = torch.optim.SGD(model.parameters())
    first = parameter_names(optimizer, {"m": model}, "o")
    monkeypatch.setattr(fqns, "_find_names", None)
    assert parameter_names(optimizer, {"m": model}, "o") is first


def test_new_parameters_and_other_modules_are_noticed():
    model, other = net(), net()
    optimizer = torch.optim.SGD(model[0].parameters())
    assert parameter_names(optimizer, {"m": model}, "o") == ("0.weight", "0.bias")
    with pytest.raises(InvalidArgument):
        parameter_names(optimizer, {"m": other}, "o")
    optimizer.add_param_group({"params": list(model[1].parameters())})
    assert len(parameter_names(optimizer, {"m": model}, "o")) == 4
    assert parameter_names(optimizer, {"n": torch.nn.Sequential(model)}, "o")[0] == "0.0.weight"
    with pytest.raises(InvalidArgument):
        parameter_names(optimizer, {"m": other}, "o")


def test_nothing_is_kept_alive():
    model = net()
    optimizer = torch.optim.SGD(model.parameters())
    parameter_names(optimizer, {"m": model}, "o")
    # As training loops do it; what is remembered of an optimizer must not lead back to it.
    model.optimizer = model[0].weight.optimizer = optimizer
    alive = [weakref.ref(model), weakref.ref(optimizer), weakref.ref(model[0].weight)]
    del model, optimizer
    gc.collect()
    assert [ref() for ref in alive] == [None, None, None]


class Wordy(torch.optim.SGD):
    def state_dict(self):
        return {**super().state_dict(), "scale": 3}


def test_an_optimizer_that_keeps_more_is_refused():
    model = net()
    with pytest.raises(UnsupportedType, match=r"^o: the state of Wordy holds \['scale'\]"):
        named_state(Wordy(model.parameters()), ["a"] * 4, "o")


def test_state_beside_that_of_parameters_keeps_its_name():
    model = net()
    optimizer = torch.optim.SGD(model.parameters())
    optimizer.state["global"] = {"n": 1}
    names = parameter_names(optimizer, {"m": model}, "o")
    assert named_state(optimizer, names, "o")["state"] == {"global": {"n": 1}}
    optimizer.state[3.5] = {}
    with pytest.raises(UnsupportedType, match=r"3\.5"):
        named_state(optimizer, names, "o")
