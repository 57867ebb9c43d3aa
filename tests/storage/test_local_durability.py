"""What a write, a create and a delete promise when they return: a power cut takes nothing back.

The oracle is a disk that keeps only what was synced (`UnsyncedDisk`).
"""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable, Coroutine
from pathlib import Path

import pytest

from dtruntime_torch.errors import AlreadyExists, NotFound, StorageError
from dtruntime_torch.storage import LocalBackend, run_sync
from dtruntime_torch.storage.arguments import is_name
from dtruntime_torch.testing.unsynced_disk import PowerCut, UnsyncedDisk

Action = Callable[[LocalBackend], Coroutine[object, object, None]]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and is_name(path.name)
    }


@pytest.fixture
def top(tmp_path: Path) -> Path:
    (tmp_path / "top").mkdir()
    return tmp_path / "top"


@pytest.fixture
def disk(top: Path) -> UnsyncedDisk:
    return UnsyncedDisk(top)


@pytest.fixture
def backend(disk: UnsyncedDisk, top: Path) -> LocalBackend:
    return LocalBackend(top / "made" / "root", calls=disk)


@pytest.fixture
def survives(disk: UnsyncedDisk, tmp_path: Path) -> Callable[[], dict[str, bytes]]:
    cuts = (tmp_path / f"cut-{n}" for n in itertools.count())
    return lambda: contents(disk.after_power_cut(next(cuts)))


@pytest.mark.parametrize("store", ["write", "create"])
def test_what_was_stored_survives_with_every_folder_that_it_made(backend, survives, store: str) -> None:
    run_sync(getattr(backend, store)("model/commits/1", b"bytes"))
    assert survives() == {"made/root/model/commits/1": b"bytes"}


def test_a_replaced_file_is_the_new_one(backend, survives) -> None:
    run_sync(backend.write("file", b"old"))
    run_sync(backend.write("file", b"new"))
    assert survives() == {"made/root/file": b"new"}


def test_a_create_by_rename_survives(top: Path, tmp_path: Path) -> None:
    class NoLinks(UnsyncedDisk):
        def link(self, source: str, target: str) -> None:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    disk = NoLinks(top)
    run_sync(LocalBackend(top, calls=disk).create("folder/file", b"bytes"))
    assert contents(disk.after_power_cut(tmp_path / "cut")) == {"folder/file": b"bytes"}


def test_a_deleted_file_stays_deleted(backend, survives) -> None:
    for path in ("folder/kept", "folder/gone", "alone/gone", "deep/er/gone"):
        run_sync(backend.write(path, b"bytes"))
    for path in ("folder/gone", "alone/gone", "deep/er/gone"):
        run_sync(backend.delete(path))
    assert survives() == {"made/root/folder/kept": b"bytes"}


def test_what_already_exists_is_durable_when_the_error_is_raised(top: Path, tmp_path: Path) -> None:
    # Another process has linked the file and the folder's sync has not come yet.
    class Slow(UnsyncedDisk):
        def sync_folder(self, path: str) -> None:
            if not slow or path != str(top / "commits"):
                super().sync_folder(path)

    slow = True
    disk = Slow(top)
    backend = LocalBackend(top, calls=disk)
    run_sync(backend.create("commits/1", b"theirs"))
    assert contents(disk.after_power_cut(tmp_path / "before")) == {}
    slow = False
    with pytest.raises(AlreadyExists):
        run_sync(backend.create("commits/1", b"ours"))
    assert contents(disk.after_power_cut(tmp_path / "after")) == {"commits/1": b"theirs"}


def test_a_write_into_a_folder_that_another_just_made_survives(top: Path, tmp_path: Path) -> None:
    disk = UnsyncedDisk(top)
    backend = LocalBackend(top / "root", calls=disk)
    run_sync(backend.write("first", b"first"))
    disk.mkdir(str(top / "root" / "model"))  # the other has not come to its sync yet
    run_sync(backend.write("model/file", b"bytes"))
    assert contents(disk.after_power_cut(tmp_path / "cut")) == {
        "root/first": b"first",
        "root/model/file": b"bytes",
    }


class FailsSyncs(UnsyncedDisk):
    """Fails the syncs of folders while told to."""

    failing = False

    def sync_folder(self, path: str) -> None:
        if self.failing and Path(path).name == "folder":
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        super().sync_folder(path)


@pytest.fixture
def failing(top: Path) -> FailsSyncs:
    return FailsSyncs(top)


