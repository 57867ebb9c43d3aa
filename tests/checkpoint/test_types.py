"""What a state may hold comes back equal in type and value, or is refused when it is saved: by key path and type."""

from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dtruntime_torch as dt
from dtruntime_torch.errors import InvalidArgument, UnsupportedType
from tests.checkpoint.typed_values import KEPT, ONE, REFUSED, Level, List, Pair, Parameter, Tensor, Text, same


def save_and_reload(state: object) -> Any:
    with dt.CheckpointManager(dt.MemoryBackend()) as manager:
        manager.save(state, 1)
        return manager.load_checkpoint()


@pytest.mark.parametrize("where", ["in a dict", "in a list", "per rank", "of a stateful object"])
@pytest.mark.parametrize("name", KEPT)
def test_what_is_kept_is_kept_in_type_and_value(name, where):
    value = KEPT[name]
    if where == "in a list":
        assert same(save_and_reload({"x": [1, value]}), {"x": [1, value]})
    elif where == "per rank":
        assert same(save_and_reload({"x": dt.PerRank(value)}), {"x": value})
    elif where == "of a stateful object":
        assert same(save_and_reload({"x": Holder({"y": value})}), {"x": {"y": value}})
    else:
        assert same(save_and_reload({"x": value, "behind": 1}), {"x": value, "behind": 1})


class Holder:
    def __init__(self, state: object) -> None:
        self.state = state

    def state_dict(self) -> object:
        return self.state

    def load_state_dict(self, state: object) -> None:
        self.state = state


@pytest.mark.parametrize(
    "where", ["in a dict", "in a list", "per rank", "of a stateful object", "beside a tensor"]
)
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_kept_is_refused_by_its_key_path(name, where):
    value = REFUSED[name]
    states: dict[str, object] = {
        "in a dict": {"a": {"x": value}},
        "in a list": {"a": [1, value]},
        "per rank": {"a": dt.PerRank({"x": value})},
        "of a stateful object": {"a": Holder({"x": value})},
        "beside a tensor": {"a": [ONE, value]},
    }
    with pytest.raises(UnsupportedType, match=r"^a(\.x|\[1\]|\.1)") as caught:
        save_and_reload(states[where])
    assert any(advice in str(caught.value) for advice in ("register_codec", "convert", "store", "as the key"))


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (defaultdict(list, a=1), r"^x: a collections\.defaultdict would come back as a dict; save dict\(\.\.\.\) of it.*"
         r"register_codec"),
        (defaultdict(list, {1: 1}), r"^x: a collections\.defaultdict cannot be stored; store dict\(\.\.\.\) of it, .*"
         r"register_codec"),
        (Pair(ONE, 1), r"^x: a .*\.Pair would come back as a tuple; save tuple\(\.\.\.\) of it"),
        (List([ONE]), r"^x: a .*\.List would come back as a list; save list\(\.\.\.\) of it"),
        (Level.LOW, r"^x: a .*\.Level cannot be stored; store its \.value, or teach it: .*register_codec"),
        (Text("a"), r"^x: a .*\.Text cannot be stored; store str\(\.\.\.\) of it, or teach it: .*register_codec"),
        (ONE.as_subclass(Tensor), r"^x: a .*\.Tensor would come back as a plain tensor; store tensor\.as_subclass\("),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_the_error_says_what_to_do(value, says):
    with pytest.raises(UnsupportedType, match=says):
        save_and_reload({"x": value})


def test_a_state_that_is_no_plain_dict_is_refused_or_kept():
    assert same(save_and_reload(OrderedDict(b=ONE, a=1)), OrderedDict(b=ONE, a=1))
    with pytest.raises(
        UnsupportedType, match="^the state: a collections.defaultdict would come back as a dict"
    ):
        save_and_reload(defaultdict(int, a=1))


def test_a_parameter_comes_back_as_the_tensor_in_it():
    loaded = save_and_reload({"x": torch.nn.Parameter(ONE)})["x"]
    assert type(loaded) is torch.Tensor
    assert not loaded.requires_grad
    assert torch.equal(loaded, ONE)


def test_a_module_and_its_optimizer_may_hold_tensors_of_any_class():
    model = torch.nn.Linear(2, 2)
    model.register_buffer("mean", torch.ones(2).as_subclass(Tensor))
    model.weight = Parameter(torch.randn(2, 2))
    fresh = torch.nn.Linear(2, 2)
    fresh.register_buffer("mean", torch.zeros(2).as_subclass(Tensor))
    fresh.weight = Parameter(torch.zeros(2, 2))
    with dt.CheckpointManager(dt.MemoryBackend()) as manager:
        manager.save({"model": model}, 1)
        manager.load({"model": fresh})
    assert (type(fresh.mean), type(fresh.weight)) == (Tensor, Parameter)
    assert torch.equal(fresh.mean, model.mean)
    assert torch.equal(fresh.weight, model.weight)


