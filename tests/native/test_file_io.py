"""Whole files and ranges of files, past the page cache and through it, on several file systems."""

from __future__ import annotations

import errno
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import numpy as np
import pytest

from dtruntime_torch import _C
from tests.boundaries import DIRECT_FROM, FILE_LENGTHS, PAGE_BYTES, REQUEST_BYTES

DATA = Random(1).randbytes(max(FILE_LENGTHS))


def arena_with(data: bytes) -> _C.Arena:
    arena = _C.Arena(len(data))
    memoryview(arena)[:] = data
    return arena


@contextmanager
def mounted(kind: str, options: str = "") -> Iterator[Path]:
    """A file system of its own, for those who may mount one."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["mount", "-t", kind, *(["-o", options] if options else []), "none", folder]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0:
            pytest.skip(f"{' '.join(command)}: {result.stderr.strip()}")
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", folder], check=True)


@pytest.fixture(params=["disk", "/dev/shm", "ramfs"])
def folder(request, tmp_path) -> Iterator[Path]:
    if request.param == "disk":
        yield tmp_path
    elif request.param == "ramfs":
        with mounted("ramfs") as path:  # refuses O_DIRECT and fallocate
            yield path
    else:
        with tempfile.TemporaryDirectory(dir=request.param) as name:
            yield Path(name)


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("length", FILE_LENGTHS)
def test_what_is_written_is_read_back(folder, length, direct):
    path = folder / "file"
    _C.write_file(str(path), [arena_with(DATA[:length])], direct=direct)
    assert path.read_bytes() == DATA[:length]
    assert bytes(_C.read_file(str(path), 0, length, direct=direct)) == DATA[:length]


@pytest.mark.parametrize("queue_depth", [1, 2, 5])
def test_any_queue_depth_writes_the_same(tmp_path, queue_depth):
    path = tmp_path / "file"
    _C.write_file(path, [arena_with(DATA)], queue_depth)
    assert path.read_bytes() == DATA
    assert bytes(_C.read_file(path, 0, len(DATA), queue_depth)) == DATA


@pytest.mark.parametrize("direct", [True, False])
def test_unaligned_and_many_buffers_are_written_in_sequence(folder, direct):
    path = folder / "file"
    arena = arena_with(DATA)
    bounds = sorted(Random(2).sample(range(len(DATA)), 500))
    # Small pieces anywhere, a large one that is not aligned, empty ones, and a read-only array.
    large = max(bounds)
    small = [memoryview(arena)[a:b] for a, b in zip([0, *bounds], bounds, strict=False)]
    array = np.frombuffer(DATA, dtype=np.uint16, count=1000)
    _C.write_file(path, [b"", *small, b"", memoryview(arena)[large:], array, b""], direct=direct)
    assert path.read_bytes() == DATA + DATA[:2000]


def test_an_unaligned_run_of_several_requests_is_written(tmp_path):
    path = tmp_path / "file"
    arena = arena_with(DATA)
    _C.write_file(path, [b"header", arena])
    assert path.read_bytes() == b"header" + DATA


def test_no_buffers_make_an_empty_file(folder):
    _C.write_file(folder / "none", [])
    _C.write_file(folder / "empty", [b"", b""])
    assert (folder / "none").read_bytes() == (folder / "empty").read_bytes() == b""


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("offset", [0, 1, 64, PAGE_BYTES - 1, PAGE_BYTES, 12345, REQUEST_BYTES - 1])
def test_a_range_is_read_from_any_offset(folder, offset, direct):
    path = folder / "file"
    path.write_bytes(DATA)
    for length in (0, 1, PAGE_BYTES, DIRECT_FROM + 1, REQUEST_BYTES, len(DATA) - offset):
        arena = _C.read_file(path, offset, length, direct=direct)
        assert len(arena) == length
        assert bytes(arena) == DATA[offset : offset + length]
        assert (arena.address - offset) % PAGE_BYTES == 0


def test_what_was_read_is_the_callers_own(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(DATA)
    arena = _C.read_file(path, 100, 10_000)
    memoryview(arena)[:4] = b"mine"
    arena.resize(100_000)
    assert arena.address % PAGE_BYTES == 0
    assert path.read_bytes() == DATA


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize(
    ("offset", "length"), [(0, 11), (11, 0), (10, 1), (0, 1 << 60), (1 << 62, 1 << 62), ((1 << 63) - 1, 1)]
)
def test_a_short_file_is_found_before_memory_is_taken(tmp_path, offset, length, direct):
    path = tmp_path / "short"
    path.write_bytes(b"0123456789")
    with pytest.raises(EOFError, match=r"short.*has 10"):  # 2**60 bytes would be a MemoryError
        _C.read_file(path, offset, length, direct=direct)


def test_an_existing_file_is_never_touched(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(FileExistsError) as caught:
        _C.write_file(str(path), [b"new"])
    assert (caught.value.errno, caught.value.filename) == (errno.EEXIST, str(path))
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("length", [0, 10, DIRECT_FROM])
def test_a_missing_file_or_folder_is_named(tmp_path, length):
    path = str(tmp_path / "missing" / "file")
    for call in (lambda: _C.write_file(path, [bytes(length)]), lambda: _C.read_file(path, 0, length)):
        with pytest.raises(FileNotFoundError) as caught:
            call()
        assert (caught.value.errno, caught.value.filename) == (errno.ENOENT, path)
        assert os.strerror(errno.ENOENT) in caught.value.strerror


def test_only_regular_files_are_read(tmp_path):
    with pytest.raises(IsADirectoryError):
        _C.read_file(tmp_path, 0, 1)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ValueError, match="regular"):  # and does not wait for a writer
        _C.read_file(tmp_path / "fifo", 0, 1)


def test_a_path_with_a_nul_is_refused(tmp_path):
    with pytest.raises(ValueError):
        _C.write_file("a\0b", [b""])


def test_data_is_a_sequence_of_buffers(tmp_path):
    for data in (b"one buffer", ["text"], [memoryview(b"abcdef")[::2]]):
        with pytest.raises((TypeError, BufferError)):
            _C.write_file(tmp_path / "file", data)
    assert not list(tmp_path.iterdir()), "checked before the file is made"


@pytest.mark.parametrize("direct", [True, False])
def test_a_full_disk_is_found_before_anything_is_written(direct):
    with mounted("tmpfs", "size=1m") as folder:
        with pytest.raises(OSError) as caught:
            _C.write_file(folder / "file", [b"x" * (1 << 20), b"y"], direct=direct)
        assert caught.value.errno == errno.ENOSPC
        assert caught.value.filename == folder / "file"
        assert "reserving" in caught.value.strerror
        (folder / "file").unlink()
        _C.write_file(folder / "file", [b"x" * (1 << 19)], direct=direct)


def test_a_rename_replaces_nothing(folder):
    (folder / "source").write_bytes(b"new")
    (folder / "target").write_bytes(b"old")
    with pytest.raises(OSError) as caught:
        _C.rename_noreplace(str(folder / "source"), str(folder / "target"))
    if caught.value.errno == errno.EINVAL:
        pytest.skip("this file system has no RENAME_NOREPLACE, and says so")
    assert isinstance(caught.value, FileExistsError)
    assert (caught.value.filename, caught.value.filename2) == (str(folder / "source"), str(folder / "target"))
    assert (folder / "target").read_bytes() == b"old"
    (folder / "target").unlink()
    _C.rename_noreplace(folder / "source", folder / "target")
    assert (folder / "target").read_bytes() == b"new"
    assert not (folder / "source").exists()


def test_a_rename_names_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        _C.rename_noreplace(tmp_path / "a", tmp_path / "b")
    assert (caught.value.filename, caught.value.filename2) == (tmp_path / "a", tmp_path / "b")
