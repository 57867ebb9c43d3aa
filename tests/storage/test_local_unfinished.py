"""What killed writes leave in a folder: hidden from all but who asks for it, and gone for good once discarded."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from dtruntime_torch.storage import LocalBackend, run_sync
from dtruntime_torch.storage.system_calls import SystemCalls
from dtruntime_torch.testing.unsynced_disk import UnsyncedDisk

TEMPORARY = ".tmp-0123456789abcdef"


class DiesBeforeRename(SystemCalls):
    def rename(self, source: str, target: str) -> None:
        os._exit(137)


def write_and_die(root: Path) -> None:
    run_sync(LocalBackend(root, calls=DiesBeforeRename()).write("model/step/part", b"12345"))


@pytest.fixture
def backend(tmp_path: Path) -> LocalBackend:
    return LocalBackend(tmp_path)


def leave(root: Path, folder: str, data: bytes = b"12345", name: str = TEMPORARY) -> Path:
    (root / folder).mkdir(parents=True, exist_ok=True)
    (root / folder / name).write_bytes(data)
    return root / folder / name


def paths(backend: LocalBackend, prefix: str = "") -> Sequence[str]:
    return [entry.path for entry in run_sync(backend.unfinished(prefix))]


def test_what_a_killed_write_left_is_listed_with_its_size(tmp_path, backend):
    child = multiprocessing.get_context("fork").Process(target=write_and_die, args=(tmp_path,))
    child.start()
    child.join(60)
    assert child.exitcode == 137
    (entry,) = run_sync(backend.unfinished("model/"))
    assert entry.path.startswith("model/step/.tmp-") and entry.size == 5 and entry.modified > 0.0
    assert run_sync(backend.list("")) == []


def test_it_is_listed_by_prefix(tmp_path, backend):
    for folder in ("a", "a/deep/er", "ab", "b"):
        leave(tmp_path, folder)
    assert paths(backend) == [f"{f}/{TEMPORARY}" for f in ("a", "a/deep/er", "ab", "b")]
    assert paths(backend, "a/") == [f"a/{TEMPORARY}", f"a/deep/er/{TEMPORARY}"]
    assert paths(backend, "a") == [f"a/{TEMPORARY}", f"a/deep/er/{TEMPORARY}", f"ab/{TEMPORARY}"]
    assert paths(backend, "a/d") == [f"a/deep/er/{TEMPORARY}"]


def test_discarding_tells_the_bytes_and_leaves_the_rest_alone(tmp_path, backend):
    leave(tmp_path, "a", b"123")
    leave(tmp_path, "a", b"4567", name=".tmp-fedcba9876543210")
    kept = leave(tmp_path, "b")
    run_sync(backend.write("a/file", b"whole"))
    assert run_sync(backend.discard_unfinished("a/")) == 7
    assert paths(backend) == [f"b/{TEMPORARY}"] and kept.exists()
    assert (tmp_path / "a" / "file").read_bytes() == b"whole"


def test_folders_that_are_empty_then_go(tmp_path, backend):
    leave(tmp_path, "a/b/c")
    run_sync(backend.discard_unfinished("a/b/"))
    assert list(tmp_path.iterdir()) == []


def test_what_was_discarded_stays_so_after_a_power_cut(tmp_path):
    (tmp_path / "top").mkdir()
    disk = UnsyncedDisk(tmp_path / "top")
    backend = LocalBackend(tmp_path / "top", calls=disk)
    run_sync(backend.write("a/file", b"whole"))
    disk.write_file(str(tmp_path / "top" / "a" / TEMPORARY), [memoryview(b"half")])
    disk.sync_folder(str(tmp_path / "top" / "a"))
    run_sync(backend.discard_unfinished("a/"))
    cut = disk.after_power_cut(tmp_path / "cut")
    assert [path.name for path in (cut / "a").iterdir()] == ["file"]


def test_a_link_under_such_a_name_is_not_followed(tmp_path, backend):
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.write_bytes(b"not ours")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / TEMPORARY).symlink_to(outside)
    assert paths(backend) == []
    assert run_sync(backend.discard_unfinished("")) == 0
    assert outside.read_bytes() == b"not ours"