def test_a_load_fills_whatever_container_is_there_and_that_stays_what_it_is():
    with dt.CheckpointManager(dt.MemoryBackend()) as manager:
        manager.save({"d": {"n": 1, "t": ONE}, "o": {"n": 1}, "p": (ONE, 5), "u": {"n": 7}, "l": [ONE, 3]}, 1)
        counts = defaultdict(int, n=0, t=torch.zeros(2))
        ordered, user = OrderedDict(n=0), UserDict(n=0)
        items = List([torch.zeros(2), 0])
        state: dict[str, Any] = {
            "d": counts, "o": ordered, "p": Pair(torch.zeros(2), 0), "u": user, "l": items
        }  # fmt: skip
        manager.load(state)
    assert (state["d"], state["o"], state["u"]) == (counts, ordered, user)
    assert counts["n"] == ordered["n"] == 1
    assert user["n"] == 7
    assert torch.equal(counts["t"], ONE)
    assert counts.default_factory is int
    assert type(state["p"]) is Pair and state["p"].right == 5
    assert state["l"] is items and items[1] == 3


def test_the_state_dicts_of_torch_go_through():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(4, 2)).sum().backward()
    optimizer.step()
    schedulers = [
        torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2]),
        torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, 10),
        torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer),
        torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 5),
    ]
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedulers": [one.state_dict() for one in schedulers],
        "scaler": torch.amp.GradScaler("cpu").state_dict(),
    }
    loaded = save_and_reload(state)
    assert same(loaded, state)
    torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)).load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.complex_numbers()
    | st.text(st.characters(exclude_categories=()), max_size=4)
    | st.binary(max_size=4)
)
KEYS = SCALARS | st.lists(SCALARS, max_size=2).map(tuple) | st.frozensets(SCALARS, max_size=2)
TENSORS = st.builds(
    lambda dtype, shape: torch.ones(shape).to(dtype),
    st.sampled_from([torch.float32, torch.bfloat16, torch.bool, torch.uint16, torch.complex64]),
    st.sampled_from([(), (0,), (3,), (2, 0, 2)]),
)
OTHERS = st.sampled_from([KEPT[name] for name in KEPT if name.startswith(("np.", "an array", "torch."))])


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    lists = st.lists(inner, max_size=3)
    pairs = st.lists(st.tuples(KEYS | st.text("ab", max_size=2), inner), max_size=3)
    return lists | lists.map(tuple) | pairs.map(dict) | pairs.map(OrderedDict)


def values(scalars: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.recursive(scalars, containers, max_leaves=12)


SUPPORTED = SCALARS | TENSORS | OTHERS | st.sets(KEYS, max_size=3) | st.frozensets(KEYS, max_size=3)
STATES = st.dictionaries(st.from_regex(r"[a-z]{1,3}", fullmatch=True), values(SUPPORTED), max_size=3)


def outcome(state: object) -> Any:
    """What comes back, or the error by which the state is refused."""
    try:
        return save_and_reload(state)
    except (InvalidArgument, UnsupportedType) as error:
        return error


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(STATES)
def test_any_nest_of_what_is_supported_comes_back_exactly(state):
    loaded = outcome(state)
    # Some keys give no name to a tensor, or the same one to two.
    refused = any(says in str(loaded) for says in ("gives no name to a tensor", "two leaves of the state"))
    assert refused if isinstance(loaded, Exception) else same(loaded, state)


ANY = st.dictionaries(
    st.from_regex(r"[a-z]{1,3}", fullmatch=True),
    values(SUPPORTED | st.sampled_from(list(REFUSED.values()))),
    max_size=3,
)


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(ANY)
def test_any_nest_of_anything_comes_back_exactly_or_is_refused(state):
    loaded = outcome(state)
    if isinstance(loaded, InvalidArgument):
        assert "two leaves of the state" in str(loaded)
    else:
        assert isinstance(loaded, UnsupportedType) or same(loaded, state)


@pytest.mark.parametrize("key", [float("nan"), (1, float("nan")), complex("nan")], ids=repr)
def test_a_key_that_is_not_equal_to_itself_gives_no_name(key):
    assert "gives no name to a tensor" in str(outcome({"a": {key: {"x": ONE, "y": ONE}}}))


@pytest.mark.parametrize("kind", [dict, int, type(None), frozenset], ids=lambda kind: kind.__name__)
def test_what_is_stored_as_it_is_takes_no_codec(kind):
    with pytest.raises(InvalidArgument, match="needs no codec"):
        dt.register_codec(kind, "tests.Kind", str, kind)


@pytest.mark.parametrize("key", [10**5000, (1, 10**5000)], ids=["int", "tuple"])
def test_a_key_of_thousands_of_digits_gives_no_name(key):
    assert "gives no name to a tensor" in str(outcome({"a": {key: ONE}}))


def test_more_than_64_dimensions_are_refused_when_the_save_is_called():
    with pytest.raises(UnsupportedType, match=r"^a\.x: a tensor of 65 dimensions .*reshape it"):
        save_and_reload({"a": {"x": torch.zeros([1] * 65)}})
    assert same(save_and_reload({"a": torch.zeros([1] * 64)}), {"a": torch.zeros([1] * 64)})
