"""The real commit, delta, retention and sweep through runs like those of commit_model.py: nothing is lost in them.

Each storage call is a scheduling point, after any of which a process may stop for ever. Of each run of one or two
incarnations below every interleaving is walked, of the run of three a sample of 400 is drawn. Only creates lose
answers, having been done or not or being done later, and in each process only as many as `EVERYTHING` says of its run:
of the two with a prune beside a delta one, and of the one with a whole manager none, for with more they would not end
in time. Without any one rule of the protocol, in a copy of the source, the run that needs it finds what is lost.
"""

from __future__ import annotations

import gc
from functools import partial

import pytest
import torch

from dtruntime_torch.checkpoint import catalog, restore
from dtruntime_torch.errors import CheckpointNotFound
from dtruntime_torch.storage import MemoryBackend
from tests.checkpoint.commits import NAME
from tests.checkpoint.walk import Job, Walk
from tests.checkpoint.walk_code import WITHOUT, Code, load_code
from tests.checkpoint.walk_jobs import judge, prune, save, state_of
from tests.checkpoint.walk_sample import Sample
from tests.checkpoint.walk_storage import at_once

LIMIT = 1_000_000
Run = tuple[list[Job], ...]


@pytest.fixture(autouse=True)
def _no_collector():
    """Nothing of a walk is garbage, and looking for it takes as long as the walk."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def runs_of(code: Code) -> dict[str, Run]:
    """The jobs of each process. Every save may sweep before and retain afterwards, as those of a manager do."""
    full, delta, take = partial(save, code), partial(save, code, delta=True), prune(code)
    return {
        "two saves": ([full(1)], [full(2)]),
        "one retains": ([full(1), full(2, retains=True)],),
        "one retains what another saves": ([full(1)], [full(2, retains=True)]),
        "a delta on what another saved": ([full(1)], [delta(2, retains=True)]),
        "a delta on each side": ([full(1), delta(2)], [delta(3, retains=True)]),
        "a prune beside a delta": ([full(1), delta(2)], [full(3), take]),
        "a manager beside a delta": ([full(1), delta(2)], [full(3, sweeps=True, retains=True)]),
        "a prune beside many deltas": ([full(1), delta(2), delta(3, retains=True)], [full(4), take]),
        "three": (
            [full(1), delta(2, retains=True), delta(3, retains=True)],
            [delta(2, sweeps=True, retains=True), delta(4, retains=True)],
            [delta(3, sweeps=True, retains=True), full(5, retains=True), take],
        ),
    }


def check_loads(files: dict[str, bytes]) -> None:
    """Loads what is newest, as a job that comes next would."""
    backend = MemoryBackend()
    for path, data in files.items():
        at_once(backend.write(path, data))
    try:
        state = restore.load_fresh(backend, NAME, None, 0)
    except CheckpointNotFound:
        assert not judge(files).live
        return
    newest = at_once(catalog.newest_key(backend, NAME))
    assert newest is not None and isinstance(state, dict)
    assert torch.equal(state["w"], state_of(newest.step)["w"])


# Of each run how many creates of each process may lose their answer, and how many states there are at least.
EVERYTHING = [
    ("two saves", 4, 100),
    ("one retains", 4, 90),
    ("one retains what another saves", 4, 1_000),
    ("a delta on what another saved", 3, 1_000),
    ("a delta on each side", 1, 10_000),
    ("a prune beside a delta", 1, 100_000),
    ("a manager beside a delta", 0, 10_000),
]


@pytest.mark.parametrize(("name", "lost", "at_least"), EVERYTHING, ids=[one[0] for one in EVERYTHING])
def test_nothing_is_lost_in_any_interleaving(name, lost, at_least, monkeypatch, caplog):
    walk = Walk(runs_of(load_code(monkeypatch, {}))[name], judge, lost)
    assert walk.everything(LIMIT) is None, "\n".join(walk.path)
    assert walk.states >= at_least
    for files in walk.ends():
        check_loads(files)
    assert not caplog.records, "cleaning failed, and was not tried out"


def test_cleaning_takes_what_is_not_kept(monkeypatch):
    walk = Walk(runs_of(load_code(monkeypatch, {}))["one retains"], judge, lost=0)
    assert walk.everything(LIMIT) is None
    *_, files = walk.ends()
    assert not [path for path in files if "step-00000001" in path]
    assert judge(files).live == {"model/commits/0001-00000002.json"}


def test_nothing_is_lost_in_a_sample_of_three_incarnations(monkeypatch):
    sample = Sample(runs_of(load_code(monkeypatch, {}))["three"], judge, lost=2, seed=20260101)
    for _ in range(400):
        found, disk = sample.run()
        assert found is None, "\n".join(sample.path)
        check_loads(dict(disk.files))
    assert sample.kinds >= {"committed", "lost", "stale", "CommitConflict"}


# Of each rule a run that needs it, and how many creates of each process may lose their answer there.
NEEDS = {
    "intent": ("a delta on each side", 0, "I1"),
    "parent": ("a delta on each side", 0, "I1"),
    "readback": ("two saves", 1, "I3"),
    "first": ("a delta on each side", 0, "I1"),
    "void": ("one retains", 1, "I1"),
    "fence": ("a prune beside a delta", 0, "I1"),
    "twice": ("a prune beside many deltas", 0, "I1"),
    "loser": ("a delta on what another saved", 1, "I1"),
}


def test_every_rule_of_the_model_is_switched_off_here():
    assert NEEDS.keys() == WITHOUT.keys() and len(NEEDS) == 8


@pytest.mark.parametrize("rule", NEEDS)
def test_without_any_one_rule_something_is_lost(rule, monkeypatch):
    name, lost, invariant = NEEDS[rule]
    walk = Walk(runs_of(load_code(monkeypatch, WITHOUT[rule]))[name], judge, lost)
    assert str(walk.everything(LIMIT)).startswith(invariant)
    assert walk.path


@pytest.mark.parametrize("name", ["two saves", "one retains what another saves"])
def test_a_process_is_what_its_frames_hold(name, monkeypatch):
    """That the walk merges no two states which go on differently: by histories it comes to the same disks."""
    code = load_code(monkeypatch, {})
    disks = []
    for merge in (True, False):
        walk = Walk(runs_of(code)[name], judge, lost=1, merge=merge)
        assert walk.everything(LIMIT) is None
        disks.append({frozenset(files.items()) for files in walk.ends()})
    assert disks[0] == disks[1]
