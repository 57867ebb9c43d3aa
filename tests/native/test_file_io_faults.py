"""System calls that are interrupted, fall short, refuse O_DIRECT late, fail, or are the last of a process."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random

import pytest

from dtruntime_torch import _C
from tests.boundaries import DIRECT_FROM, PAGE_BYTES, REQUEST_BYTES

# Two requests of whole pages, and an end that fills no page.
TAIL = 1000
LENGTH = REQUEST_BYTES + DIRECT_FROM + PAGE_BYTES + TAIL
DATA = Random(3).randbytes(LENGTH)
ARENA = _C.Arena(LENGTH)
memoryview(ARENA)[:] = DATA
ODD_CALLS = range(1, 200, 2)


@pytest.fixture(autouse=True)
def no_faults_afterwards() -> Iterator[None]:
    yield
    _C.clear_faults()


@pytest.fixture(params=["disk", "/dev/shm"])
def folder(request, tmp_path) -> Iterator[Path]:
    """Where O_DIRECT must be aligned, and where it need not."""
    if request.param == "disk":
        yield tmp_path
    else:
        with tempfile.TemporaryDirectory(dir=request.param) as name:
            yield Path(name)


def write(path: Path, **options: bool) -> None:
    """Writes what `read` reads back, one request after another."""
    _C.write_extents(path, ARENA, [(0, 0, LENGTH)], queue_depth=1, sync_folder=True, **options)


def read(path: Path, **options: bool) -> bytes:
    arena = _C.Arena(LENGTH)
    _C.read_extents(path, arena, [(0, 0, LENGTH)], queue_depth=1, **options)
    return bytes(arena)


def fail(call: str, numbers: Iterable[int], action: str, value: int = 0) -> None:
    for number in numbers:
        _C.inject_fault(call, number, action, value)


def calls_of(work) -> dict[str, int]:
    """How many system calls of each kind `work` makes."""
    _C.clear_faults()
    _C.inject_fault("any", 1 << 62, "kill")  # never reached: it only starts the count
    work()
    return _C.clear_faults()


def error_of(work) -> OSError | None:
    try:
        work()
    except OSError as error:
        return error
    return None


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize(
    "fault",
    [
        ("any", ODD_CALLS, "fail", errno.EINTR),
        ("pwrite", ODD_CALLS, "shorten", 2 * PAGE_BYTES),
        ("pwrite", ODD_CALLS, "shorten", 777),
        ("pread", ODD_CALLS, "shorten", 2 * PAGE_BYTES),
        ("pread", ODD_CALLS, "shorten", 777),
        ("fallocate", [0], "fail", errno.EOPNOTSUPP),
        ("fcntl", [0], "fail", errno.EINVAL),
    ],
    ids=lambda fault: f"{fault[0]}-{fault[2]}-{fault[3]}",
)
@pytest.mark.parametrize("head", [b"", b"unaligned"])
def test_what_is_not_a_failure_is_overcome(folder, fault, head, direct):
    path = folder / "file"
    fail(*fault)
    _C.write_file(path, [head, ARENA], 3, direct)
    assert path.read_bytes() == head + DATA
    assert bytes(_C.read_file(path, 5, LENGTH - 5, 3, direct)) == (head + DATA)[5:LENGTH]


def test_requests_that_refuse_o_direct_go_through_the_cache(folder):
    path = folder / "file"
    fail("pwrite", [1, 2], "fail", errno.EINVAL)
    fail("pread", [1, 2], "fail", errno.EINVAL)
    write(path)
    assert path.read_bytes() == DATA
    assert read(path) == DATA


@pytest.mark.parametrize("length", [1, 777])
@pytest.mark.parametrize("direct", [True, False])
def test_a_write_cut_short_at_any_call_is_continued(folder, direct, length):
    count = calls_of(lambda: write(folder / "whole", direct=direct))["pwrite"]
    for number in range(1, count + 1):
        path = folder / str(number)
        _C.inject_fault("pwrite", number, "shorten", length)
        write(path, direct=direct)
        assert _C.clear_faults()["pwrite"] > count, "it was cut"
        assert path.read_bytes() == DATA


@pytest.mark.parametrize("length", [1, 777])
@pytest.mark.parametrize("direct", [True, False])
def test_a_read_cut_short_at_any_call_is_continued(folder, direct, length):
    path = folder / "file"
    write(path)
    count = calls_of(lambda: read(path, direct=direct))["pread"]
    for number in range(1, count + 1):
        _C.inject_fault("pread", number, "shorten", length)
        assert read(path, direct=direct) == DATA
        assert _C.clear_faults()["pread"] > count, "it was cut"


@pytest.mark.parametrize(
    ("call", "number", "step"),
    [
        ("open", 1, "creating"),
        ("fallocate", 1, f"reserving {LENGTH} bytes"),
        ("pwrite", 1, f"writing {REQUEST_BYTES} bytes at offset 0"),
        ("pwrite", 2, f"writing {DIRECT_FROM + PAGE_BYTES} bytes at offset {REQUEST_BYTES}"),
        ("pwrite", 3, f"writing {TAIL} bytes at offset {LENGTH - TAIL}"),
        ("fcntl", 4, "leaving O_DIRECT"),
        ("fsync", 1, "fsync: what was written may be lost; delete the file and write it again"),
        ("close", 1, "closing"),
        ("open", 2, "opening its folder"),
        ("fsync", 2, "fsync: what was written may be lost; delete the file and write it again"),
        ("close", 2, "closing"),
    ],
)
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_failed_write_names_its_step_and_path(tmp_path, call, number, step, code):
    path = str(tmp_path / "file")
    _C.inject_fault(call, number, "fail", code)
    with pytest.raises(OSError) as caught:
        write(path)
    assert (caught.value.errno, caught.value.filename) == (code, path)
    assert caught.value.strerror == f"{os.strerror(code)} ({step})"
    assert Path(path).exists() == (step != "creating"), "the file is the caller's to delete"


@pytest.mark.parametrize(
    ("call", "number", "step"),
    [
        ("open", 1, "opening"),
        ("fstat", 1, "fstat"),
        ("pread", 1, f"reading {REQUEST_BYTES} bytes at offset 0"),
        ("pread", 3, f"reading {TAIL} bytes at offset {LENGTH - TAIL}"),
        ("fcntl", 4, "leaving O_DIRECT"),
    ],
)
def test_a_failed_read_names_its_step_and_path(tmp_path, call, number, step):
    path = tmp_path / "file"
    write(path)
    _C.inject_fault(call, number, "fail", errno.EIO)
    with pytest.raises(OSError) as caught:
        read(path)
    assert (caught.value.errno, caught.value.filename) == (errno.EIO, path)
    assert caught.value.strerror == f"{os.strerror(errno.EIO)} ({step})"


@pytest.mark.parametrize("direct", [True, False])
def test_no_failure_of_any_call_goes_unnoticed(folder, direct):
    path = folder / "file"
    counts = calls_of(lambda: write(path, direct=direct))
    assert counts["any"] == sum(counts.values()) - counts["any"] >= 8
    for number in range(1, counts["any"] + 1):
        path.unlink(missing_ok=True)
        _C.inject_fault("any", number, "fail", errno.EIO)
        error = error_of(lambda: write(path, direct=direct))
        if error is None:
            assert _C.clear_faults()["fcntl"] in (1, 2), "only O_DIRECT may be refused, and is done without"
            assert path.read_bytes() == DATA
        else:
            assert (error.errno, error.filename) == (errno.EIO, path)
        _C.clear_faults()


def test_a_failed_sync_is_never_tried_again(tmp_path):
    _C.inject_fault("fsync", 1, "fail", errno.EIO)
    with pytest.raises(OSError, match="delete the file and write it again"):
        write(tmp_path / "file")
    assert _C.clear_faults()["fsync"] == 1


def test_nothing_more_is_written_after_a_failure(tmp_path):
    _C.inject_fault("pwrite", 1, "fail", errno.EIO)
    with pytest.raises(OSError, match="writing"):
        write(tmp_path / "file")
    counts = _C.clear_faults()
    assert (counts["pwrite"], counts["fsync"]) == (1, 0)


@pytest.mark.parametrize("call", ["pwrite", "pread"])
def test_a_direct_transfer_that_stopped_inside_a_page_goes_on_through_the_cache(tmp_path, call):
    path = tmp_path / "file"
    extent = [(0, 0, DIRECT_FROM)]
    if call == "pread":
        path.write_bytes(DATA[:DIRECT_FROM])
    arena = _C.Arena(DIRECT_FROM)
    _C.inject_fault(call, 1, "shorten", 777)
    if call == "pwrite":
        _C.write_extents(path, ARENA, extent)
    else:
        _C.read_extents(path, arena, extent)
    # One more call: a direct one would have been refused, or worse, taken from the wrong place.
    assert _C.clear_faults()[call] == 2
    assert path.read_bytes() == DATA[:DIRECT_FROM]
    assert call == "pwrite" or bytes(arena) == DATA[:DIRECT_FROM]


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path):
    write(tmp_path / "file")
    _C.inject_fault("pread", 2, "shorten", 0)
    with pytest.raises(EOFError, match="cut short"):
        read(tmp_path / "file")


def test_a_write_that_makes_no_progress_is_an_error(tmp_path):
    _C.inject_fault("pwrite", 2, "shorten", 0)
    with pytest.raises(OSError, match=f"at offset {REQUEST_BYTES}") as caught:
        write(tmp_path / "file")
    assert caught.value.errno == errno.EIO


REPLACE = """
import sys
from dtruntime_torch import _C
from dtruntime_torch.storage import LocalBackend, run_sync
if int(sys.argv[2]):
    _C.inject_fault("any", int(sys.argv[2]), "kill")
