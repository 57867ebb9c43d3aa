"""The walk over a state, beside the one of torch.distributed.checkpoint."""

from __future__ import annotations

from collections import Counter, OrderedDict
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint._nested_dict import flatten_state_dict

from dtruntime_torch.checkpoint.specs import PathKey
from dtruntime_torch.checkpoint.state.codecs import register_codecs
from dtruntime_torch.checkpoint.state.traverse import PerRank, nodes
from dtruntime_torch.errors import InvalidArgument, UnsupportedType

register_codecs()

SCALARS = st.none() | st.booleans() | st.integers() | st.text(max_size=3)
TENSORS = st.builds(torch.zeros, st.integers(0, 3))
KEYS = st.text("abc", min_size=1, max_size=2)


def with_tensor(state: dict[str, object]) -> dict[str, object]:
    return {**state, "t": torch.zeros(1)}


# Where both agree: no tuples, and no dict in a list without a tensor.
SHARED = st.recursive(
    SCALARS | TENSORS,
    lambda inner: (
        st.dictionaries(KEYS, inner, min_size=1, max_size=3)
        | st.lists(
            SCALARS | TENSORS | st.dictionaries(KEYS, inner, max_size=2).map(with_tensor),
            min_size=1,
            max_size=3,
        )
    ),
    max_leaves=10,
)


@given(st.dictionaries(KEYS, SHARED, max_size=4))
def test_leaves_are_those_of_dcp(state):
    expected, paths = flatten_state_dict(state)
    found = list(nodes(state))
    assert [node.fqn for node in found] == list(expected)
    assert all(node.value is expected[node.fqn] for node in found)
    assert [tuple(step.key for step in node.path) for node in found] == list(paths.values())


def names(state: object) -> list[str]:
    return [node.fqn for node in nodes(state)]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({}, ["x"]),
        ([], ["x"]),
        ([1, [2, {"a": 3}]], ["x"]),
        ([1, [2, {"a": torch.ones(1)}]], ["x.0", "x.1.0", "x.1.1.a"]),
        ((1, torch.ones(1)), ["x.0", "x.1"]),
        ((1, (2, 3)), ["x"]),
        ({1: "a", 2: "b"}, ["x"]),
        ({1: "a", 2: torch.ones(1)}, ["x.1", "x.2"]),
        ({1: [torch.ones(1)]}, ["x.1.0"]),
        ({"a": {}, "b": {"c": {}}}, ["x.a", "x.b.c"]),
        (OrderedDict(b=1, a=2), ["x.b", "x.a"]),
        (MappingProxyType({"a": 1}), ["x.a"]),
        ([torch.optim.SGD([torch.zeros(1)]), 1], ["x.0", "x.1"]),
        ([PerRank(1)], ["x.0"]),
        ([np.zeros(2)], ["x"]),
        (Counter({"a": 1}), ["x"]),
    ],
    ids=repr,
)
def test_what_is_entered_and_what_is_one_leaf(value, expected):
    assert names({"x": value}) == expected


def test_an_empty_state_has_no_leaves():
    assert names({}) == []


def test_bytes_are_one_leaf():
    (node,) = nodes(b"abc")
    assert (node.path, node.value) == ((), b"abc")
    assert node.fqn


def test_paths_keep_keys_and_containers():
    state = {"a": {(1, None): [torch.ones(1), (torch.ones(1),)]}}
    assert [node.path for node in nodes(state)] == [
        (PathKey("dict", "a"), PathKey("dict", (1, None)), PathKey("list", 0)),
        (PathKey("dict", "a"), PathKey("dict", (1, None)), PathKey("list", 1), PathKey("tuple", 0)),
    ]


def test_an_empty_key_is_a_name_too():
    assert names({"": {"": 1, "a": 2}}) == [".", ".a"]


def test_what_lies_in_per_rank_is_marked():
    state = {"a": 1, "b": PerRank({"c": torch.ones(1), "d": [1]}), "e": {"f": PerRank(2)}}
    assert {node.fqn: node.per_rank for node in nodes(state)} == {
        "a": False,
        "b.c": True,
        "b.d": True,
        "e.f": True,
    }


def test_stateful_objects_are_not_entered():
    model = torch.nn.Linear(1, 1)
    (node,) = nodes({"a": {"b": model}})
    assert node.value is model


