"""What DCP's own tests and its users do in one process, through its reader and writer and through ours: no difference."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict, _load_state_dict_from_keys

import dtruntime_torch as dt
from dtruntime_torch.errors import InvalidArgument
from tests.checkpoint.dcp.calls import State, equal, load, refused, save


class Doors(NamedTuple):
    writer: Callable[..., Any]
    reader: Callable[..., Any]


STOCK, OURS = Doors(FileSystemWriter, FileSystemReader), Doors(dt.StorageWriter, dt.StorageReader)

pytestmark = pytest.mark.filterwarnings("ignore:.*single process")
both = pytest.mark.parametrize("doors", [STOCK, OURS], ids=["stock", "ours"])

ROWS = torch.arange(12.0).view(3, 4)
SHARED = torch.ones(4)
STATES: dict[str, State] = {
    "nothing": {},
    "nothing in something": {"a": {}, "b": [], "c": {"d": {}}},
    "no elements": {"a": torch.empty(0), "b": torch.empty(3, 0, 2), "c": torch.tensor(True)},
    "lists in lists": {"a": [[torch.tensor(2), "x"], [1, 2], {"b": [44]}], "c": ["x", [{"d": "y"}]]},
    "numbers as keys": {"a": {0: ROWS, 1: {"b": ROWS}, ("c", 1): ROWS}},
    "names of all kinds": {
        "": ROWS,
        "a/b": ROWS,
        "a b": ROWS,
        "é\n": ROWS,
        "a..b": {"": ROWS},
        "n" * 3000: ROWS,
    },
    "one memory": {"a": SHARED, "b": SHARED, "c": SHARED[:2], "d": torch.ones(1).expand(5)},
    "strided": {
        "a": ROWS.t(),
        "b": ROWS[:, 1],
        "c": ROWS[::2],
        "d": torch.ones(2, dtype=torch.cfloat).conj().imag,
    },
    "with gradients": {"a": nn.Parameter(ROWS.clone()), "b": ROWS.clone().requires_grad_() * 2},
    "other dicts": {"a": OrderedDict(b=ROWS, c=1), "d": defaultdict(list, {"e": [1]})},
    "a random state": {"a": torch.get_rng_state()},
}


def blank(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.zeros_like(value, memory_format=torch.contiguous_format)
    if isinstance(value, dict):
        return {key: blank(item) for key, item in value.items()}
    return [blank(item) for item in value] if isinstance(value, list) else None


def failure(act: Callable[[], object]) -> str:
    with pytest.raises(CheckpointException) as caught:
        act()
    ((error, _),) = caught.value.failures.values()
    return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("staged", [False, True], ids=["as it is", "staged"])
def test_a_state_comes_back_as_it_does_from_stock(tmp_path: Path, name: str, staged: bool) -> None:
    state, found = STATES[name], []
    for n, doors in enumerate((STOCK, OURS)):
        save(dt.PinnedStager().stage(state) if staged else state, doors.writer(tmp_path / str(n)))
        found.append(load(blank(state), doors.reader(tmp_path / str(n))))
    assert equal(found[1], found[0])


@pytest.mark.parametrize("state", [{"a": {"b": ROWS}, "a.b": ROWS}, {"a": {0: ROWS, "0": ROWS}}], ids=str)
def test_two_leaves_of_one_name_are_refused(tmp_path: Path, state: State) -> None:
    told = []
    for doors in (STOCK, OURS):
        told.append(failure(partial(save, state, doors.writer(tmp_path / "one"))))
    assert told[0] == told[1] and "duplicated" in told[1]


@pytest.mark.parametrize("name", ["__metadata__", "\ud800"], ids=ascii)
def test_a_name_that_safetensors_cannot_have_is_refused(tmp_path: Path, name: str) -> None:
    with refused(InvalidArgument, "cannot name a tensor"):
        save({name: ROWS}, tmp_path)
    assert not (tmp_path / "manifest.json").exists()


def trained() -> State:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return {
        "model": dict(model.state_dict()),
        "optimizer": optimizer.state_dict(),
        "step": 5,
        "more": [ROWS, 2],
    }


@pytest.mark.parametrize(
    "keys", [None, "model", {"optimizer.state"}, "optimizer.state.0", {"step", "more"}, "no"], ids=str
)
def test_a_part_is_loaded_by_its_keys_without_a_state(tmp_path: Path, keys: set[str] | str | None) -> None:
    state, found = trained(), []
    for n, doors in enumerate((STOCK, OURS)):
        save(state, doors.writer(tmp_path / str(n)))
        found.append(_load_state_dict_from_keys(keys, storage_reader=doors.reader(tmp_path / str(n))))
    assert equal(found[1], found[0])


def test_a_checkpoint_becomes_a_file_of_torch_save(tmp_path: Path) -> None:
    state = trained()
    save(state, tmp_path / "one")
    found: State = {}
    _load_state_dict(
        found,
        storage_reader=dt.StorageReader(tmp_path / "one"),
        planner=_EmptyStateDictLoadPlanner(),
        no_dist=True,
    )
    torch.save(found, tmp_path / "whole.pt")
    whole = torch.load(tmp_path / "whole.pt", weights_only=True)
    assert equal(whole["model"], state["model"]) and equal(whole["more"], state["more"])
    assert whole["optimizer"]["param_groups"] == state["optimizer"]["param_groups"]


def test_a_file_of_torch_save_becomes_a_checkpoint(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    torch.save({"model": model.state_dict()}, tmp_path / "whole.pt")
    save(torch.load(tmp_path / "whole.pt", weights_only=True), tmp_path / "one")
    other = nn.Linear(2, 2)
    load({"model": other}, tmp_path / "one")
    assert equal(dict(other.state_dict()), dict(model.state_dict()))


class Longer(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 2)
        self.more = nn.Parameter(torch.full((2,), 7.0))


@both
def test_a_key_that_was_not_saved_is_refused_unless_told_otherwise(tmp_path: Path, doors: Doors) -> None:
    model, other = nn.Linear(2, 2), Longer()
    save({"model": model}, doors.writer(tmp_path))
    assert "Missing key" in failure(lambda: load({"model": other}, doors.reader(tmp_path)))
    load({"model": other}, doors.reader(tmp_path), planner=DefaultLoadPlanner(allow_partial_load=True))
    assert torch.equal(other.weight, model.weight) and (other.more == 7).all()


@both
def test_another_size_is_refused(tmp_path: Path, doors: Doors) -> None:
    save({"w": ROWS}, doors.writer(tmp_path))
    assert "Size mismatch" in failure(lambda: load({"w": torch.zeros(4, 3)}, doors.reader(tmp_path)))


class Noting(dict[str, Any]):
    noted = False

    def __setitem__(self, key: str, value: Any) -> None:
        self.noted = True
        super().__setitem__(key, value)


class Loads:
    loaded = False

    def state_dict(self) -> State:
        return {}

    def load_state_dict(self, state: State) -> None:
        self.loaded = True


@both
def test_what_has_a_state_is_loaded_and_what_is_one_is_put_in_its_place(tmp_path: Path, doors: Doors) -> None:
    (stateful := Noting())["a"] = (inner := Loads())
    (plain := Noting())["a"] = {"w": ROWS, "n": [1, 2]}
    for name, state in (("stateful", stateful), ("plain", plain)):
        state.noted = False
        save(state, doors.writer(tmp_path / name))
        load(state, doors.reader(tmp_path / name))
    assert (inner.loaded, stateful.noted, plain.noted) == (True, False, True)
