"""A flattener that has seen states before gives what one that has not would give, whatever changed between them."""

from __future__ import annotations

import gc
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from dtruntime_torch import PerRank
from dtruntime_torch.checkpoint.flatten import FlatState, Flattener, flatten_state
from dtruntime_torch.checkpoint.state.local_shard import memory_of
from dtruntime_torch.errors import DTRuntimeError

State = dict[Any, Any]
Change = Callable[[State, str, str], None]


class Other(torch.Tensor):
    """A class that a save refuses outside of modules."""


class Counter:
    """A stateful object."""

    def __init__(self, count: object) -> None:
        self.count = count

    def state_dict(self) -> dict[str, object]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, object]) -> None:
        self.count = state["count"]


@pytest.fixture(scope="module", autouse=True)
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def make_state() -> State:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    shared = torch.zeros(4, 4)
    return {
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters()),
        "w": {name: torch.zeros(4, 4) for name in "abcd"},
        "tied": [shared, shared, {"view": shared[0]}],
        "epoch": 1,
        "none": {},
    }


def set_to(make: Callable[[Any], object]) -> Change:
    """Puts what is made of a value into its place."""

    def change(state: State, one: str, other: str) -> None:
        if one in state["w"]:
            state["w"][one] = make(state["w"][one])

    return change


def sharded(value: object) -> DTensor:
    return DTensor.from_local(torch.zeros(4, 4), init_device_mesh("cpu", (1,)), [Shard(0)])


def replicated(value: object) -> DTensor:
    return DTensor.from_local(torch.zeros(4, 4), init_device_mesh("cpu", (1,)), [Replicate()])


def tie(state: State, one: str, other: str) -> None:
    state["w"][one] = state["w"].get(other, 0)


def tie_to_a_parameter(state: State, one: str, other: str) -> None:
    if "model" in state:
        state["w"][one] = state["model"][0].weight


def move_data(state: State, one: str, other: str) -> None:
    """The tensor stays, what it is changes."""
    tensor = state["w"].get(one)
    if type(tensor) is torch.Tensor and tensor.is_cpu and tensor.layout is torch.strided:
        tensor.data = torch.zeros(2, 5, dtype=torch.bfloat16)


def remove(state: State, one: str, other: str) -> None:
    state["w"].pop(one, None)


def to_the_end(state: State, one: str, other: str) -> None:
    if one in state["w"]:
        state["w"][one] = state["w"].pop(one)


def drop_optimizer(state: State, one: str, other: str) -> None:
    state.pop("optimizer", None)


def step(state: State, one: str, other: str) -> None:
    if "optimizer" in state:
        for parameter in state["model"].parameters():
            parameter.grad = torch.ones_like(parameter)
        state["optimizer"].step()


def new_groups(state: State, one: str, other: str) -> None:
    parameters = list(state["model"].parameters())
    groups = [{"params": parameters[:2]}, {"params": parameters[2:]}]
    state["optimizer"] = torch.optim.SGD(groups, lr=0.1, momentum=0.9)


def new_model(state: State, one: str, other: str) -> None:
    state["model"] = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    state.pop("optimizer", None)


def half_model(state: State, one: str, other: str) -> None:
    state["model"].bfloat16()
    state["optimizer"] = torch.optim.AdamW(state["model"].parameters())


def other_key(key: object) -> Change:
    """A key that is equal to others, and called otherwise."""

    def change(state: State, one: str, other: str) -> None:
        state["keys"] = {key: torch.zeros(1)}

    return change


def other_container(kind: Callable[[Any], object]) -> Change:
    def change(state: State, one: str, other: str) -> None:
        state["w"] = kind(state["w"])

    return change


def more_tied(state: State, one: str, other: str) -> None:
    state["tied"].append(torch.zeros(1) if one < other else state["tied"][0])


def fewer_tied(state: State, one: str, other: str) -> None:
    del state["tied"][1:]


