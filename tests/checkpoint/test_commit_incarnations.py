"""Two jobs that save in one place: who comes after whom, who touches what, and what each is told."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]  # torch does not list it

import dtruntime_torch as dt
from dtruntime_torch.checkpoint import catalog
from dtruntime_torch.checkpoint.manifest import Manifest
from dtruntime_torch.errors import CommitConflict
from dtruntime_torch.storage import LocalBackend, MemoryBackend, StorageBackend, run_sync
from dtruntime_torch.testing.faulty_backend import FaultyBackend, Stopped
from tests.checkpoint.sound import CHUNK, check_equal, check_sound, state_of


def manager_on(storage: StorageBackend | Path, store: object = None) -> dt.CheckpointManager:
    return dt.CheckpointManager(storage, chunk_bytes=CHUNK, keep_last_n=None, store=store)


def newest(storage: StorageBackend) -> dt.CheckpointInfo:
    """Loads the newest and checks every bit of it."""
    with manager_on(storage) as manager:
        state = state_of(0)
        info = manager.load(state)
    check_equal(state, info.step)
    return info


def manifest_of(backend: StorageBackend, info: dt.CheckpointInfo) -> Manifest:
    commit = run_sync(catalog.read_commit(backend, info.name, info.key))
    return run_sync(catalog.read_manifest(backend, commit))


def stopped_at(inner: StorageBackend, operation: str, pattern: str) -> tuple[FaultyBackend, Stopped]:
    backend, stopped = FaultyBackend(inner), Stopped()
    backend.when(operation, pattern, stopped)
    return backend, stopped


# Where one is stopped, and whether it still commits: what has no files yet is swept by nobody.
STOPS = [
    ("write", "*.safetensors", True),
    ("write", "*/manifest.json", False),
    ("create", "*/commits/*", False),
]


@pytest.mark.parametrize(("operation", "pattern", "commits"), STOPS)
def test_a_zombie_of_the_same_run_and_restart_count_hides_nothing(monkeypatch, operation, pattern, commits):
    """torchrun gives both the same names, and they share its Store."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    inner, store = MemoryBackend(), HashStore()
    with manager_on(inner) as first:
        first.save(state_of(1), 1)
    backend, stopped = stopped_at(inner, operation, pattern)
    zombie, successor = manager_on(backend, store), manager_on(inner, store)
    zombie.load(state_of(0))
    handle = zombie.save_async(state_of(2), 2)
    stopped.reached.wait()

    successor.load(state_of(0))
    saved = successor.save(state_of(2), 2)
    stopped.release()
    if commits:
        assert handle.result().generation < saved.generation
    else:
        with pytest.raises(CommitConflict, match="is void: a later job swept it"):
            handle.result()
    assert newest(inner) == saved
    with pytest.raises(CommitConflict, match=f"generation {saved.generation} .process {os.getpid()}"):
        zombie.save(state_of(3), 3)
    assert successor.save(state_of(3), 3) == newest(inner)
    assert check_sound(inner) == ([1, 2, 2, 3] if commits else [1, 2, 3])


@pytest.mark.parametrize("at_once", [True, False])
def test_two_that_save_the_same_step_never_touch_each_others_files(at_once):
    inner = MemoryBackend()
    with manager_on(inner) as before:
        before.save(state_of(1), 1)
    one_side, stopped = stopped_at(inner, "write", "*.safetensors")
    other_side = FaultyBackend(inner)
    with manager_on(one_side) as one, manager_on(other_side) as other:
        one.load(state_of(0))
        handle = one.save_async(state_of(2), 2)
        stopped.reached.wait()
        if not at_once:
            stopped.release()
            handle.result()
        other.load(state_of(0), step=1)
        second = other.save(state_of(2), 2)
        stopped.release()
        first = handle.result()
    changed = [
        {path for operation, path in backend.calls if operation in ("write", "create", "delete")}
        for backend in (one_side, other_side)
    ]
    assert not changed[0] & changed[1]
    assert (first.generation, second.generation) == (2, 3)
    assert newest(inner) == second
    assert check_sound(inner) == [1, 2, 2]


def test_who_was_replaced_is_told_by_which_process_on_which_host():
    backend = MemoryBackend()
    with manager_on(backend) as old, manager_on(backend) as new:
        old.save(state_of(1), 1)
        new.load(state_of(0))
        new.save(state_of(2), 2)
        who = rf"generation 2 \(process {os.getpid()} on {socket.gethostname()}, since "
        with pytest.raises(CommitConflict, match=who):
            old.save(state_of(2), 2)


def test_a_job_that_loads_step_500_of_1000_goes_on_from_there():
    backend = MemoryBackend()
    with manager_on(backend) as manager:
        for step in (500, 1000):
            manager.save(state_of(step % 7), step)
    with manager_on(backend) as manager:
        state = state_of(0)
        rolled_back = manager.load(state, step=500)
        check_equal(state, 500 % 7)
        for step in (501, 502):
            saved = manager.save(state_of(step % 7), step)
        assert saved.generation == rolled_back.generation + 1
    with manager_on(backend) as manager:
        state = state_of(0)
        assert manager.load(state) == saved
        check_equal(state, 502 % 7)
        # What was left behind is still there, and what was saved again comes before it.
        assert [info.step for info in manager.list()] == [500, 1000, 501, 502]
        assert manager.save(state_of(3), 503).generation == 3


def test_a_roll_back_that_saves_the_same_step_again_has_files_of_its_own(tmp_path):
    with manager_on(tmp_path) as manager:
        first = [manager.save(state_of(step), step) for step in (1, 2)]
    with manager_on(tmp_path) as manager:
        manager.load(state_of(0), step=1)
        again = manager.save(state_of(2), 2)
    assert again.path != first[1].path
    backend = LocalBackend(tmp_path)
    folders = {entry.path for entry in run_sync(backend.list("model/step-00000002/", "/"))}
    assert folders == {f"{info.path}/" for info in (first[1], again)}
    assert newest(backend) == again


def test_the_manifest_says_who_saved_after_whom():
    backend = MemoryBackend()
    with manager_on(backend) as manager:
        one, two = (manager.save(state_of(step), step) for step in (1, 2))
    with manager_on(backend) as manager:
        manager.load(state_of(0), step=1)
        three = manager.save(state_of(2), 2)
    manifests = [manifest_of(backend, info) for info in (one, two, three)]
    assert [manifest.parent for manifest in manifests] == [None, (1, 1), (1, 1)]
    runs = [manifest.run_id for manifest in manifests]
    assert runs[0] == runs[1] != runs[2]
