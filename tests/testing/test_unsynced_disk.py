"""The oracle of test_local_durability.py must itself lose what it should."""

from __future__ import annotations

from pathlib import Path

import pytest

from dtruntime_torch.testing.unsynced_disk import PowerCut, UnsyncedDisk


@pytest.fixture
def top(tmp_path: Path) -> Path:
    (tmp_path / "top").mkdir()
    return tmp_path / "top"


@pytest.fixture
def disk(top: Path) -> UnsyncedDisk:
    return UnsyncedDisk(top)


def write(disk: UnsyncedDisk, path: Path, data: bytes) -> None:
    disk.write_file(str(path), [memoryview(data)])


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_name_is_lost_until_its_folder_is_synced(disk, top: Path, tmp_path: Path) -> None:
    write(disk, top / "file", b"bytes")
    assert names(disk.after_power_cut(tmp_path / "before")) == []
    disk.sync_folder(str(top))
    assert (disk.after_power_cut(tmp_path / "after") / "file").read_bytes() == b"bytes"


def test_a_synced_folder_is_lost_with_its_own_name(disk, top: Path, tmp_path: Path) -> None:
    disk.mkdir(str(top / "folder"))
    write(disk, top / "folder" / "file", b"bytes")
    disk.sync_folder(str(top / "folder"))
    assert names(disk.after_power_cut(tmp_path / "before")) == []
    disk.sync_folder(str(top))
    assert names(disk.after_power_cut(tmp_path / "after")) == ["folder", "folder/file"]


def test_a_folder_made_anew_has_none_of_the_old_ones_files(disk, top: Path, tmp_path: Path) -> None:
    folder = top / "folder"
    disk.mkdir(str(folder))
    write(disk, folder / "old", b"")
    disk.sync_folder(str(folder))
    disk.sync_folder(str(top))
    disk.unlink(str(folder / "old"))
    disk.rmdir(str(folder))
    disk.mkdir(str(folder))
    disk.sync_folder(str(top))
    assert names(disk.after_power_cut(tmp_path / "cut")) == ["folder"]


@pytest.mark.parametrize("call", ["rename", "rename_noreplace"])
def test_a_rename_and_an_unlink_come_back_until_they_are_synced(
    disk, top: Path, tmp_path: Path, call: str
) -> None:
    write(disk, top / "a", b"a")
    write(disk, top / "b", b"b")
    disk.sync_folder(str(top))
    getattr(disk, call)(str(top / "a"), str(top / "c"))
    disk.unlink(str(top / "b"))
    assert names(disk.after_power_cut(tmp_path / "before")) == ["a", "b"]
    disk.sync_folder(str(top))
    assert names(disk.after_power_cut(tmp_path / "after")) == ["c"]


def test_an_unsynced_change_may_be_kept_name_by_name(disk, top: Path, tmp_path: Path) -> None:
    write(disk, top / "a", b"a")
    write(disk, top / "b", b"b")
    disk.link(str(top / "a"), str(top / "c"))
    assert names(disk.after_power_cut(tmp_path / "cut", lambda path: path == "c")) == ["c"]


def test_after_the_cut_no_call_is_done(disk, top: Path) -> None:
    disk.cut_at = 1
    write(disk, top / "a", b"a")
    for _ in range(2):
        with pytest.raises(PowerCut):
            write(disk, top / "b", b"b")
    assert names(top) == ["a"]
    assert disk.calls == [("write_file", str(top / "a"))]


def test_a_call_that_fails_changes_nothing(disk, top: Path, tmp_path: Path) -> None:
    write(disk, top / "a", b"a")
    write(disk, top / "b", b"b")
    with pytest.raises(FileExistsError):
        disk.link(str(top / "a"), str(top / "b"))
    disk.sync_folder(str(top))
    assert (disk.after_power_cut(tmp_path / "cut") / "b").read_bytes() == b"b"


def test_a_removed_folder_comes_back_with_its_files_until_its_parent_is_synced(
    disk, top: Path, tmp_path: Path
) -> None:
    folder = top / "folder"
    disk.mkdir(str(folder))
    write(disk, folder / "file", b"bytes")
    disk.sync_folder(str(folder))
    disk.sync_folder(str(top))
    disk.unlink(str(folder / "file"))
    disk.rmdir(str(folder))
    assert names(disk.after_power_cut(tmp_path / "before")) == ["folder", "folder/file"]
    assert names(disk.after_power_cut(tmp_path / "half", lambda path: path == "folder/file")) == ["folder"]
    disk.sync_folder(str(top))
    assert names(disk.after_power_cut(tmp_path / "after")) == []
