"""Tensors in host memory into the arena: what arrives, when each may be overwritten, and how a staging ends."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dtruntime_torch import _C
from dtruntime_torch.checkpoint.staging.stager import Stager
from dtruntime_torch.errors import BarrierTimeout, InvalidArgument, SaveFailed
from tests.boundaries import CHUNK_BYTES, LENGTHS
from tests.checkpoint.patient_job import PatientJob
from tests.checkpoint.staging.scattered_tensors import digests_of

PATIENCE = 60.0
DTYPES = (torch.uint8, torch.bfloat16, torch.float32, torch.complex128)
LARGE = 64 << 20


def filled(shape: Sequence[int], dtype: torch.dtype, salt: int) -> torch.Tensor:
    nbytes = math.prod(shape) * dtype.itemsize
    data = np.random.default_rng(salt).integers(0, 256, nbytes, np.uint8)
    return torch.from_numpy(data).view(dtype).view(shape) if nbytes else torch.empty(shape, dtype=dtype)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def held(arena: _C.Arena, offset: int, length: int) -> bytes:
    return bytes(memoryview(arena)[offset : offset + length])


@st.composite
def stagings(draw: st.DrawFn) -> tuple[list[tuple[torch.Tensor, int]], int, int]:
    """Pairs in any order, the bytes of an arena that holds them, and the bytes of a chunk."""
    pairs, end = [], 0
    for salt in range(draw(st.integers(0, 7))):
        dtype = draw(st.sampled_from(DTYPES))
        shape = draw(st.lists(st.integers(0, 40), min_size=0, max_size=3))
        source = filled(shape, dtype, salt)
        end += draw(st.integers(0, 70))
        if draw(st.booleans()):
            source = source.mT if source.dim() > 1 else source
            source = source.conj() if draw(st.booleans()) else source
            end += -end % dtype.itemsize
        pairs.append((source, end))
        end += source.nbytes
    return draw(st.permutations(pairs)), end + draw(st.integers(0, 9)), draw(st.integers(1, 5000))


@given(stagings(), st.data())
def test_a_source_may_be_overwritten_as_soon_as_before_overwrite_has_returned(case, data):
    pairs, arena_nbytes, chunk_bytes = case
    arena = _C.Arena(arena_nbytes)
    before = [raw(source) for source, _ in pairs]
    staging = Stager(arena, chunk_bytes).start(pairs)
    for index in data.draw(st.permutations(range(len(pairs)))):
        staging.before_overwrite([index], PATIENCE)
        pairs[index][0].zero_()
    assert staging.wait(PATIENCE) == b"".join(digests_of(old, chunk_bytes) for old in before)
    for old, (_, offset) in zip(before, pairs, strict=True):
        assert held(arena, offset, len(old)) == old


def test_large_sources_may_be_overwritten_one_by_one_while_the_others_are_copied():
    sources = [filled((LARGE // 8,), torch.uint8, salt) for salt in range(8)]
    before = [raw(source) for source in sources]
    arena = _C.Arena(LARGE)
    staging = Stager(arena, 1 << 20).start([(s, n * s.nbytes) for n, s in enumerate(sources)])
    for index in reversed(range(8)):
        staging.before_overwrite([index], PATIENCE)
        sources[index].zero_()
    assert staging.wait(PATIENCE) == b"".join(digests_of(old, 1 << 20) for old in before)
    assert held(arena, 0, LARGE) == b"".join(before)


def test_all_sources_may_be_overwritten_after_before_overwrite_without_indices():
    source, arena = filled((LARGE,), torch.uint8, 1), _C.Arena(LARGE)
    before = raw(source)
    staging = Stager(arena, 1 << 20).start([(source, 0)])
    staging.before_overwrite(timeout=PATIENCE)
    source.zero_()
    staging.wait(PATIENCE)
    assert held(arena, 0, LARGE) == before


@pytest.mark.parametrize("length", LENGTHS)
def test_digests_are_those_of_each_chunk(length):
    source, arena = filled((length,), torch.uint8, length), _C.Arena(length + 3)
    digests = Stager(arena, CHUNK_BYTES, threads=2).start([(source, 3)]).wait(PATIENCE)
    assert digests == digests_of(raw(source), CHUNK_BYTES)
    assert held(arena, 3, length) == raw(source)


@pytest.mark.parametrize(
    "source",
    [
        filled((6, 4), torch.float32, 1)[:, ::2],
        filled((3, 1), torch.int16, 2).expand(3, 5),
        filled((4,), torch.complex64, 3).conj(),
        filled((4,), torch.complex64, 4).conj().imag,
    ],
    ids=["strided", "expanded", "conjugated", "negated"],
)
def test_what_does_not_lie_in_one_piece_arrives_in_row_major_order_before_start_returns(source):
    arena, expected = _C.Arena(200), raw(source)
    staging = Stager(arena, 16).start([(source, 8)])
    assert held(arena, 8, len(expected)) == expected
    assert staging.nbytes_done == staging.nbytes == len(expected)
    assert staging.wait(PATIENCE) == digests_of(expected, 16)


def test_a_strided_tensor_that_requires_grad_is_staged():
    source, arena = torch.rand(4, 3, requires_grad=True), _C.Arena(48)
    Stager(arena, 16).start([(source.T, 0)]).wait(PATIENCE)
    assert held(arena, 0, 48) == raw(source.detach().T)
    arena.resize(100)


def test_a_staging_counts_its_bytes():
    sources = [filled((LENGTHS[-1],), torch.uint8, 1), filled((4, 5), torch.float64, 2).T]
    staging = Stager(_C.Arena(1 << 21), 1 << 16).start([(sources[0], 160), (sources[1], 0)])
    assert staging.nbytes == LENGTHS[-1] + 160
    assert staging.nbytes_done <= staging.nbytes
    staging.wait(PATIENCE)
    assert staging.done() and staging.nbytes_done == staging.nbytes


def test_nothing_is_staged_at_once():
    staging = Stager(_C.Arena(0), 16).start([])
    staging.before_overwrite()
    assert staging.wait(PATIENCE) == b""
    assert staging.done() and staging.nbytes == staging.nbytes_done == 0


def test_waiting_again_gives_the_same_digests():
    staging = Stager(_C.Arena(64), 16).start([(filled((64,), torch.uint8, 1), 0)])
    digests = staging.wait(PATIENCE)
    assert digests and staging.wait(PATIENCE) is digests


def test_threads_that_wait_at_once_get_the_same_digests():
    source = filled((LARGE,), torch.uint8, 1)
    staging = Stager(_C.Arena(LARGE), 1 << 20).start([(source, 0)])
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(staging.wait(PATIENCE))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert found == [digests_of(raw(source), 1 << 20)] * 3


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ((filled((5,), torch.uint8, 1), 60), r"pair 1 \(uint8\[5\] on cpu, to bytes from 60 on\).*64 bytes"),
        ((filled((5,), torch.uint8, 1), -1), r"pair 1 .*from -1 on\).*64 bytes"),
        ((filled((4,), torch.uint8, 1), 6), r"pair 0 .* overlaps pair 1"),
        ((filled((2, 2), torch.int32, 1).T, 18), r"pair 1 .*multiple of its 4 bytes"),
        ((torch.zeros(2, device="meta"), 16), r"pair 1 .* on meta.*no bytes"),
        ((torch.zeros(2, 2).to_sparse(), 16), r"pair 1 .*no bytes"),
    ],
    ids=["past the end", "before the start", "overlap", "not aligned", "meta", "sparse"],
)
def test_a_wrong_pair_is_named_and_nothing_is_touched(wrong, what):
    arena = _C.Arena(64)
    with pytest.raises(InvalidArgument, match=what):
        Stager(arena, 16).start([(filled((2, 4), torch.uint8, 7).T, 0), wrong])
    assert held(arena, 0, 64) == bytes(64)


def test_empty_sources_may_lie_anywhere():
    source, empty = filled((8,), torch.uint8, 1), torch.empty(0, 3)
    staging = Stager(_C.Arena(8), 16).start([(empty, 3), (source, 0), (empty, 8)])
    assert staging.wait(PATIENCE) == digests_of(raw(source), 16)


@pytest.mark.parametrize("index", [-1, 1])
def test_before_overwrite_of_no_pair_is_refused(index):
    staging = Stager(_C.Arena(8), 16).start([(filled((8,), torch.uint8, 1), 0)])
    with pytest.raises(InvalidArgument, match=f"no pair {index}"):
        staging.before_overwrite([index])
    staging.wait(PATIENCE)


@pytest.mark.parametrize(("chunk_bytes", "threads"), [(0, None), (16, 0)])
def test_a_stager_without_chunks_or_threads_is_refused(chunk_bytes, threads):
    with pytest.raises(InvalidArgument):
        Stager(_C.Arena(8), chunk_bytes, threads)


def test_a_second_staging_is_refused_until_the_first_has_ended():
    source = filled((8,), torch.uint8, 1)
    stager = Stager(_C.Arena(8), 16)
    staging = stager.start([(source, 0)])
    with pytest.raises(InvalidArgument, match="in use"):
        stager.start([(source, 0)])
    staging.wait(PATIENCE)
    stager.start([(source, 0)]).wait(PATIENCE)


def test_a_timeout_says_how_far_it_has_come_and_the_staging_goes_on(monkeypatch):
    monkeypatch.setattr(_C, "CopyJob", PatientJob)
    source = filled((100,), torch.uint8, 1)
    staging = Stager(_C.Arena(100), 16).start([(source, 0)])
    with pytest.raises(BarrierTimeout, match="pair 0 may not be overwritten yet: after 3 s 0 of 100 bytes"):
        staging.before_overwrite([0], timeout=3)
    with pytest.raises(BarrierTimeout, match="after 5 s 0 of 100 bytes"):
        staging.wait(5)
    assert staging.wait() == digests_of(raw(source), 16)


def test_who_waits_without_helping_leaves_the_copies_to_the_background(monkeypatch):
    asked = []

    class Notes(PatientJob):
        def wait(self, copies=None, timeout=None, help=True):
            asked.append(help)
            return super().wait(copies, timeout, help)

    monkeypatch.setattr(_C, "CopyJob", Notes)
    source = filled((100,), torch.uint8, 1)
    assert Stager(_C.Arena(100), 16).start([(source, 0)]).wait(help=False) == digests_of(raw(source), 16)
    assert asked == [False]


def test_after_a_cancel_the_arena_and_the_sources_are_free():
    source, arena = filled((LARGE,), torch.uint8, 1), _C.Arena(LARGE)
    stager = Stager(arena, 1 << 16)
    staging = stager.start([(source, 0)])
    staging.cancel()
    memoryview(arena)[:] = bytes(LARGE)
    source.fill_(7)
    assert held(arena, 0, LARGE) == bytes(LARGE)
    arena.resize(8)
    stager.start([(filled((8,), torch.uint8, 1), 0)]).wait(PATIENCE)


def test_a_cancelled_staging_says_so_and_minds_no_overwriting():
    staging = Stager(_C.Arena(LARGE), LARGE).start([(filled((LARGE,), torch.uint8, 1), 0)])
    staging.cancel()
    staging.cancel()
    staging.before_overwrite(timeout=0)
    assert staging.ended and not staging.done()
    for _ in range(2):
        with pytest.raises(SaveFailed, match="cancelled"):
            staging.wait(PATIENCE)


def test_a_cancel_ends_the_wait_of_another_thread():
    staging = Stager(_C.Arena(LARGE), 1 << 16).start([(filled((LARGE,), torch.uint8, 1), 0)])
    outcome: list[object] = []

    def wait() -> None:
        try:
            outcome.append(staging.wait(PATIENCE))
        except SaveFailed as error:
            outcome.append(error)

    waiter = threading.Thread(target=wait)
    waiter.start()
    staging.cancel()
    waiter.join(PATIENCE)
    assert staging.ended and len(outcome) == 1


def test_a_cancel_after_the_end_leaves_the_digests():
    staging = Stager(_C.Arena(8), 16).start([(filled((8,), torch.uint8, 1), 0)])
    digests = staging.wait(PATIENCE)
    staging.cancel()
    assert staging.wait(PATIENCE) == digests


def test_the_arena_cannot_be_resized_while_a_staging_goes_on():
    arena = _C.Arena(LARGE)
    staging = Stager(arena, LARGE).start([(filled((LARGE,), torch.uint8, 1), 0)])
    with pytest.raises(BufferError):
        arena.resize(2 * LARGE)
    staging.wait(PATIENCE)
    arena.resize(2 * LARGE)


def test_sources_that_nobody_else_holds_are_staged():
    arena = _C.Arena(LARGE)
    staging = Stager(arena, 1 << 20).start([(torch.full((LARGE,), 7, dtype=torch.uint8), 0)])
    others = [torch.full((LARGE,), 9, dtype=torch.uint8) for _ in range(2)]
    staging.wait(PATIENCE)
    assert held(arena, 0, LARGE) == bytes([7]) * LARGE and len(others) == 2


def test_a_staging_that_nobody_holds_frees_the_arena():
    arena = _C.Arena(LARGE)
    Stager(arena, 1 << 16).start([(filled((LARGE,), torch.uint8, 1), 0)])
    arena.resize(8)
