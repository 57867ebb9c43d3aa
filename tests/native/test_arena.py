"""Memory that starts at a page, lives as long as anyone looks at it, and is reused."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from dtruntime_torch import _C
from tests.boundaries import LENGTHS, PAGE_BYTES

MIB = 1 << 20


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


@pytest.fixture
def name() -> Iterator[str]:
    """A name for shared memory that nothing bears, before the test and after it."""
    unique = f"dtruntime-test-{os.getpid()}-{os.urandom(4).hex()}"
    yield unique
    file_of(unique).unlink(missing_ok=True)


@pytest.mark.parametrize("nbytes", LENGTHS)
def test_it_has_the_size_asked_for_and_starts_at_a_page(nbytes):
    arena = _C.Arena(nbytes)
    assert len(arena) == arena.nbytes == memoryview(arena).nbytes == nbytes
    assert arena.address % PAGE_BYTES == 0
    assert arena.address > 0


def test_fresh_memory_is_zero_and_writable_to_the_last_byte():
    arena = _C.Arena(PAGE_BYTES + 1)
    assert bytes(arena) == bytes(PAGE_BYTES + 1)
    memoryview(arena)[-1] = 7
    assert bytes(arena)[-1] == 7


def test_a_view_lies_at_the_address():
    arena = _C.Arena(100)
    assert np.frombuffer(arena, dtype=np.uint8).ctypes.data == arena.address


def test_a_view_keeps_the_memory_alive():
    arena = _C.Arena(MIB)
    view = memoryview(arena)
    view[:4] = b"kept"
    del arena
    gc.collect()
    _C.Arena(MIB)
    assert view[:4] == b"kept"


@pytest.mark.parametrize("nbytes", [0, 10, MIB, 10 * MIB])
def test_it_is_not_resized_while_a_view_is_in_use(nbytes):
    arena = _C.Arena(MIB)
    address = arena.address
    view = memoryview(arena)
    part = view[5:10]
    view.release()
    with pytest.raises(BufferError, match="1 views"):
        arena.resize(nbytes)
    assert (len(arena), arena.address) == (MIB, address)
    part.release()
    arena.resize(nbytes)
    assert len(arena) == nbytes


def test_its_views_are_counted_each():
    arena = _C.Arena(10)
    views = [memoryview(arena) for _ in range(3)]
    for view in views:
        with pytest.raises(BufferError):
            arena.resize(20)
        view.release()
    arena.resize(20)


def test_shrinking_by_less_than_half_keeps_the_pages():
    arena = _C.Arena(10 * PAGE_BYTES)
    address = arena.address
    memoryview(arena)[:4] = b"kept"
    for pages in (9, 6, 10, 6):
        arena.resize(pages * PAGE_BYTES)
        assert (arena.address, len(arena)) == (address, pages * PAGE_BYTES)
    assert bytes(arena)[:4] == b"kept"


def test_shrinking_by_half_gives_memory_back():
    arena = _C.Arena(64 * MIB)
    memoryview(arena)[:] = b"x" * (64 * MIB)
    before = resident_bytes()
    arena.resize(32 * MIB)
    assert before - resident_bytes() > 48 * MIB
    assert bytes(memoryview(arena)[:PAGE_BYTES]) == bytes(PAGE_BYTES), "fresh memory is zero"


def test_growing_gives_that_much():
    arena = _C.Arena(0)
    for nbytes in LENGTHS:
        arena.resize(nbytes)
        memoryview(arena)[:] = b"y" * nbytes
        assert bytes(arena) == b"y" * nbytes


def test_its_memory_goes_back_with_it():
    arena = _C.Arena(64 * MIB)
    memoryview(arena)[:] = b"x" * (64 * MIB)
    before = resident_bytes()
    del arena
    assert before - resident_bytes() > 48 * MIB


@pytest.mark.parametrize("nbytes", [1 << 62, (1 << 63) - 1])
def test_what_the_system_refuses_is_a_memory_error(nbytes):
    with pytest.raises(MemoryError):
        _C.Arena(nbytes)
    arena = _C.Arena(PAGE_BYTES)
    memoryview(arena)[:4] = b"kept"
    with pytest.raises(MemoryError):
        arena.resize(nbytes)
    assert bytes(arena)[:4] == b"kept"


def test_a_negative_size_is_refused():
    with pytest.raises(ValueError, match="nbytes"):
        _C.Arena(-1)
    with pytest.raises(ValueError, match="nbytes"):
        _C.Arena(1).resize(-1)


def test_large_memory_starts_at_a_huge_page():
    for nbytes in (4 * MIB, 5 * MIB + 1, 64 * MIB):
        assert _C.Arena(nbytes).address % (2 * MIB) == 0


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_populating_takes_every_page_at_once_and_changes_none(threads):
    arena = _C.Arena(64 * MIB)
    memoryview(arena)[20 * MIB : 20 * MIB + 4] = b"kept"
    before = resident_bytes()
    arena.populate(threads)
    assert resident_bytes() - before > 56 * MIB
    assert bytes(memoryview(arena)[20 * MIB : 20 * MIB + 8]) == b"kept\0\0\0\0"


@pytest.mark.parametrize("view", [memoryview, lambda arena: arena], ids=["memoryview", "arena"])
def test_a_tensor_shares_its_memory_and_keeps_it_alive(view):
    arena = _C.Arena(MIB)
    tensor = torch.frombuffer(view(arena), dtype=torch.uint8)
    assert (tensor.data_ptr(), tensor.nbytes) == (arena.address, MIB)
    tensor[5] = 7
    assert memoryview(arena)[5] == 7
    memoryview(arena)[6] = 8
    assert tensor[6] == 8
    part = torch.frombuffer(view(arena), dtype=torch.float32, count=8, offset=4096)
    part.fill_(1.5)
    del arena, tensor
    gc.collect()
    _C.Arena(MIB)
    assert part.tolist() == [1.5] * 8


def test_it_is_not_resized_while_a_tensor_looks_at_it():
    arena = _C.Arena(MIB)
    tensor = torch.frombuffer(memoryview(arena), dtype=torch.uint8)
    row = tensor.view(2, -1)[1]
    del tensor
    gc.collect()
    with pytest.raises(BufferError, match="1 views"):
        arena.resize(0)
    del row
    gc.collect()
    arena.resize(0)


def test_without_a_device_it_is_not_pinned_and_that_is_no_error():
    arena = _C.Arena(MIB, pin=True)
    assert arena.pinned is (_C.build_info()["cuda"] is not False and torch.cuda.is_available())
    assert _C.Arena(MIB).pinned is False
    memoryview(arena)[-1] = 1


def has_mapping_at(address: int) -> bool:
    lines = Path("/proc/self/maps").read_text().splitlines()
    spans = [[int(part, 16) for part in line.split()[0].split("-")] for line in lines]
    return any(start <= address < end for start, end in spans)


@pytest.mark.parametrize(
    ("options", "there"),
    [
        ({}, True),
        ({"dont_fork": True}, False),
        ({"pin": True}, False),
        ({"dont_fork": True, "name": ""}, False),
    ],
)
def test_a_forked_child_has_it_unless_it_was_left_out(options, there, name):
    arena = _C.Arena(8 * MIB, **({**options, "name": name} if "name" in options else options))
    memoryview(arena)[:4] = b"mine"
    child = os.fork()
    if child == 0:
        found = has_mapping_at(arena.address)
        del arena  # which must not unmap what lies there now
        os._exit(0 if found is there else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert bytes(arena)[:4] == b"mine"


def test_after_a_fork_its_pages_are_written_without_a_copy():
    """A page that a child has too is copied when the parent writes it: one fault a page."""

    def faults_of_writing_beside_a_child(dont_fork: bool) -> int:
        arena = _C.Arena(3 * MIB, dont_fork=dont_fork)  # small pages
        arena.populate()
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(write)
            os.read(read, 1)  # until the parent has counted
            os._exit(0)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        ctypes.memset(arena.address, 1, len(arena))
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        os.close(write)
        os.close(read)
        os.waitpid(child, 0)
        return faults

    pages = 3 * MIB // PAGE_BYTES
    assert faults_of_writing_beside_a_child(dont_fork=False) >= pages
    assert faults_of_writing_beside_a_child(dont_fork=True) < pages // 4


# Shared memory.


def file_of(name: str) -> Path:
    return Path("/dev/shm") / name


def test_what_a_process_left_is_found_after_it_was_killed(name):
    program = (
        "import os, signal, sys\n"
        "from dtruntime_torch import _C\n"
        "arena = _C.Arena(5_000_001, name=sys.argv[1])\n"
        "memoryview(arena)[:4], memoryview(arena)[-4:] = b'left', b'here'\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", program, name], timeout=60)
    assert killed.returncode == -signal.SIGKILL
    arena = _C.Arena.attach(name)
    assert (len(arena), arena.name, arena.pinned) == (5_000_001, name, False)
    assert (bytes(arena)[:4], bytes(arena)[-4:]) == (b"left", b"here")
    assert arena.address % PAGE_BYTES == 0


def test_attached_it_is_the_same_memory(name):
    one = _C.Arena(MIB, name=name)
    other = _C.Arena.attach(name)
    memoryview(one)[7] = 9
    assert memoryview(other)[7] == 9
    assert one.address != other.address


def test_its_name_outlives_it_until_unlink(name):
    arena = _C.Arena(MIB, name=name)
    memoryview(arena)[:4] = b"kept"
    del arena
    gc.collect()
    arena = _C.Arena.attach(name)
    arena.unlink()
    assert bytes(arena)[:4] == b"kept"
    assert not file_of(name).exists()
    with pytest.raises(FileNotFoundError) as caught:
        _C.Arena.attach(name)
    assert caught.value.filename == str(file_of(name))


def test_unlinked_twice_it_leaves_a_successor_alone(name):
    arena = _C.Arena(MIB, name=name)
    arena.unlink()
    _C.Arena(MIB, name=name)
    with pytest.raises(FileNotFoundError):
        arena.unlink()
    assert file_of(name).exists()


def test_without_a_name_there_is_nothing_to_unlink():
    arena = _C.Arena(MIB)
    assert arena.name is None
    with pytest.raises(ValueError, match="no name"):
        arena.unlink()


def test_it_belongs_to_us_alone_and_all_of_it_is_there(name):
    _C.Arena(5 * MIB + 1, name=name)
    about = file_of(name).stat()
    assert (stat.S_IMODE(about.st_mode), about.st_uid, about.st_size) == (0o600, os.geteuid(), 5 * MIB + 1)
    assert about.st_blocks * 512 >= 5 * MIB + 1


def test_a_name_in_use_is_left_as_it_is(name):
    memoryview(_C.Arena(10, name=name))[:] = b"0123456789"
    with pytest.raises(FileExistsError) as caught:
        _C.Arena(MIB, name=name)
    assert caught.value.filename == str(file_of(name))
    assert file_of(name).read_bytes() == b"0123456789"


@pytest.mark.parametrize("bad", ["", ".", ".hidden", "a/b", "../x", "a b", "a\0b", "ä", "x" * 201])
def test_a_bad_name_is_refused(bad):
    for call in (lambda: _C.Arena(1, name=bad), lambda: _C.Arena.attach(bad)):
        with pytest.raises(ValueError, match="a name of shared memory"):
            call()


def test_a_name_may_be_long(name):
    longest = name.ljust(200, "x")
    arena = _C.Arena(1, name=longest)
    arena.unlink()


def test_only_a_regular_file_of_ours_is_attached(name, tmp_path):
    (tmp_path / "target").write_bytes(b"x" * 100)
    file_of(name).symlink_to(tmp_path / "target")
    with pytest.raises(OSError, match="opening") as caught:
        _C.Arena.attach(name)
    assert caught.value.errno == errno.ELOOP
    with pytest.raises(FileExistsError):
        _C.Arena(10, name=name)
    file_of(name).unlink()
    os.mkfifo(file_of(name))
    with pytest.raises(ValueError, match="no regular file"):
        _C.Arena.attach(name)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_another_users_memory_is_refused(name):
    _C.Arena(10, name=name)
    os.chown(file_of(name), 12345, -1)
    with pytest.raises(PermissionError, match="belongs to user 12345"):
        _C.Arena.attach(name)


def test_what_does_not_fit_is_refused_and_leaves_no_name(name):
    room = os.statvfs("/dev/shm")
    with pytest.raises(OSError, match="room for") as caught:
        _C.Arena((room.f_blocks + 1) * room.f_frsize, name=name)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(file_of(name)))
    assert not file_of(name).exists()


def test_what_does_not_fit_any_more_leaves_it_as_it_was(name):
    room = os.statvfs("/dev/shm")
    arena = _C.Arena(10_000, name=name)
    memoryview(arena)[:4] = b"kept"
    with pytest.raises(OSError, match="room for"):
        arena.resize((room.f_blocks + 1) * room.f_frsize)
    assert (len(arena), bytes(arena)[:4], file_of(name).stat().st_size) == (10_000, b"kept", 10_000)


FULL = """
import errno, os, sys
from dtruntime_torch import _C

