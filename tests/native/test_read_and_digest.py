"""Pieces of a file to where they belong with their digests, beside the file's bytes and xxhash."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from dtruntime_torch import _C

DATA = Random(5).randbytes((3 << 20) + 77)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(DATA)
    return path


@pytest.fixture(autouse=True)
def no_faults_afterwards() -> Iterator[None]:
    yield
    _C.clear_faults()


def digests_of(data: bytes, chunk_bytes: int) -> bytes:
    starts = range(0, len(data), chunk_bytes)
    return b"".join(xxhash.xxh3_128_digest(data[at : at + chunk_bytes]) for at in starts)


pieces = st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 3000)), max_size=8)


@given(pieces, st.sampled_from([1, 7, 64, 1000, 1 << 20]), st.sampled_from([0, 1, 3]))
def test_bytes_and_digests_are_those_of_the_file(tmp_path_factory, pieces, chunk_bytes, threads) -> None:
    path = tmp_path_factory.getbasetemp() / "read_and_digest"
    if not path.exists():
        path.write_bytes(DATA)
    targets = [bytearray(length) for _, length in pieces]
    offsets = [offset for offset, _ in pieces]
    found = _C.read_and_digest(path, targets, offsets, chunk_bytes, threads)
    expected = [DATA[offset : offset + length] for offset, length in pieces]
    assert [bytes(target) for target in targets] == expected
    assert found == b"".join(digests_of(data, chunk_bytes) for data in expected)


@pytest.mark.parametrize("threads", [0, 1, 5])
def test_a_large_piece_is_read_by_several_threads(file: Path, threads: int) -> None:
    target = bytearray(len(DATA) - 3)
    found = _C.read_and_digest(file, [target], [3], 1 << 20, threads)
    assert bytes(target) == DATA[3:]
    assert found == digests_of(DATA[3:], 1 << 20)


def test_nothing_is_read_past_the_end(file: Path) -> None:
    target = bytearray(b"\xa5" * 20)
    with pytest.raises(EOFError, match=f"{len(DATA) + 10}.*{len(DATA)}"):
        _C.read_and_digest(file, [target], [len(DATA) - 10], 8)
    assert target == b"\xa5" * 20


def test_targets_that_share_a_byte_are_refused(file: Path) -> None:
    memory = memoryview(bytearray(20))
    with pytest.raises(ValueError, match="in memory"):
        _C.read_and_digest(file, [memory[:11], memory[10:]], [0, 100], 8)
    assert bytes(memory) == bytes(20)


def test_arguments_that_make_no_sense_are_refused(file: Path) -> None:
    for targets, offsets, chunk_bytes in (
        ([bytearray(1)], [], 8),
        ([bytearray(1)], [0], 0),
        ([bytearray(1)], [-1], 8),
        ([bytearray(2)], [(1 << 63) - 1], 8),
    ):
        with pytest.raises(ValueError, match=r"."):
            _C.read_and_digest(file, targets, offsets, chunk_bytes)
    with pytest.raises((BufferError, TypeError, ValueError)):
        _C.read_and_digest(file, [b"read-only"], [0], 8)


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="regular"):
        _C.read_and_digest(tmp_path / "pipe", [bytearray(1)], [0], 8)
    with pytest.raises(FileNotFoundError):
        _C.read_and_digest(tmp_path / "nothing", [bytearray(1)], [0], 8)


def test_short_reads_are_continued(file: Path) -> None:
    for nth in range(1, 40, 3):
        _C.inject_fault("pread", nth, "shorten", 100)
    target = bytearray(len(DATA))
    assert _C.read_and_digest(file, [target], [0], 1 << 20) == digests_of(DATA, 1 << 20)
    assert bytes(target) == DATA


@pytest.mark.parametrize("nth", [1, 2, 4])
def test_a_read_that_fails_names_the_offset_and_the_file(file: Path, nth: int) -> None:
    _C.inject_fault("pread", nth, "fail", errno.EIO)
    with pytest.raises(OSError, match="offset") as caught:
        _C.read_and_digest(file, [bytearray(len(DATA))], [0], 1 << 20)
    assert (caught.value.errno, str(caught.value.filename)) == (errno.EIO, str(file))


def test_an_interrupted_read_is_repeated(file: Path) -> None:
    _C.inject_fault("pread", 2, "fail", errno.EINTR)
    target = bytearray(len(DATA))
    _C.read_and_digest(file, [target], [0], 1 << 20)
    assert bytes(target) == DATA
