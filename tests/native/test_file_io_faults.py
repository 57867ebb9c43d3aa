"""System calls that are interrupted, fall short, refuse O_DIRECT late or fail: put between the module and libc."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.boundaries import DIRECT_FROM, PAGE_BYTES, REQUEST_BYTES

# Every second call meets the fault; the others are met by each call that they concern.
SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int calls;

static int is(const char* fault) { return strcmp(getenv("FAULT"), fault) == 0; }

static int meets_fault(int fd, size_t* count) {
  const int direct = (fcntl(fd, F_GETFL) & O_DIRECT) != 0;
  const int second = __atomic_add_fetch(&calls, 1, __ATOMIC_SEQ_CST) % 2;
  if (is("REFUSE_DIRECT") && direct) return errno = EINVAL, 1;
  if (is("FAIL") || (is("FAIL_DIRECT") && direct)) return errno = EIO, 1;
  if (is("INTERRUPT") && second) return errno = EINTR, 1;
  if (is("SHORT_PAGES") && second && *count > 8192) *count = 8192;
  return 0;
}

// O_DIRECT takes no odd count, so the whole is transferred and less is reported.
static ssize_t reported(ssize_t count) {
  return is("SHORT_ODD") && calls % 2 && count > 8192 ? 777 : count;
}

ssize_t pwrite(int fd, const void* data, size_t count, off_t offset) {
  ssize_t (*real)(int, const void*, size_t, off_t) = dlsym(RTLD_NEXT, "pwrite");
  return meets_fault(fd, &count) ? -1 : reported(real(fd, data, count, offset));
}

ssize_t pread(int fd, void* data, size_t count, off_t offset) {
  ssize_t (*real)(int, void*, size_t, off_t) = dlsym(RTLD_NEXT, "pread");
  return meets_fault(fd, &count) ? -1 : reported(real(fd, data, count, offset));
}

int fsync(int fd) {
  int (*real)(int) = dlsym(RTLD_NEXT, "fsync");
  if (is("FAIL_SYNC")) return errno = EIO, -1;
  if (is("INTERRUPT") && __atomic_add_fetch(&calls, 1, __ATOMIC_SEQ_CST) % 2) return errno = EINTR, -1;
  return real(fd);
}
"""

ROUND_TRIP = """
import sys
from random import Random
from dtruntime_torch import _C
path, length, threads, direct = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "direct"
arena = _C.Arena(length)
memoryview(arena)[:] = Random(3).randbytes(length)
for number, data in enumerate(([arena], [b"unaligned", arena])):
    whole = b"".join(data)
    _C.write_file(path + str(number), data, threads, direct)
    assert open(path + str(number), "rb").read() == whole, "written"
    assert bytes(_C.read_file(path + str(number), 5, len(whole) - 5, threads, direct)) == whole[5:], "read"
"""

FAILURE = """
import sys
from dtruntime_torch import _C
try:
    if sys.argv[2] == "write":
        _C.write_file(sys.argv[1], [bytes(20 << 20)])
    else:
        _C.read_file(sys.argv[1], 0, 20 << 20)
except OSError as error:
    print(error.errno, error.filename, error.strerror, sep="|")
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler to build the shim with")
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.c").write_text(SHIM)
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", folder / "shim.so", folder / "shim.c", "-ldl"]
    subprocess.run(command, check=True)
    return folder / "shim.so"


def run(shim: Path, fault: str, program: str, *arguments: object) -> str:
    environment = os.environ | {"LD_PRELOAD": str(shim), "FAULT": fault}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("direct", ["direct", "cached"])
@pytest.mark.parametrize("fault", ["NONE", "INTERRUPT", "SHORT_PAGES", "SHORT_ODD", "REFUSE_DIRECT"])
@pytest.mark.parametrize(
    "place", ["disk", "/dev/shm"]
)  # where O_DIRECT must be aligned, and where it need not
def test_what_is_not_a_failure_is_overcome(shim, tmp_path, place, fault, direct):
    length = REQUEST_BYTES + DIRECT_FROM + PAGE_BYTES + 1
    with tempfile.TemporaryDirectory(dir=tmp_path if place == "disk" else place) as folder:
        run(shim, fault, ROUND_TRIP, Path(folder, "file"), length, 3, direct)


@pytest.mark.parametrize(
    ("fault", "call", "step"),
    [("FAIL", "write", "writing"), ("FAIL", "read", "reading"), ("FAIL_SYNC", "write", "fsync")],
)
def test_a_failure_is_reported_with_its_step_and_path(shim, tmp_path, fault, call, step):
    path = tmp_path / "file"
    if call == "read":
        path.write_bytes(bytes(20 << 20))
    code, name, text = run(shim, fault, FAILURE, path, call).split("|")
    assert (int(code), name) == (errno.EIO, str(path))
    assert text == f"{os.strerror(errno.EIO)} ({step})"
    assert path.exists(), "the file is the caller's to delete"


@pytest.mark.parametrize("call", ["write", "read"])
def test_large_files_go_past_the_page_cache(shim, tmp_path, call):
    path = tmp_path / "file"
    path.write_bytes(bytes(20 << 20))
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError as error:
        pytest.skip(f"this file system refuses O_DIRECT: {error}")
    if call == "write":
        path.unlink()
    assert run(shim, "FAIL_DIRECT", FAILURE, path, call).startswith(f"{errno.EIO}|")
