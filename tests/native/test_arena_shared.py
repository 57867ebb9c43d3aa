"""Memory under a name: who finds it, who is refused, and how it grows."""

from __future__ import annotations

import errno
import gc
import os
import shutil
import signal
import stat
import subprocess
import sys

import pytest

from dtruntime_torch import _C
from tests.boundaries import PAGE_BYTES
from tests.native.shared_memory import file_of

MIB = 1 << 20


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
