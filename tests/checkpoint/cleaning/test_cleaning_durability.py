"""Deletes that were not synced come back after a power cut: none of them may be one that others stand on."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from dtruntime_torch.checkpoint.cleaning.cleaner import Cleaner
from dtruntime_torch.checkpoint.names import Attempt, CommitKey
from dtruntime_torch.storage import LocalBackend, run_sync
from dtruntime_torch.testing.unsynced_disk import PowerCut, UnsyncedDisk
from tests.checkpoint.cleaning.shortcuts import KEEP_ONE
from tests.checkpoint.commits import NAME
from tests.checkpoint.lineages import Shelf

# Which changes that were not synced reached the disk nevertheless.
KEPT: list[Callable[[str], bool]] = [
    lambda path: False,
    lambda path: True,
    lambda path: "/commits" not in path,
    lambda path: not path.endswith("manifest.json") and "/commits" not in path,
    lambda path: path.endswith(".safetensors"),
]


def retention(shelf: Shelf) -> None:
    cleaner = Cleaner(shelf.backend, NAME, KEEP_ONE)
    run_sync(cleaner.after_commit(CommitKey(1, 3), True, None))


def own_retention(shelf: Shelf) -> None:
    cleaner = Cleaner(shelf.backend, NAME, KEEP_ONE)
    run_sync(cleaner.after_commit(CommitKey(1, 2), True, None))
    run_sync(cleaner.after_commit(CommitKey(1, 3), True, None))


def sweep(shelf: Shelf) -> None:
    run_sync(Cleaner(shelf.backend, NAME).before_save(2))


def drop(shelf: Shelf) -> None:
    run_sync(Cleaner(shelf.backend, NAME).drop(Attempt(1, 2, 1)))


def scene(folder: Path, disk: UnsyncedDisk | None = None) -> Shelf:
    shelf = Shelf(LocalBackend(folder, calls=disk))
    base = shelf.put(1, 1)
    shelf.put(1, 2)
    shelf.put(1, 3, base)
    shelf.put_intent(Attempt(1, 4, 1), base)
    return shelf


@pytest.mark.parametrize("action", [retention, own_retention, sweep, drop])
def test_a_power_cut_at_any_call_leaves_no_commit_without_its_files(tmp_path, action):
    for at in itertools.count():
        top = tmp_path / f"top-{at}"
        top.mkdir()
        disk = UnsyncedDisk(top)
        shelf = scene(top, disk)
        disk.cut_at = len(disk.calls) + at
        ended = True
        try:
            action(shelf)
        except PowerCut:
            ended = False
        for number, kept in enumerate(KEPT):
            found = Shelf(LocalBackend(disk.after_power_cut(tmp_path / f"cut-{at}-{number}", kept)))
            assert found.broken() == [] and 3 in found.steps(), f"cut before call {at}, {number}"
        if ended:
            assert at > 10
            return


def test_a_commit_is_gone_for_good_before_its_first_file_goes(tmp_path):
    (tmp_path / "top").mkdir()
    disk = UnsyncedDisk(tmp_path / "top")
    shelf = scene(tmp_path / "top", disk)
    since = len(disk.calls)
    retention(shelf)
    calls = [(name, str(Path(path).relative_to(tmp_path / "top"))) for name, path in disk.calls[since:]]
    gone = calls.index(("rename", f"{NAME}/commits/0001-00000002.json"))
    synced = calls.index(("sync_folder", f"{NAME}/commits"), gone)
    first = min(n for n, (name, path) in enumerate(calls) if name == "unlink" and "/shard-" in path)
    assert gone < synced < first


def test_what_a_power_cut_brought_back_is_swept(tmp_path):
    (tmp_path / "top").mkdir()
    disk = UnsyncedDisk(tmp_path / "top")
    shelf = scene(tmp_path / "top", disk)
    retention(shelf)
    found = Shelf(LocalBackend(disk.after_power_cut(tmp_path / "cut")))
    run_sync(Cleaner(found.backend, NAME).before_save(2))
    assert found.attempts() == {Attempt(1, 1, 1).path, Attempt(1, 3, 1).path} and found.broken() == []
