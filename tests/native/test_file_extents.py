"""Pieces of memory anywhere in a file, and back; the oracle is Python's own reading and writing of files."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from random import Random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dtruntime_torch import _C
from tests.boundaries import DIRECT_FROM, PAGE_BYTES, REQUEST_BYTES, around

Extent = tuple[int, int, int]

ARENA_BYTES = 3 << 20
DATA = Random(4).randbytes(ARENA_BYTES)
ARENA = _C.Arena(ARENA_BYTES)
memoryview(ARENA)[:] = DATA
LENGTHS = st.sampled_from([0, 1, 100, *around(PAGE_BYTES, DIRECT_FROM), 3 * PAGE_BYTES, DIRECT_FROM + 777])
GAPS = st.sampled_from([0, 0, 0, 1, 64, *around(PAGE_BYTES), 3 * PAGE_BYTES])

JOINED = [(0, 0, DIRECT_FROM), (DIRECT_FROM, DIRECT_FROM, DIRECT_FROM)]
SWAPPED = [(DIRECT_FROM, 0, DIRECT_FROM), (0, DIRECT_FROM, DIRECT_FROM)]
SHIFTED = [(1, 0, DIRECT_FROM)]
INSIDE = [(100, 100, DIRECT_FROM + 2 * PAGE_BYTES)]  # whole pages, and ends that fill none


@st.composite
def extents(draw) -> list[Extent]:
    """Disjoint in memory and in the file, neither in the same order nor at the same place in their pages."""
    pieces = draw(st.lists(st.tuples(LENGTHS, GAPS, GAPS), min_size=1, max_size=7))
    in_memory = draw(st.permutations(range(len(pieces))))
    starts, at = {}, 0
    for index in in_memory:
        length, gap, _ = pieces[index]
        starts[index] = at + gap
        at += gap + length
    found, offset = [], 0
    for index, (length, _, gap) in enumerate(pieces):
        found.append((starts[index], offset + gap, length))
        offset += gap + length
    return draw(st.permutations(found))


def image(pieces: list[Extent], nbytes: int | None = None) -> bytes:
    """The file that these pieces of the arena make."""
    end = max((offset + length for _, offset, length in pieces if length), default=0)
    file = bytearray(end if nbytes is None else nbytes)
    for start, offset, length in pieces:
        file[offset : offset + length] = DATA[start : start + length]
    return bytes(file)


@pytest.mark.parametrize("place", ["disk", "/dev/shm"])
@given(
    pieces=extents(),
    longer=st.sampled_from([None, 0, 1, 5000]),
    depth=st.sampled_from([1, 3]),
    direct=st.booleans(),
)
@example(pieces=[(0, 0, 0)], longer=None, depth=1, direct=True)
@example(pieces=JOINED, longer=None, depth=3, direct=True)
@example(pieces=SWAPPED, longer=None, depth=1, direct=True)
@example(pieces=SHIFTED, longer=None, depth=1, direct=True)
@example(pieces=INSIDE, longer=None, depth=1, direct=True)
@settings(max_examples=60)
def test_extents_arrive_where_they_belong(place, pieces, longer, depth, direct, tmp_path_factory):
    base = tmp_path_factory.getbasetemp() if place == "disk" else place
    with tempfile.TemporaryDirectory(dir=base) as folder:
        path = Path(folder, "file")
        nbytes = None if longer is None else len(image(pieces)) + longer
        _C.write_extents(path, ARENA, pieces, nbytes=nbytes, queue_depth=depth, direct=direct)
        assert path.read_bytes() == image(pieces, nbytes)


@pytest.mark.parametrize("place", ["disk", "/dev/shm"])
@given(pieces=extents(), depth=st.sampled_from([1, 3]), direct=st.booleans(), lead=st.sampled_from([0, 64]))
@example(pieces=JOINED, depth=3, direct=True, lead=0)
@example(pieces=SWAPPED, depth=1, direct=True, lead=0)
@example(pieces=SHIFTED, depth=1, direct=True, lead=0)
@example(pieces=INSIDE, depth=1, direct=True, lead=0)
@settings(max_examples=60)
def test_extents_are_read_to_their_place_and_nothing_beside_it(
    place, pieces, depth, direct, lead, tmp_path_factory
):
    base = tmp_path_factory.getbasetemp() if place == "disk" else place
    with tempfile.TemporaryDirectory(dir=base) as folder:
        path = Path(folder, "file")
        file = image(pieces)
        path.write_bytes(file)
        arena = _C.Arena(lead + ARENA_BYTES)
        view = memoryview(arena)
        view[:] = b"\xaa" * len(arena)
        expected = bytearray(view)
        for start, offset, length in pieces:
            expected[lead + start : lead + start + length] = file[offset : offset + length]
        _C.read_extents(path, view[lead:], pieces, queue_depth=depth, direct=direct)
        assert view == expected


@pytest.mark.parametrize(
    ("pieces", "nbytes", "message"),
    [
        ([(0, 0, 10), (20, 9, 1)], None, r"in the file, range 0 .* overlaps range 1"),
        ([(0, 5, 10), (20, 0, 6)], None, r"in the file, range 1 .* overlaps range 0"),
        ([(ARENA_BYTES - 5, 0, 6)], None, "ends after the"),
        ([(1 << 62, 0, 1)], None, "ends after the"),
        ([(0, (1 << 63) - 1, 1)], None, "last byte that a file can have"),
        ([(0, 0, 10)], 9, "ends at 10, after the end of the file, nbytes=9"),
        ([(0, 0, 10)], -1, "nbytes must not be negative"),
        ([(-1, 0, 10)], None, "must not be negative"),
        ([(0, -1, 10)], None, "must not be negative"),
        ([(0, 0, -1)], None, "must not be negative"),
    ],
)
def test_bad_extents_are_refused_before_the_file_is_made(tmp_path, pieces, nbytes, message):
    with pytest.raises(ValueError, match=message):
        _C.write_extents(tmp_path / "file", ARENA, pieces, nbytes=nbytes)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([(0, 0, 10), (20, 9, 1)], "in the file, range 0 .* overlaps"),
        ([(0, 0, 10), (9, 20, 1)], "in memory, range 0 .* overlaps"),
        ([(95, 0, 6)], "ends after the 100 bytes"),
    ],
)
def test_bad_extents_are_refused_before_anything_is_read(tmp_path, pieces, message):
    (tmp_path / "file").write_bytes(DATA[:100])
    arena = _C.Arena(100)
    with pytest.raises(ValueError, match=message):
        _C.read_extents(tmp_path / "file", arena, pieces)
    assert bytes(arena) == bytes(100)


def test_a_short_file_is_found_before_anything_is_read(tmp_path):
    (tmp_path / "file").write_bytes(DATA[:100])
    arena = _C.Arena(100)
    with pytest.raises(EOFError, match="the file has 100"):
        _C.read_extents(tmp_path / "file", arena, [(0, 0, 50), (50, 51, 50)])
    assert bytes(arena) == bytes(100)


def test_what_is_read_needs_memory_that_may_be_written(tmp_path):
    (tmp_path / "file").write_bytes(b"data")
    with pytest.raises(BufferError):
        _C.read_extents(tmp_path / "file", b"kept", [(0, 0, 4)])


def test_the_same_memory_may_be_written_twice(tmp_path):
    _C.write_extents(tmp_path / "file", ARENA, [(0, 0, 10), (0, 10, 10)])
    assert (tmp_path / "file").read_bytes() == DATA[:10] * 2


def test_the_folder_is_synced_if_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, path in enumerate(["relative", str(tmp_path / "absolute")]):
        for sync_folder in (False, True):
            _C.inject_fault("any", 1 << 62, "kill")
            _C.write_extents(f"{path}{sync_folder}", ARENA, [(0, 0, 10)], sync_folder=sync_folder)
            counts = _C.clear_faults()
            assert counts["fsync"] == counts["open"] == counts["close"] == 1 + sync_folder, number


def test_neighbours_in_the_file_share_a_request(tmp_path):
    pieces = [(i * 5000 % 40_000, i * 1000, 1000) for i in range(2000)]
    _C.inject_fault("any", 1 << 62, "kill")
    _C.write_extents(tmp_path / "file", ARENA, pieces)
    assert _C.clear_faults()["pwrite"] == 2, "the whole pages, and the end that fills none"
    assert (tmp_path / "file").read_bytes() == image(pieces)


def is_cached(path: Path) -> bool:
    """Whether the first bytes of a file can be had without asking the disk. Asking brings them there."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.preadv(descriptor, [bytearray(10)], 0, os.RWF_NOWAIT) > 0
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("direct", [True, False])
def test_whole_pages_go_past_the_page_cache_unless_told_otherwise(tmp_path, direct):
    whole = [(0, 0, ARENA_BYTES)]
    for name in ("written", "read"):
        _C.write_extents(tmp_path / name, ARENA, whole, direct=direct or name == "read")
    try:
        os.close(os.open(tmp_path / "read", os.O_RDONLY | os.O_DIRECT))
    except OSError as error:
        pytest.skip(f"this file system refuses O_DIRECT: {error}")
    _C.read_extents(tmp_path / "read", _C.Arena(ARENA_BYTES), whole, direct=direct)
    assert is_cached(tmp_path / "written") == is_cached(tmp_path / "read") == (not direct)