arena = _C.Arena(int(sys.argv[3]))
memoryview(arena)[:] = b"n" * len(arena)
run_sync(getattr(LocalBackend(sys.argv[1]), sys.argv[4])("file", memoryview(arena)))
"""


def replace(folder: Path, kill_at: int, how: str) -> int:
    command = [sys.executable, "-c", REPLACE, str(folder), str(kill_at), str(LENGTH), how]
    return subprocess.run(command, timeout=120).returncode


@pytest.mark.parametrize("how", ["write", "create"])
def test_a_kill_at_any_call_leaves_the_old_file(tmp_path, how):
    path = tmp_path / "file"
    for kill_at in range(1, 100):
        path.unlink(missing_ok=True)
        if how == "write":
            path.write_bytes(b"old")
        code = replace(tmp_path, kill_at, how)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        assert path.read_bytes() == b"old" if how == "write" else not path.exists()
    assert kill_at > 10, "open, reserve, four fcntl, three writes, sync and close were each the last"
    assert path.read_bytes() == b"n" * LENGTH


@pytest.mark.parametrize(
    "fault",
    [
        ("write", 1, "kill"),
        ("pwrite", 1, "explode"),
        ("pwrite", -1, "kill"),
        ("pwrite", 1, "fail"),
        ("pwrite", 1, "shorten", -1),
        ("fsync", 1, "shorten", 5),
        ("any", 1, "shorten", 5),
    ],
)
def test_a_fault_that_no_call_can_meet_is_refused(fault):
    with pytest.raises(ValueError):
        _C.inject_fault(*fault)
    assert calls_of(lambda: None)["any"] == 0


def test_without_faults_nothing_is_counted(tmp_path):
    write(tmp_path / "file")
    assert _C.clear_faults()["any"] == 0
