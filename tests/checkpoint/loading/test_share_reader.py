"""Shares straight into memory, beside xxhash: what is sound arrives, what is damaged is named as `chunk_reader` does."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtruntime_torch.checkpoint.loading import placement
from dtruntime_torch.checkpoint.loading.chunk_needs import Run, runs_of
from dtruntime_torch.checkpoint.loading.chunk_reader import check_part
from dtruntime_torch.checkpoint.loading.placement import place
from dtruntime_torch.checkpoint.loading.share_reader import FETCHES_AT_A_TIME, check_sizes, read_share
from dtruntime_torch.errors import Damage, StorageError
from dtruntime_torch.storage import MemoryBackend, run_sync
from dtruntime_torch.storage.backend import StorageBackend
from dtruntime_torch.testing.faulty_backend import FaultyBackend, flipped, hidden, not_done, truncated
from tests.checkpoint.staging.scattered_tensors import CHUNK, HEADER, Stored, deltas, file_path, full


def all_runs(saved: Stored) -> list[Run]:
    entries = saved.part.tensors
    return runs_of(
        {0: saved.part}, {(0, n): ((0, -(-e.nbytes // CHUNK)),) for n, e in enumerate(entries) if e.nbytes}
    )


def read(
    backend: StorageBackend, saved: Stored, fetch_bytes: int = 4096, headers: Sequence[str] = ()
) -> tuple[list[Damage], dict[int, bytes]]:
    """What arrives of each tensor, put together from where it was placed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placement, "FETCH_BYTES", fetch_bytes)
        placed = place(all_runs(saved))
    memory = memoryview(bytearray(b"\xff" * placed.nbytes))
    damage = run_sync(read_share(backend, "model", {0: saved.part}, placed, memory, headers))
    tensors = {n: bytearray(b"\xff" * len(data)) for n, data in enumerate(saved.tensors)}
    for run, at in placed.runs:
        tensors[run.entry][run.start : run.start + run.length] = memory[at : at + run.length]
    return damage, {n: bytes(data) for n, data in tensors.items()}


# Requests end anywhere, not only at pages: here a chunk crosses the border of two again and again.
@given(deltas(), st.sampled_from([1, 7, 24, 4096]))
def test_sound_bytes_arrive_from_any_extents_in_requests_of_any_size(saved: Stored, size: int) -> None:
    damage, tensors = read(saved.put(MemoryBackend()), saved, size)
    assert damage == []
    assert tensors == dict(enumerate(saved.tensors))


@given(deltas(), st.data(), st.sampled_from([7, 24, 4096]))
def test_any_flipped_bit_is_named(saved: Stored, data: st.DataObject, size: int) -> None:
    chunks = [(file, *chunk) for file in (0, 1) for chunk in saved.chunks_of(file)]
    if not chunks:
        return
    file, number, offset, length, _ = data.draw(st.sampled_from(chunks))
    saved.files[file][offset + data.draw(st.integers(0, length - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (damage,) = read(saved.put(MemoryBackend()), saved, size)[0]
    assert (damage.file, damage.tensor) == (f"model/{file_path(file)}", f"t{number}")
    assert (damage.start, damage.stop) == (offset, offset + length)


@given(deltas(), st.data())
def test_a_file_that_is_cut_is_described_as_verify_describes_it(saved: Stored, data: st.DataObject) -> None:
    size = data.draw(st.integers(0, len(saved.files[0]) - 1))
    del saved.files[0][size:]
    backend = saved.put(MemoryBackend())
    needed = [run for run in all_runs(saved) if run.path == file_path(0)]
    found = run_sync(check_sizes(backend, "model", {0: saved.part}, all_runs(saved)))
    assert found == (run_sync(check_part(backend, "model", saved.part)) if needed else [])


def test_a_header_is_checked_where_that_is_asked_for() -> None:
    saved = full(20)
    saved.files[0][3] ^= 1
    backend = saved.put(MemoryBackend())
    assert read(backend, saved)[0] == []
    (damage,) = read(backend, saved, headers=[file_path(0)])[0]
    assert (damage.tensor, damage.start, damage.stop) == (None, 0, HEADER)


def test_a_header_is_checked_of_a_file_of_which_nothing_else_is_read() -> None:
    saved = full(20)
    saved.files[0][3] ^= 1
    backend, nothing = saved.put(MemoryBackend()), place([])
    checked = read_share(backend, "model", {0: saved.part}, nothing, memoryview(b""), [file_path(0)])
    (damage,) = run_sync(checked)
    assert (damage.file, damage.start, damage.stop) == (f"model/{file_path(0)}", 0, HEADER)


def test_a_missing_file_is_damage() -> None:
    saved = full(20)
    (damage,) = run_sync(check_sizes(MemoryBackend(), "model", {0: saved.part}, all_runs(saved)))
    assert damage.actual == "missing"


@pytest.mark.parametrize("fault", [hidden(), truncated(3)])
def test_bytes_that_are_gone_while_they_are_read_are_damage(fault) -> None:
    saved = full(20, 20)
    backend = FaultyBackend(saved.put(MemoryBackend()))
    backend.when("read_range", "*", fault, nth=None)
    assert {damage.actual for damage in read(backend, saved)[0]} == {"missing"}


@pytest.mark.parametrize("fault", [hidden(), truncated(3), not_done()])
def test_a_read_that_fails_once_is_no_damage(fault) -> None:
    saved = full(20, 20)
    backend = FaultyBackend(saved.put(MemoryBackend()))
    backend.when("read_range", "*", fault)
    with pytest.raises(StorageError):
        read(backend, saved)


def test_what_arrived_is_digested_and_not_what_lies_on_the_storage() -> None:
    saved = full(20, 20)
    backend = FaultyBackend(saved.put(MemoryBackend()))
    backend.when("read_range", "*", flipped(-1))
    (damage,) = read(backend, saved)[0]
    assert (damage.tensor, damage.stop) == ("t1", HEADER + 40)


class Waiting(MemoryBackend):
    """Counts how many reads are under way."""

    under_way = most = 0

    async def read_range(self, path: str, offset: int, length: int, *, into: memoryview | None = None):
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        for _ in range(10):  # lets others begin
            await asyncio.sleep(0)
        self.under_way -= 1
        return await super().read_range(path, offset, length, into=into)


def test_a_few_requests_are_under_way_at_a_time() -> None:
    saved, backend = full(400), Waiting()
    assert read(saved.put(backend), saved, 8)[0] == []
    assert backend.most == FETCHES_AT_A_TIME


def test_an_error_leaves_no_request_under_way() -> None:
    class Broken(Waiting):
        async def read_range(self, path: str, offset: int, length: int, *, into: memoryview | None = None):
            await super().read_range(path, offset, length, into=into)
            if offset >= HEADER + 80:
                raise RuntimeError("a bug in a backend")
            return into

    saved, backend = full(400), Broken()
    with pytest.raises(RuntimeError, match="a bug"):
        read(saved.put(backend), saved, 8)
    assert backend.under_way == 0