room = os.statvfs("/dev/shm")
assert room.f_blocks * room.f_frsize == 16 << 20, "the small one is not mounted"
with open("/dev/shm/hole", "wb") as file:  # made by one that died before it had all its space
    file.truncate(17 << 20)
for make in (lambda: _C.Arena(17 << 20, name="new"), lambda: _C.Arena.attach("hole")):
    try:
        make()
    except OSError as error:
        assert error.errno == errno.ENOSPC, error
    else:
        sys.exit("there was no error")
assert os.listdir("/dev/shm") == ["hole"]
os.truncate("/dev/shm/hole", 8 << 20)
memoryview(_C.Arena.attach("hole"))[-1] = 1
assert os.stat("/dev/shm/hole").st_blocks * 512 == 8 << 20
"""


def test_memory_with_holes_is_filled_or_refused():
    mount = "mount -t tmpfs -o size=16m none /dev/shm && exec "
    command = [
        "unshare",
        "--mount",
        "--map-root-user",
        "sh",
        "-c",
        mount + f'"{sys.executable}" -c "$0"',
        FULL,
    ]
    probe = ["unshare", "--mount", "--map-root-user", "sh", "-c", mount + "true"]
    if shutil.which("unshare") is None or subprocess.run(probe, capture_output=True).returncode != 0:
        pytest.skip("no private /dev/shm can be mounted here")
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")


def test_named_it_grows_and_shrinks_with_its_file(name):
    arena = _C.Arena(10, name=name)
    for nbytes in (9 * MIB, 100, 0, PAGE_BYTES + 1, PAGE_BYTES + 1):
        arena.resize(nbytes)
        assert len(arena) == nbytes == file_of(name).stat().st_size
        memoryview(arena)[:] = b"y" * nbytes
        assert file_of(name).read_bytes() == b"y" * nbytes


def test_named_it_may_be_empty(name):
    assert len(_C.Arena(0, name=name)) == 0
    assert len(_C.Arena.attach(name)) == 0


def test_named_it_keeps_no_file_open_after_it_is_gone(name):
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = count()
    arena = _C.Arena(MIB, name=name)
    assert count() == before + 1
    del arena
    with pytest.raises(FileExistsError):
        _C.Arena(MIB, name=name)
    assert count() == before
