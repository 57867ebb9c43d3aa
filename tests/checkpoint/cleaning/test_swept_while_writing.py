"""Another manager sweeps or prunes while a job is in the middle of writing its part to real files."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

import dtruntime_torch as dt
from dtruntime_torch.checkpoint.cleaning.cleaner import Cleaner
from dtruntime_torch.checkpoint.names import Attempt, CommitKey
from dtruntime_torch.errors import CommitConflict, SaveFailed
from dtruntime_torch.storage import LocalBackend, run_sync
from dtruntime_torch.storage.system_calls import SystemCalls
from tests.checkpoint.sound import CHUNK, check_sound, state_of

PATIENCE = 60.0  # seconds, after which a test has failed
DATA, PART = 1, 2  # the files of a part, in the order in which they are written
PLACES = ["before", "half", "unnamed", "named"]
ATTEMPT = "step-00000002/0001-1"  # of who is held up


class Halting(SystemCalls):
    """A disk that holds the writing of one file of step 2 up, at one place, until it is told to go on.

    Args:
        nth: which file, from 1.
        place: "before" there is anything of it; when "half" of its bytes are there; when all are, but "unnamed"; "named".
    """

    def __init__(self, nth: int, place: str) -> None:
        self.reached, self.go_on = threading.Event(), threading.Event()
        self._left, self._place = nth, place
        self._temporary = ""

    def write_file(self, path: str, data: Sequence[memoryview]) -> None:
        if "/step-00000002/" in path:
            self._left -= 1
        if self._left or self._temporary:
            super().write_file(path, data)
            return
        self._temporary = path
        self._halt_if("before")
        whole = b"".join(data)
        with open(path, "xb", buffering=0) as file:
            file.write(whole[: len(whole) // 2])
            self._halt_if("half")
            file.write(whole[len(whole) // 2 :])
            os.fsync(file.fileno())

    def rename(self, source: str, target: str) -> None:
        ours = source == self._temporary
        if ours:
            self._halt_if("unnamed")
        super().rename(source, target)
        if ours:
            self._halt_if("named")

    def _halt_if(self, place: str) -> None:
        if place == self._place:
            self.reached.set()
            assert self.go_on.wait(PATIENCE)


def manager_on(storage: Path | LocalBackend, **options: object) -> dt.CheckpointManager:
    kept = {"keep_last_n": 1, **options}
    return dt.CheckpointManager(storage, chunk_bytes=CHUNK, **kept)  # type: ignore[arg-type]


@contextmanager
def halted(
    folder: Path, disk: Halting, *before: int, **options: object
) -> Iterator[tuple[dt.CheckpointManager, dt.SaveHandle]]:
    """A job that has saved some steps and is held up in the writing of step 2."""
    with manager_on(LocalBackend(folder, calls=disk), **options) as first:
        for step in before:
            first.save(state_of(step), step)
        handle = first.save_async(state_of(2), 2)
        try:
            assert disk.reached.wait(PATIENCE)
            yield first, handle
        finally:
            # A test that fails before it lets the job go on would else wait for that in the close.
            disk.go_on.set()


def replace_first(folder: Path, disk: Halting) -> dt.CheckpointManager:
    """A job that follows sweeps, saves step 2 and prunes the step before it; then the first one goes on."""
    second = manager_on(folder)
    second.load(state_of(0))
    second.save(state_of(2), 2)
    disk.go_on.set()
    return second


def left_of(folder: Path, attempt: str) -> list[str]:
    """The files of an attempt, also those that were never finished."""
    backend, prefix = LocalBackend(folder), f"model/{attempt}/"
    entries = run_sync(backend.list(prefix)) + run_sync(backend.unfinished(prefix))
    return [entry.path for entry in entries]


def check_second_replaced_first(
    folder: Path, first: dt.CheckpointManager, second: dt.CheckpointManager
) -> None:
    """What the second has saved is there, and nothing of the first's; the second saves, and the first is told who does."""
    storage = LocalBackend(folder)
    assert check_sound(storage) == [2]
    newest = second.latest()
    assert newest is not None and newest.generation == 2
    with pytest.raises(CommitConflict, match="was replaced by generation 2"):
        first.save(state_of(3), 3)
    assert second.save(state_of(3), 3).generation == 2
    assert check_sound(storage) == [3]
    assert left_of(folder, ATTEMPT) == []


