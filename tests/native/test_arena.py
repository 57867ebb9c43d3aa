"""Memory that starts at a page, lives as long as anyone looks at it, and is reused."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import resource
from pathlib import Path

import numpy as np
import pytest
import torch

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


def test_it_counts_how_often_it_was_resized():
    arena = _C.Arena(MIB)
    assert arena.resizes == 0
    with memoryview(arena), pytest.raises(BufferError):
        arena.resize(10)
    assert arena.resizes == 0
    arena.resize(10)
    arena.resize(MIB)
    assert arena.resizes == 2


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


def test_where_it_cannot_be_pinned_it_is_there_all_the_same_and_says_why():
    arena = _C.Arena(MIB, pin=True)
    memoryview(arena)[-1] = 1
    assert arena.pinned is (arena.pin_refusal is None)
    if not arena.pinned:
        said = "built without CUDA" if _C.build_info()["cuda"] is False else r"\(cudaError"
        assert re.search(said, str(arena.pin_refusal))


def test_what_was_not_to_be_pinned_was_not_refused():
    arena = _C.Arena(MIB)
    assert (arena.pinned, arena.pin_refusal) == (False, None)


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
