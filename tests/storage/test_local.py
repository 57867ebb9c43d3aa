"""What only a file system can do wrong. The rest is in test_conformance.py and test_local_durability.py."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from typing_extensions import Buffer

from dtruntime_torch.errors import AlreadyExists, InvalidArgument, NotFound, StorageError
from dtruntime_torch.storage import LocalBackend, MemoryBackend, run_sync
from dtruntime_torch.storage.arguments import temporary_name
from dtruntime_torch.storage.failures import explained
from dtruntime_torch.storage.rereads import is_unreadable
from dtruntime_torch.storage.system_calls import SystemCalls


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


class Failing(SystemCalls):
    """Fails the calls named with an errno; a write fails half way, as a full disk makes it."""

    def __init__(self, **failures: int) -> None:
        for call, code in failures.items():
            setattr(self, call, self._failing(call, code))

    def _failing(self, call: str, code: int) -> Callable[..., None]:
        def fail(path: str, *arguments: object) -> None:
            if call == "write_file":
                Path(path).write_bytes(b"hal")
            raise OSError(code, os.strerror(code), path)

        return fail


def test_the_root_is_made_by_the_first_write_only(tmp_path: Path) -> None:
    backend = LocalBackend(tmp_path / "a" / "b")
    assert run_sync(backend.list("")) == []
    run_sync(backend.delete("file"))
    assert names(tmp_path) == []
    run_sync(backend.write("file", b""))
    assert names(tmp_path) == ["a", "a/b", "a/b/file"]


def test_a_relative_root_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    backend = LocalBackend("checkpoints")
    monkeypatch.chdir("/")
    run_sync(backend.write("file", b""))
    assert names(tmp_path) == ["checkpoints", "checkpoints/file"]


@pytest.mark.parametrize("root", ["file", "file/below", "file/far/below", "link"])
def test_a_root_that_is_a_file_is_refused_at_the_door(tmp_path: Path, root: str) -> None:
    (tmp_path / "file").write_bytes(b"precious")
    (tmp_path / "link").symlink_to("file")
    with pytest.raises(InvalidArgument, match="is not a folder"):
        LocalBackend(tmp_path / root)
    assert (tmp_path / "file").read_bytes() == b"precious"


@pytest.mark.parametrize("root", ["", "nul\0", b"bytes"])
def test_a_root_that_is_no_path_is_refused(root: str) -> None:
    with pytest.raises(InvalidArgument):
        LocalBackend(root)


def test_a_root_that_became_a_file_is_named(tmp_path: Path) -> None:
    backend = LocalBackend(tmp_path / "root")
    (tmp_path / "root").write_bytes(b"precious")
    with pytest.raises(StorageError, match=r"root/name.*ENOTDIR.*move it away"):
        run_sync(backend.write("name/file", b""))
    assert names(tmp_path) == ["root"]


def test_a_file_where_a_folder_is_needed_is_named(tmp_path: Path) -> None:
    backend = LocalBackend(tmp_path)
    run_sync(backend.write("model", b"precious"))
    for store in (backend.write, backend.create):
        with pytest.raises(StorageError, match=r"model/commits/1\.json.*ENOTDIR.*move it away"):
            run_sync(store("model/commits/1.json", b""))
    assert names(tmp_path) == ["model"]


def test_a_file_where_a_folder_is_needed_is_told_once_by_the_error(tmp_path: Path, caplog) -> None:
    backend = LocalBackend(tmp_path)
    run_sync(backend.write("model", b""))
    for store in (backend.write, backend.create):
        with pytest.raises(StorageError, match="ENOTDIR"):
            run_sync(store("model/commits/1.json", b""))
    assert not caplog.records


def test_a_folder_where_a_file_is_needed_is_named(tmp_path: Path) -> None:
    backend = LocalBackend(tmp_path)
    run_sync(backend.write("model/file", b""))
    with pytest.raises(StorageError, match=r"/model: .*EISDIR"):
        run_sync(backend.write("model", b""))
    assert names(tmp_path) == ["model", "model/file"]


def test_a_full_disk_is_named_and_nothing_is_left(mount) -> None:
    disk = mount("size=1m")
    backend = LocalBackend(disk / "root")
    run_sync(backend.write("small", b"sound"))
    for store in (backend.write, backend.create):
        with pytest.raises(StorageError, match=r"folder/big: .*ENOSPC\).*free space") as caught:
            run_sync(store("folder/big", bytes(4 << 20)))
        assert caught.value.errno == errno.ENOSPC
    assert names(disk) == ["root", "root/small"]
    run_sync(backend.write("folder/big", bytes(1 << 18)))


def test_a_read_only_file_system_is_named(mount) -> None:
    disk = mount("ro")
    with pytest.raises(StorageError, match=r"root/file: .*EROFS.*read-only"):
        run_sync(LocalBackend(disk / "root").write("file", b""))
    with pytest.raises(StorageError, match=r"file: .*EROFS.*read-only"):
        run_sync(LocalBackend(disk).create("file", b""))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match=r"file: .*EACCES.*permission"):
        run_sync(LocalBackend(tmp_path).write("file", b""))
    tmp_path.chmod(0o700)


@pytest.mark.parametrize(
    ("store", "failure", "code", "advice"),
    [
        ("write", "write_file", errno.ENOSPC, "free space"),
        ("create", "write_file", errno.ENOSPC, "free space"),
        ("write", "write_file", errno.EDQUOT, "quota"),
        ("create", "mkdir", errno.EACCES, "permission"),
        ("write", "rename", errno.EPERM, "permission"),
        ("create", "link", errno.EIO, "kernel's log"),
        ("write", "write_file", errno.ENOMEM, "Check the file system"),
    ],
)
def test_a_failed_call_leaves_nothing_behind(
    tmp_path: Path, store: str, failure: str, code: int, advice: str
) -> None:
    backend = LocalBackend(tmp_path, calls=Failing(**{failure: code}))
    with pytest.raises(StorageError, match=f"{store} .*name/file: .*{errno.errorcode[code]}.*{advice}"):
        run_sync(getattr(backend, store)("name/file", b"bytes"))
    assert names(tmp_path) == []


def test_an_error_that_has_no_errno_is_not_taken_for_a_bad_sector():
    error = pytest.raises(StorageError, match="could not read here: something odd")
    with error as caught, explained("read", "here"):
        raise OSError("something odd")
    assert caught.value.errno is None and not is_unreadable(MemoryBackend(), caught.value)


def test_a_temporary_file_that_cannot_be_removed_hides_no_error(tmp_path: Path, caplog) -> None:
    backend = LocalBackend(tmp_path, calls=Failing(write_file=errno.ENOSPC, unlink=errno.EIO))
    with pytest.raises(StorageError, match="ENOSPC"):
        run_sync(backend.write("file", b"bytes"))
    assert "could not remove the temporary file" in caplog.text
    assert run_sync(backend.list("")) == []


@pytest.mark.parametrize("no_link", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK])
def test_without_links_a_create_renames_and_never_replaces(tmp_path: Path, no_link: int) -> None:
    backend = LocalBackend(tmp_path, calls=Failing(link=no_link))
    run_sync(backend.create("file", b"first"))
    with pytest.raises(AlreadyExists):
        run_sync(backend.create("file", b"second"))
    assert (tmp_path / "file").read_bytes() == b"first"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("no_rename", [errno.ENOSYS, errno.EINVAL])
def test_without_links_and_exclusive_renames_a_create_says_so(tmp_path: Path, no_rename: int) -> None:
    backend = LocalBackend(tmp_path, calls=Failing(link=errno.EPERM, rename_noreplace=no_rename))
    with pytest.raises(StorageError, match=r"file: .*neither hard links nor renameat2"):
        run_sync(backend.create("file", b"bytes"))
    assert names(tmp_path) == []


def test_an_exclusive_rename_that_fails_otherwise_is_named(tmp_path: Path) -> None:
    backend = LocalBackend(tmp_path, calls=Failing(link=errno.EPERM, rename_noreplace=errno.EACCES))
    with pytest.raises(StorageError, match=r"file: .*EACCES"):
        run_sync(backend.create("file", b"bytes"))


def test_a_link_out_of_the_root_is_refused(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "root-outside"
    root.mkdir()
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    (root / "folder").symlink_to(outside)
    (root / "file").symlink_to(outside / "secret")
    (root / "dangling").symlink_to(outside / "absent")
    backend = LocalBackend(root)
    for call in (
        backend.read("folder/secret"),
        backend.read("file"),
        backend.read("dangling"),
        backend.read_range("file", 0, 1),
        backend.size("file"),
        backend.write("folder/secret", b"changed"),
        backend.create("folder/new/file", b"new"),
        backend.delete("folder/secret"),
        backend.list("folder/"),
    ):
        with pytest.raises(StorageError, match="symbolic link out of .*root"):
            run_sync(call)
    assert run_sync(backend.list("")) == []
    assert run_sync(backend.list("", "/")) == []
    assert names(outside) == ["secret"]
    assert (outside / "secret").read_bytes() == b"secret"


def test_a_write_replaces_a_link_and_not_what_it_points_to(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "outside").write_bytes(b"precious")
    (root / "file").symlink_to(tmp_path / "outside")
    backend = LocalBackend(root)
    run_sync(backend.write("file", b"new"))
    assert run_sync(backend.read("file")) == b"new"
    assert (tmp_path / "outside").read_bytes() == b"precious"


def test_a_root_that_is_a_link_and_links_inside_it_are_followed(tmp_path: Path) -> None:
    (tmp_path / "real" / "model").mkdir(parents=True)
    (tmp_path / "real" / "alias").symlink_to("model")
    (tmp_path / "real" / "model" / "round").symlink_to("..")
    (tmp_path / "root").symlink_to("real")
    backend = LocalBackend(tmp_path / "root")
    run_sync(backend.write("alias/file", b"bytes"))
    (tmp_path / "real" / "file").symlink_to("model/file")
    assert run_sync(backend.read("model/file")) == run_sync(backend.read("file")) == b"bytes"
    assert [entry.path for entry in run_sync(backend.list("alias/"))] == ["alias/file"]
    assert [entry.path for entry in run_sync(backend.list(""))] == ["file", "model/file"]


def test_a_loop_of_links_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(StorageError):
        run_sync(LocalBackend(tmp_path).read("a/file"))


def test_a_pipe_is_no_file_and_blocks_nobody(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    backend = LocalBackend(tmp_path)
    with pytest.raises(NotFound, match="no file"):
        run_sync(backend.read("pipe"))
    assert run_sync(backend.list("")) == []


def test_a_listing_shows_no_temporary_files_and_no_names_that_cannot_be_asked_for(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / temporary_name()).write_bytes(b"left by a crash")
    (tmp_path / "folder" / temporary_name()).write_bytes(b"left by a crash")
    (tmp_path / "back\\slash").write_bytes(b"")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/latin-\xe9")).write_bytes(b"")
    backend = LocalBackend(tmp_path)
    assert run_sync(backend.list("")) == run_sync(backend.list("", "/")) == []
    assert run_sync(backend.list(".tmp-")) == []


def test_a_delete_removes_the_folders_that_it_emptied_but_never_the_root(tmp_path: Path) -> None:
    backend = LocalBackend(tmp_path / "root")
    run_sync(backend.write("step/attempt/shard", b""))
    run_sync(backend.write("step/other/shard", b""))
    run_sync(backend.delete("step/attempt/shard"))
    assert names(tmp_path) == ["root", "root/step", "root/step/other", "root/step/other/shard"]
    run_sync(backend.delete("step/other/shard"))
    assert names(tmp_path) == ["root"]


def test_writers_and_deleters_of_one_folder_do_not_disturb_each_other(tmp_path: Path) -> None:
    backend = LocalBackend(tmp_path)
    start = threading.Barrier(4)

    def come_and_go(worker: int) -> None:
        start.wait(timeout=60)
        for turn in range(50):
            path = f"folder/sub/{worker}"
            run_sync((backend.write, backend.create)[turn % 2](path, b"%d" % turn))
            assert run_sync(backend.read(path)) == b"%d" % turn
            run_sync(backend.delete(path))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(come_and_go, range(4)))
    assert names(tmp_path) == []


def test_a_folder_that_another_removes_first_hides_no_empty_parent(tmp_path: Path) -> None:
    class Slower(SystemCalls):
        def rmdir(self, path: str) -> None:
            super().rmdir(path)  # the other's
            super().rmdir(path)

    backend = LocalBackend(tmp_path, calls=Slower())
    run_sync(backend.write("step/attempt/shard", b""))
    run_sync(backend.delete("step/attempt/shard"))
    assert names(tmp_path) == []


def test_a_file_that_is_replaced_while_it_is_read_is_the_old_one(tmp_path: Path) -> None:
    old, new = b"o" * (2 << 20), b"n" * (3 << 20)

    class Replaced(SystemCalls):
        def read_file(self, path: str, offset: int, length: int) -> Buffer:
            run_sync(LocalBackend(tmp_path).write("file", new))
            return super().read_file(path, offset, length)

    run_sync(LocalBackend(tmp_path).write("file", old))
    assert bytes(run_sync(LocalBackend(tmp_path, calls=Replaced()).read("file"))) == old


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path: Path) -> None:
    class Shrinking(SystemCalls):
        def read_file(self, path: str, offset: int, length: int) -> Buffer:
            os.truncate(tmp_path / "file", 100)
            return super().read_file(path, offset, length)

    backend = LocalBackend(tmp_path, calls=Shrinking())
    run_sync(backend.write("file", bytes(2 << 20)))
    with pytest.raises(StorageError, match="/file: .*shorter than it should be"):
        run_sync(backend.read("file"))


def test_the_time_of_a_file_is_that_of_its_write(tmp_path: Path) -> None:
    backend = LocalBackend(tmp_path)
    run_sync(backend.write("file", b""))
    assert run_sync(backend.list(""))[0].modified == (tmp_path / "file").stat().st_mtime


class NotingDirect(SystemCalls):
    """Notes whether reads went past the page cache."""

    def __init__(self) -> None:
        self.direct: list[bool] = []

    def read_into(self, path: str, offset: int, target: memoryview, direct: bool) -> None:
        self.direct.append(direct)
        super().read_into(path, offset, target, direct)


@pytest.mark.parametrize("cached", [True, False])
def test_only_what_is_not_in_the_page_cache_is_read_past_it(tmp_path, monkeypatch, cached):
    def preadv(descriptor, buffers, offset, flags):
        if not cached:
            raise BlockingIOError
        return 1

    data = bytes(range(256)) * (3 << 12)
    (tmp_path / "file").write_bytes(data)
    monkeypatch.setattr(os, "preadv", preadv)
    calls = NotingDirect()
    memory = bytearray(len(data) - 1)
    run_sync(LocalBackend(tmp_path, calls=calls).read_range("file", 1, len(memory), into=memoryview(memory)))
    assert memory == data[1:] and calls.direct == [not cached]


def test_a_short_range_never_goes_past_the_page_cache(tmp_path):
    (tmp_path / "file").write_bytes(bytes(100))
    calls, memory = NotingDirect(), bytearray(100)
    run_sync(LocalBackend(tmp_path, calls=calls).read_range("file", 0, 100, into=memoryview(memory)))
    assert calls.direct == [False]
