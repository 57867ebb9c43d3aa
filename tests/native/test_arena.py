"""Memory that starts at a page, lives as long as anyone looks at it, and is reused."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest

from dtruntime_torch import _C
from tests.boundaries import LENGTHS, PAGE_BYTES

MIB = 1 << 20


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


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