WITHOUT_ROOM_TO_COPY = """
import resource, sys
from pathlib import Path
from dtruntime_torch import _C
path, nbytes = sys.argv[1], int(sys.argv[2])
arena = _C.Arena(nbytes)
memoryview(arena)[:] = bytes(range(256)) * (nbytes // 256)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + nbytes // 4, resource.RLIM_INFINITY))
whole, shifted = [(0, 0, nbytes)], [(1, 0, nbytes - 1)]
_C.write_extents(path, arena, whole, queue_depth=1)
_C.write_file(path + "-file", [arena], queue_depth=1)
_C.read_extents(path, arena, whole, queue_depth=1)
for call in (_C.write_extents, _C.read_extents):
    try:
        call(path + "-shifted" if call is _C.write_extents else path, arena, shifted, queue_depth=1)
    except MemoryError:
        print("no room to copy")
"""


def test_memory_that_lies_as_the_file_does_is_not_copied(tmp_path):
    """It is written and read although there is no memory for a copy, which other memory needs."""
    command = [sys.executable, "-c", WITHOUT_ROOM_TO_COPY, str(tmp_path / "file"), str(2 * REQUEST_BYTES)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["no room to copy"] * 2
    assert (tmp_path / "file").read_bytes() == (tmp_path / "file-file").read_bytes()
    assert (tmp_path / "file").stat().st_size == 2 * REQUEST_BYTES
