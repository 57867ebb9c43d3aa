"""Leaves back into containers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from dtruntime_torch.checkpoint.flatten import PerRank, flatten_state
from dtruntime_torch.checkpoint.format.records import ObjectEntry
from dtruntime_torch.checkpoint.loading.load_plan import SavedState
from dtruntime_torch.checkpoint.specs import Path, PathKey
from dtruntime_torch.checkpoint.state.nest import build_state
from dtruntime_torch.errors import CheckpointMismatch, InvalidArgument
from tests.checkpoint.memory_checkpoint import checkpoint_of, exact, load_fresh, save

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=3)
    | st.binary(max_size=3)
    | st.builds(lambda n: torch.full((n,), 2.5), st.integers(0, 3))
)
KEYS = (
    st.text(max_size=3)
    | st.integers()
    | st.booleans()
    | st.none()
    | st.tuples(st.integers(), st.binary(max_size=2))
)
NESTED = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=3)
    ),
    max_leaves=12,
)


@given(st.dictionaries(KEYS, NESTED, max_size=4))
def test_any_state_comes_back_exactly(state):
    try:
        checkpoint = save(state)
    except InvalidArgument:
        # Two leaves of one name, which test_flatten has.
        assume(False)
    assert exact(load_fresh(checkpoint)) == exact(state)


@pytest.mark.parametrize("data", [b"", b"abc"])
def test_bytes_come_back(data):
    assert load_fresh(save(data)) == data


def test_the_order_is_that_of_the_state():
    state = {"b": 1, "a": torch.ones(1), "d": {"z": torch.ones(1), "y": 2}, "c": b"x"}
    loaded = load_fresh(save(state))
    assert isinstance(loaded, dict)
    assert list(loaded) == list(state)
    assert list(loaded["d"]) == ["z", "y"]


def test_tied_tensors_are_one():
    weight = torch.randn(3)
    loaded = load_fresh(save({"a": weight, "b": [weight, weight.clone()]}))
    assert isinstance(loaded, dict)
    assert loaded["a"] is loaded["b"][0]
    assert loaded["a"] is not loaded["b"][1]


def test_what_is_per_rank_is_a_plain_value_of_that_rank():
    flats = [
        flatten_state({"all": 1, "own": PerRank({"rank": r, "t": torch.full((1,), r)})}, r) for r in range(2)
    ]
    assert load_fresh(checkpoint_of(*flats, rank=1)) == {"all": 1, "own": {"rank": 1, "t": torch.ones(1)}}
    assert load_fresh(checkpoint_of(*flats, rank=2)) == {"all": 1}


def stage(names: list[str]) -> dict[str, object]:
    model = torch.nn.ModuleDict({name: torch.nn.Linear(1, 1) for name in names})
    weights = [p for p in model.parameters() if p.dim() == 2]
    biases = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.SGD(
        [{"params": weights, "weight_decay": 0.1}, {"params": biases}],
        lr=torch.tensor(0.5) if "c" in names else 0.5,
    )
    return {"model": model, "optimizer": optimizer}


@pytest.mark.parametrize("second", ["b", "c"], ids=["one object", "taken apart"])
def test_groups_of_pipeline_stages_follow_each_other(second):
    flats = [flatten_state(stage(["a"]), 0), flatten_state(stage([second]), 1)]
    loaded = load_fresh(checkpoint_of(*flats))
    assert isinstance(loaded, dict)
    groups = loaded["optimizer"]["param_groups"]
    assert [group["params"] for group in groups] == [
        ["a.weight"],
        [f"{second}.weight"],
        ["a.bias"],
        [f"{second}.bias"],
    ]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.1, 0, 0]
    assert set(loaded["model"]) == {"a.weight", "a.bias", f"{second}.weight", f"{second}.bias"}


def entry(fqn: str, *path: PathKey, index: int = 0) -> ObjectEntry:
    return ObjectEntry(fqn, path, index, False, None)


def build(*entries: ObjectEntry) -> object:
    return build_state(SavedState({}, {e.fqn: e for e in entries}), {}, {e.fqn: e.fqn for e in entries})


A, B, ZERO = PathKey("dict", "a"), PathKey("dict", "b"), PathKey("list", 0)


@pytest.mark.parametrize(
    ("entries", "where"),
    [
        ((entry("a", A), entry("a.b", A, B)), "a: ranks saved different"),
        ((entry("a.b", A, B), entry("a", A)), "a: ranks saved different"),
        ((entry("a.0", A, ZERO), entry("a.b", A, B)), "a: ranks saved different"),
        ((entry("x", A), entry("y", A)), "a: ranks saved different"),
        ((entry("data"), entry("a", A)), "the state: ranks saved different"),
        (
            (entry("a.0", A, PathKey("list", 0)), entry("a.2", A, PathKey("list", 2))),
            r"a: .*positions \[0, 2\]",
        ),
        ((entry("a.99", A, PathKey("tuple", 10**12)),), "a: .*positions"),
    ],
)
def test_what_fits_into_no_one_state_says_where(entries, where):
    with pytest.raises(CheckpointMismatch, match=f"^{where}"):
        build(*entries)


def test_a_dotted_key_is_one_key():
    path: Path = (A, PathKey("dict", "b.c"), PathKey("list", 0))
    assert build(entry("a.b.c.0", *path)) == {"a": {"b.c": ["a.b.c.0"]}}