class StatefulDict(dict):  # type: ignore[type-arg]
    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def test_a_dict_with_a_state_of_its_own_is_asked_for_it():
    value = StatefulDict(a=1)
    (node,) = nodes({"x": value})
    assert node.value is value


@pytest.mark.parametrize(
    "state",
    [torch.nn.Linear(1, 1), StatefulDict(a=1), torch.ones(1), 3, None, [torch.ones(1)], PerRank({})],
    ids=lambda state: type(state).__name__,
)
def test_a_state_is_a_dict_or_bytes(state):
    with pytest.raises(InvalidArgument, match="model"):
        list(nodes(state))


def cyclic(kind: str) -> object:
    container: object = {"t": torch.ones(1)} if kind == "dict" else [torch.ones(1)]
    if isinstance(container, dict):
        container["me"] = container
    elif isinstance(container, list):
        container.append(container)
    if kind == "per rank":
        container = PerRank(None)
        container.value = container
    return container


@pytest.mark.parametrize("kind", ["dict", "list", "per rank"])
def test_what_contains_itself_is_refused(kind):
    with pytest.raises(UnsupportedType, match=r"^a\.b.*contains itself"):
        list(nodes({"a": {"b": cyclic(kind)}}))


def test_a_cycle_without_a_tensor_is_one_leaf():
    cycle: list[object] = [1]
    cycle.append(cycle)
    assert names({"a": cycle}) == ["a"]


def test_what_is_shared_is_no_cycle():
    shared = {"t": torch.ones(1)}
    assert names({"a": shared, "b": shared}) == ["a.t", "b.t"]


def test_many_paths_to_one_list_are_looked_at_once():
    value: list[object] = [1]
    for _ in range(60):
        value = [value, value]
    assert names({"a": value}) == ["a"]


def test_too_deep_is_refused():
    state: dict[str, object] = {"t": torch.ones(1)}
    for _ in range(80):
        state = {"a": state}
    with pytest.raises(UnsupportedType, match="64 containers"):
        list(nodes(state))


def test_a_key_that_cannot_be_stored_is_refused():
    with pytest.raises(UnsupportedType, match=r"a\.b, a key of it: .*object"):
        list(nodes({"a": {"b": {object(): torch.ones(1)}}}))


@pytest.mark.parametrize(
    "key",
    [frozenset("ab"), (1, frozenset("ab")), np.int64(1), torch.float32, torch.Size([1])],
    ids=lambda key: type(key).__name__,
)
def test_only_plain_keys_give_names_to_tensors(key):
    with pytest.raises(UnsupportedType, match=r"^a, a key of it: a \w+ gives no name"):
        list(nodes({"a": {key: torch.ones(1)}}))
    assert names({"a": {key: 1}}) == ["a"]


def test_replacing_reaches_the_users_containers():
    pair = (torch.ones(1), 1)
    state = {
        "a": {"b": [torch.ones(1), 2]},
        "c": pair,
        "d": PerRank(4),
        "e": [(torch.ones(1), (5, torch.ones(1)))],
    }
    for node in nodes(state):
        if not isinstance(node.value, torch.Tensor):
            node.replace(node.value * 10)
    assert state["a"]["b"][1] == 20
    assert state["c"] == (pair[0], 10)
    assert isinstance(state["d"], PerRank)
    assert state["d"].value == 40
    assert state["e"][0][1][0] == 50


def test_two_places_of_a_tuple_may_be_replaced():
    state = {"x": (1, torch.ones(1), 2)}
    for node in nodes(state):
        if not isinstance(node.value, torch.Tensor):
            node.replace(-node.value)
    assert (state["x"][0], state["x"][2]) == (-1, -2)


def test_what_cannot_be_changed_says_so():
    (node,) = nodes({"a": MappingProxyType({"b": 1})})
    with pytest.raises(InvalidArgument, match="mappingproxy"):
        node.replace(2)


class Pair(NamedTuple):
    tensor: torch.Tensor
    count: int


def test_a_named_tuple_stays_one():
    state = {"x": Pair(torch.ones(1), 3)}
    next(node for node in nodes(state) if node.fqn == "x.1").replace(4)
    assert isinstance(state["x"], Pair)
    assert state["x"].count == 4