def test_an_already_exists_whose_sync_fails_is_an_unknown_outcome(top: Path, failing: FailsSyncs) -> None:
    backend = LocalBackend(top, calls=failing)
    run_sync(backend.create("folder/file", b"first"))
    failing.failing = True
    with pytest.raises(StorageError, match="EIO") as caught:
        run_sync(backend.create("folder/file", b"second"))
    assert not isinstance(caught.value, AlreadyExists)


def test_a_create_whose_sync_fails_is_an_unknown_outcome(top: Path, failing: FailsSyncs) -> None:
    backend = LocalBackend(top, calls=failing)
    run_sync(backend.create("folder/other", b"other"))
    failing.failing = True
    with pytest.raises(StorageError, match="EIO") as caught:
        run_sync(backend.create("folder/file", b"bytes"))
    assert not isinstance(caught.value, AlreadyExists)
    assert contents(top) == {"folder/file": b"bytes", "folder/other": b"other"}


def test_a_delete_whose_sync_failed_is_durable_once_repeated(
    top: Path, failing: FailsSyncs, tmp_path: Path
) -> None:
    backend = LocalBackend(top, calls=failing)
    run_sync(backend.write("folder/file", b"bytes"))
    run_sync(backend.write("folder/kept", b"kept"))
    failing.failing = True
    with pytest.raises(StorageError, match="EIO"):
        run_sync(backend.delete("folder/file"))
    failing.failing = False
    run_sync(backend.delete("folder/file"))
    assert contents(failing.after_power_cut(tmp_path / "cut")) == {"folder/kept": b"kept"}


def test_a_delete_whose_folder_went_unsynced_is_durable_once_repeated(disk, top: Path, survives) -> None:
    backend = LocalBackend(top, calls=disk)
    run_sync(backend.write("a/b/file", b"bytes"))
    disk.unlink(str(top / "a" / "b" / "file"))
    disk.rmdir(str(top / "a" / "b"))
    disk.rmdir(str(top / "a"))
    assert survives() == {"a/b/file": b"bytes"}
    run_sync(backend.delete("a/b/file"))
    assert survives() == {}


# What of the changes not yet synced reached the disk nevertheless.
KEPT = [
    tuple(name for name, kept in zip(("model", "model/step", "model/step/file"), which, strict=True) if kept)
    for which in itertools.product((False, True), repeat=3)
]


def write_new(backend: LocalBackend) -> Coroutine[object, object, None]:
    return backend.write("model/step/file", b"new")


def create_new(backend: LocalBackend) -> Coroutine[object, object, None]:
    return backend.create("model/step/file", b"new")


def delete_old(backend: LocalBackend) -> Coroutine[object, object, None]:
    return backend.delete("model/step/file")


@pytest.mark.parametrize(
    ("before", "action", "after"),
    [
        (None, write_new, b"new"),
        (b"old", write_new, b"new"),
        (None, create_new, b"new"),
        (b"old", create_new, b"old"),
        (b"old", delete_old, None),
        (None, delete_old, None),
    ],
)
def test_a_power_cut_between_any_two_calls_leaves_the_old_or_the_new(
    tmp_path: Path, before: bytes | None, action: Action, after: bytes | None
) -> None:
    for at in itertools.count():
        (tmp_path / f"top-{at}").mkdir()
        disk = UnsyncedDisk(tmp_path / f"top-{at}")
        backend = LocalBackend(tmp_path / f"top-{at}", calls=disk)
        if before is not None:
            run_sync(backend.write("model/step/file", before))
        ended = _ends(disk, at, action(backend))
        for kept in KEPT:
            found = _look(disk.after_power_cut(tmp_path / f"cut-{at}-{KEPT.index(kept)}", kept.__contains__))
            assert found == after or (found == before and not ended), f"cut before call {at}, {kept} kept"
        if ended:
            return


def _ends(disk: UnsyncedDisk, at: int, running: Coroutine[object, object, None]) -> bool:
    """Cuts the power before call `at` from now, and tells whether the action had ended by then."""
    disk.cut_at = len(disk.calls) + at
    try:
        run_sync(running)
    except AlreadyExists:
        return True
    except PowerCut:
        return False
    return True


def _look(root: Path) -> bytes | None:
    """Reads as the next process would, after the cut."""
    try:
        return bytes(run_sync(LocalBackend(root).read("model/step/file")))
    except NotFound:
        return None
