"""Whole saves on a disk that loses its power, that never synced a folder, or that has no hard links."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

import dtruntime_torch as dt
from dtruntime_torch.checkpoint import catalog
from dtruntime_torch.checkpoint.commit import Patience, claim_generation
from dtruntime_torch.errors import CommitUnknown, SaveFailed, StorageError
from dtruntime_torch.storage import LocalBackend, run_sync
from dtruntime_torch.storage.system_calls import SystemCalls
from dtruntime_torch.testing.unsynced_disk import PowerCut, UnsyncedDisk
from tests.checkpoint.sound import CHUNK, check_equal, check_sound, state_of


def manager_on(backend: LocalBackend) -> dt.CheckpointManager:
    return dt.CheckpointManager(backend, chunk_bytes=CHUNK, keep_last_n=None)


def disk_with_two(top: Path) -> tuple[UnsyncedDisk, LocalBackend]:
    """A disk where two steps were saved into folders that were not there."""
    top.mkdir()
    disk = UnsyncedDisk(top)
    backend = LocalBackend(top / "made" / "here", calls=disk)
    with manager_on(backend) as manager:
        for step in (1, 2):
            manager.save(state_of(step), step)
    return disk, backend


def after_cut(disk: UnsyncedDisk, place: Path, *, all_kept: bool = False) -> LocalBackend:
    return LocalBackend(disk.after_power_cut(place, lambda path: all_kept) / "made" / "here")


def test_what_was_committed_survives_a_power_cut_with_every_folder_that_it_lies_in(tmp_path):
    disk, _ = disk_with_two(tmp_path / "top")
    assert check_sound(after_cut(disk, tmp_path / "cut")) == [1, 2]


def test_without_one_of_its_syncs_a_save_does_not_survive(tmp_path):
    """That the disk of these tests notices a sync that is missing."""

    class NeverSynced(UnsyncedDisk):
        def sync_folder(self, path: str) -> None:
            if path != str(tmp_path / "top"):
                super().sync_folder(path)

    (tmp_path / "top").mkdir()
    disk = NeverSynced(tmp_path / "top")
    with manager_on(LocalBackend(tmp_path / "top" / "made" / "here", calls=disk)) as manager:
        manager.save(state_of(1), 1)
    assert not (disk.after_power_cut(tmp_path / "cut") / "made").exists()


def save_until_cut(disk: UnsyncedDisk, backend: LocalBackend, at: int) -> bool:
    """Saves step 3 and cuts the power before call `at` of it; whether it came to the end."""
    manager = manager_on(backend)
    manager.load(state_of(0))
    disk.cut_at = len(disk.calls) + at
    try:
        manager.save(state_of(3), 3)
    except (PowerCut, SaveFailed, CommitUnknown):
        return False
    return True


@pytest.mark.parametrize("all_kept", [False, True], ids=["nothing unsynced kept", "all kept"])
def test_a_power_cut_before_any_call_of_a_save_leaves_all_that_was_committed(tmp_path, all_kept):
    for at in range(1000):
        disk, backend = disk_with_two(tmp_path / f"top-{at}")
        ended = save_until_cut(disk, backend, at)
        left = after_cut(disk, tmp_path / f"cut-{at}", all_kept=all_kept)
        found = check_sound(left)
        assert found[:2] == [1, 2] and (found[2:] == [3] or not ended), f"cut before call {at}"
        with manager_on(left) as manager:
            manager.load(state_of(0))
            manager.save(state_of(4), 4)
        assert check_sound(left)[-1] == 4
        if ended:
            assert at > 10
            return


class Without(SystemCalls):
    """A file system that has no hard links, and no exclusive rename either if told so."""

    def __init__(self, no_link: int, no_rename: int | None = None) -> None:
        self.no_link, self.no_rename = no_link, no_rename
        self.renamed: list[str] = []

    def link(self, source: str, target: str) -> None:
        raise OSError(self.no_link, os.strerror(self.no_link), target)

    def rename_noreplace(self, source: str, target: str) -> None:
        if self.no_rename is not None:
            raise OSError(self.no_rename, os.strerror(self.no_rename), target)
        super().rename_noreplace(source, target)
        self.renamed.append(os.path.basename(target))


@pytest.mark.parametrize("no_link", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK])
def test_where_there_are_no_hard_links_jobs_save_and_go_on(tmp_path, no_link):
    calls = Without(no_link)
    backend = LocalBackend(tmp_path, calls=calls)
    for step in (1, 2):
        with manager_on(backend) as manager:
            if step > 1:
                state = state_of(0)
                check_equal(state, manager.load(state).step)
            manager.save(state_of(step), step)
    assert calls.renamed == ["0001.json", "0001-00000001.json", "0002.json", "0002-00000002.json"]
    assert check_sound(backend) == [1, 2]


def test_where_there_is_no_exclusive_rename_either_nothing_is_claimed_and_the_error_says_so(tmp_path):
    backend = LocalBackend(tmp_path, calls=Without(errno.EPERM, errno.EINVAL))
    with pytest.raises(StorageError, match="neither hard links nor"):
        run_sync(claim_generation(backend, "model", "0" * 32, None, False, 1, Patience(seconds=0.0)))
    assert run_sync(catalog.generations(backend, "model")) == []