CHANGES: list[Change] = [
    set_to(lambda value: torch.zeros(4, 4)),
    set_to(lambda value: torch.zeros(4, 4, dtype=torch.int32)),
    set_to(lambda value: torch.zeros(16)),
    set_to(lambda value: torch.zeros(0, 4)),
    set_to(lambda value: torch.zeros(4, 4).T),
    set_to(lambda value: torch.zeros(4, 4, dtype=torch.complex64).conj()),
    set_to(lambda value: torch.zeros(4, 4, dtype=torch.complex64).conj().imag),
    set_to(lambda value: nn.Parameter(torch.zeros(4, 4))),
    set_to(lambda value: Other(torch.zeros(4, 4))),
    set_to(lambda value: torch.zeros(4, 4, device="meta")),
    set_to(lambda value: torch.zeros(4, 4).to_sparse()),
    set_to(sharded),
    set_to(replicated),
    set_to(PerRank),
    set_to(lambda value: value.value if isinstance(value, PerRank) else value),
    set_to(lambda value: b"some bytes"),
    set_to(lambda value: 17),
    set_to(lambda value: {}),
    set_to(lambda value: {"in": value}),
    set_to(lambda value: {"count": value.count} if isinstance(value, Counter) else Counter(value)),
    set_to(lambda value: object()),
    tie,
    tie_to_a_parameter,
    move_data,
    remove,
    to_the_end,
    drop_optimizer,
    step,
    new_groups,
    new_model,
    half_model,
    *map(other_key, (1, True, 1.0, "1", (1,), (True,))),
    *map(other_container, (dict, OrderedDict)),
    more_tied,
    fewer_tied,
]
NAMES = st.sampled_from("abcde")


def taken_apart(flatten: Callable[[object], FlatState], state: State) -> FlatState | str:
    """What a flattener gave, or what it raised."""
    try:
        return flatten(state)
    except DTRuntimeError as error:
        return repr(error)


def check_same(found: FlatState | str, expected: FlatState | str, again: FlatState | str) -> None:
    """Both are what a fresh look gives: what has other memory in the second is a copy, as of bytes."""
    if isinstance(found, str) or isinstance(expected, str) or isinstance(again, str):
        assert found == expected
        return
    # 1 and True are equal, and print otherwise.
    assert repr(found.specs) == repr(expected.specs)
    assert (repr(found.values), list(found.tensors)) == (repr(expected.values), list(expected.tensors))
    for fqn, tensor in expected.tensors.items():
        assert type(found.tensors[fqn]) is torch.Tensor and not found.tensors[fqn].requires_grad
        if memory_of(tensor) == memory_of(again.tensors[fqn]):
            assert memory_of(found.tensors[fqn]) == memory_of(tensor)
        else:
            assert torch.equal(found.tensors[fqn], tensor)


@settings(max_examples=150)
@given(
    rounds=st.lists(
        st.lists(st.tuples(st.sampled_from(range(len(CHANGES))), NAMES, NAMES), max_size=3), max_size=6
    )
)
def test_what_was_seen_before_changes_nothing(rounds: list[list[tuple[int, str, str]]]) -> None:
    state, flattener = make_state(), Flattener(0)
    flattener.flatten(state)
    for changes in rounds:
        for number, one, other in changes:
            CHANGES[number](state, one, other)
        expected, again = (taken_apart(partial(flatten_state, rank=0), state) for _ in range(2))
        check_same(taken_apart(flattener.flatten, state), expected, again)


def test_the_specs_of_an_unchanged_state_are_the_very_same() -> None:
    state, flattener = make_state(), Flattener(0)
    step(state, "", "")
    assert flattener.flatten(state).specs is flattener.flatten(state).specs


def test_no_tensor_outlives_its_state(mesh: DeviceMesh) -> None:
    flattener = Flattener(0)
    state = make_state()
    step(state, "", "")
    state["sharded"] = DTensor.from_local(torch.zeros(4), mesh, [Shard(0)])
    flattener.flatten(state)
    held = [weakref.ref(tensor) for tensor in flattener.flatten(state).tensors.values()]
    held += [weakref.ref(tensor) for tensor in (*state["model"].parameters(), *state["w"].values())]
    state.clear()
    gc.collect()
    assert not any(ref() is not None for ref in held)


def test_no_mesh_is_kept() -> None:
    """It holds a tensor, too."""
    flattener, mesh = Flattener(0), init_device_mesh("cpu", (1,))
    state: State = {"w": DTensor.from_local(torch.zeros(4), mesh, [Shard(0)])}
    for _ in range(2):  # what a state had that is gone is forgotten as a whole
        flattener.flatten(state)
    held = weakref.ref(mesh)
    state.clear()
    del mesh
    gc.collect()
    assert held() is None


def test_names_that_are_gone_are_forgotten() -> None:
    """As those of a buffer whose keys count up."""
    flattener = Flattener(0)
    for start in range(0, 1000, 10):
        flattener.flatten({"w": {f"k{number}": 0 for number in range(start, start + 10)}})
    assert len(flattener._root.child("dict", "w").inside("dict")) == 10