@pytest.mark.parametrize("delta", [False, True], ids=["full", "delta"])
@pytest.mark.parametrize("place", ["half", "unnamed", "named"])
@pytest.mark.parametrize("nth", [DATA, PART], ids=["data", "part"])
def test_who_is_swept_while_its_file_is_on_its_way_is_told_that_the_file_was_deleted(
    tmp_path, nth, place, delta
):
    disk = Halting(nth, place)
    with halted(tmp_path, disk, 1, delta=delta) as (first, handle), replace_first(tmp_path, disk) as second:
        with pytest.raises(
            SaveFailed, match=r"0001-1/shard-00000-of-00001\.\w+: .*is not there, or no longer"
        ):
            handle.result()
        check_second_replaced_first(tmp_path, first, second)


@pytest.mark.parametrize("nth", [DATA, PART], ids=["data", "part"])
def test_who_would_try_again_is_told_who_replaced_it(tmp_path, nth):
    disk = Halting(nth, "half")
    with (
        halted(tmp_path, disk, 1, retry=dt.RetryPolicy(attempts=3, initial=0.0)) as (first, handle),
        replace_first(tmp_path, disk) as second,
    ):
        with pytest.raises(CommitConflict, match="was replaced by generation 2"):
            handle.result()
        check_second_replaced_first(tmp_path, first, second)


def test_who_is_swept_between_two_of_its_files_loses_its_commit(tmp_path):
    disk = Halting(PART, "before")
    with halted(tmp_path, disk, 1) as (first, handle), replace_first(tmp_path, disk) as second:
        with pytest.raises(CommitConflict, match="is void: a later job swept it; load the newest"):
            handle.result()
        check_second_replaced_first(tmp_path, first, second)


def test_who_has_no_file_yet_when_others_are_swept_commits_and_is_the_older(tmp_path):
    disk = Halting(DATA, "before")
    with halted(tmp_path, disk, 1, keep_last_n=None) as (_, handle), replace_first(tmp_path, disk) as second:
        assert handle.result().generation == 1
        assert check_sound(LocalBackend(tmp_path)) == [2, 2]
        second.save(state_of(3), 3)
        assert check_sound(LocalBackend(tmp_path)) == [3]


@pytest.mark.parametrize("nth", [DATA, PART], ids=["data", "part"])
def test_a_delta_that_has_no_file_yet_when_its_parent_is_pruned_is_not_saved_in_full_by_who_was_replaced(
    tmp_path, nth
):
    disk = Halting(nth, "before")
    with halted(tmp_path, disk, 1, delta=True) as (first, handle), replace_first(tmp_path, disk) as second:
        with pytest.raises(CommitConflict, match="was replaced by generation 2"):
            handle.result()
        check_second_replaced_first(tmp_path, first, second)


@pytest.mark.parametrize("delta", [False, True], ids=["full", "delta"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("nth", [DATA, PART], ids=["data", "part"])
def test_a_prune_beside_a_job_that_writes_leaves_that_alone(tmp_path, nth, place, delta):
    disk = Halting(nth, place)
    with (
        halted(tmp_path, disk, 0, 1, keep_last_n=None, delta=delta) as (first, handle),
        manager_on(tmp_path) as other,
    ):
        assert [key.step for key in other.prune().commits] == [0]
        disk.go_on.set()
        assert handle.result().full != delta
        assert check_sound(LocalBackend(tmp_path)) == [1, 2]
        first.save(state_of(3), 3)
        assert [key.step for key in other.prune().commits] == [1, 2]
    assert check_sound(LocalBackend(tmp_path)) == [3]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("nth", [DATA, PART], ids=["data", "part"])
def test_a_delta_whose_parent_is_dropped_while_it_is_written_becomes_a_full_save(tmp_path, nth, place):
    disk = Halting(nth, place)
    with halted(tmp_path, disk, 1, delta=True) as (first, handle):
        dropped = run_sync(Cleaner(LocalBackend(tmp_path), "model").drop(Attempt(1, 1, 1)))
        assert dropped.commits == (CommitKey(1, 1),)
        disk.go_on.set()
        info = handle.result()
        assert info.full and info.path.endswith("0001-2") and left_of(tmp_path, ATTEMPT) == []
        assert check_sound(LocalBackend(tmp_path)) == [2]
        assert not first.save(state_of(3), 3).full
        assert check_sound(LocalBackend(tmp_path)) == [3]
