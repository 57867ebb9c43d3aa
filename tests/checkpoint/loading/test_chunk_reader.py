"""Bytes off storage, beside xxhash: what is damaged is named exactly, and nothing else is."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from dtruntime_torch.checkpoint.loading import read_requests
from dtruntime_torch.checkpoint.loading.chunk_reader import check_entries, check_part
from dtruntime_torch.checkpoint.specs import Extent
from dtruntime_torch.errors import Damage, StorageError
from dtruntime_torch.storage import LocalBackend, MemoryBackend, run_sync
from dtruntime_torch.storage.backend import StorageBackend
from dtruntime_torch.testing.faulty_backend import FaultyBackend, hidden, not_done, truncated
from tests.checkpoint.staging.scattered_tensors import (
    CHUNK,
    HEADER,
    Place,
    Stored,
    deltas,
    file_path,
    full,
    make,
    pattern,
)


class LoggingBackend(MemoryBackend):
    """Notes the length of every read, and how many were under way at once."""

    def __init__(self) -> None:
        super().__init__()
        self.lengths: list[int] = []
        self.under_way = 0
        self.most_under_way = 0

    async def read_range(self, path, offset, length, *, into=None):
        self.lengths.append(length)
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            for _ in range(10):  # lets others begin
                await asyncio.sleep(0)
            return await super().read_range(path, offset, length)
        finally:
            self.under_way -= 1


def check(backend: StorageBackend, saved: Stored) -> list[Damage]:
    return run_sync(check_part(backend, "model", saved.part))


@pytest.fixture
def small_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_requests, "REQUEST_BYTES", 24)
    monkeypatch.setattr(read_requests, "JOIN_BYTES", 4)


@given(deltas())
def test_sound_bytes_are_no_damage_in_any_extents(saved: Stored) -> None:
    assert check(saved.put(MemoryBackend()), saved) == []


@given(saved=deltas())
@pytest.mark.usefixtures("small_requests")
def test_requests_are_bounded(saved: Stored) -> None:
    backend = LoggingBackend()
    assert check(saved.put(backend), saved) == []
    assert all(length in (HEADER,) or length <= 24 for length in backend.lengths)


@pytest.mark.usefixtures("small_requests")
def test_two_requests_are_under_way_at_a_time() -> None:
    backend, saved = LoggingBackend(), full(400)
    assert check(saved.put(backend), saved) == []
    assert backend.most_under_way == 2


def test_a_chunk_larger_than_a_request_is_read_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_requests, "REQUEST_BYTES", CHUNK - 1)
    backend, saved = LoggingBackend(), full(3 * CHUNK)
    assert check(saved.put(backend), saved) == []
    assert sorted(backend.lengths) == [CHUNK, CHUNK, CHUNK, HEADER]


def test_neighbours_are_read_together() -> None:
    backend, saved = LoggingBackend(), full(*[5] * 100)
    assert check(saved.put(backend), saved) == []
    assert backend.lengths == [HEADER, 500]


@pytest.mark.usefixtures("small_requests")
def test_ranges_far_apart_are_not_read_along() -> None:
    backend, saved = LoggingBackend(), full(8, 5, 8)
    assert run_sync(check_entries(saved.put(backend), "model", saved.part, [0, 2])) == []
    assert backend.lengths == [HEADER, 8, 8]


def test_files_that_hold_nothing_wanted_are_not_touched() -> None:
    backend = FaultyBackend(MemoryBackend())
    saved = make([pattern(8), pattern(8)], [[Place(0, 0, 8)], [Place(1, 0, 8)]], 2)
    saved.put(backend)
    backend.calls.clear()
    assert run_sync(check_entries(backend, "model", saved.part, [1])) == []
    assert {path for _, path in backend.calls} == {f"model/{file_path(1)}"}


@pytest.mark.parametrize("where", ["header", "first chunk", "middle chunk", "last chunk"])
def test_a_flipped_byte_is_named(where: str) -> None:
    saved = full(20, 30)
    start, stop = {
        "header": (0, HEADER),
        "first chunk": (HEADER, HEADER + 8),
        "middle chunk": (HEADER + 28, HEADER + 36),
        "last chunk": (HEADER + 44, HEADER + 50),
    }[where]
    before = bytes(saved.files[0][start:stop])
    saved.files[0][stop - 1] ^= 0x10
    damage = check(saved.put(MemoryBackend()), saved)
    tensor = {"header": None, "first chunk": "t0"}.get(where, "t1")
    expected, actual = (xxhash.xxh3_128_hexdigest(x) for x in (before, bytes(saved.files[0][start:stop])))
    assert damage == [Damage(f"model/{file_path(0)}", tensor, start, stop, expected, actual)]


@given(deltas(), st.data())
def test_any_flipped_bit_that_is_covered_is_found(saved: Stored, data: st.DataObject) -> None:
    covered = [(e.file, at) for t in saved.part.tensors for e in t.extents for at in range(*_range(e))]
    covered += [(file, at) for file in (0, 1) for at in range(HEADER)]
    file, at = data.draw(st.sampled_from(covered))
    saved.files[file][at] ^= 1 << data.draw(st.integers(0, 7))
    (damage,) = check(saved.put(MemoryBackend()), saved)
    assert damage.file == f"model/{file_path(file)}"
    assert damage.start <= at < damage.stop


def _range(extent: Extent) -> tuple[int, int]:
    return extent.offset, extent.offset + extent.length


def test_all_damage_is_gathered_in_the_order_of_the_file() -> None:
    saved = full(20, 20)
    for at in (0, HEADER, HEADER + 19, HEADER + 20):
        saved.files[0][at] ^= 1
    found = [(d.tensor, d.start) for d in check(saved.put(MemoryBackend()), saved)]
    assert found == [(None, 0), ("t0", HEADER), ("t0", HEADER + 16), ("t1", HEADER + 20)]


def test_a_truncated_file_names_the_tensors_that_lost_bytes() -> None:
    saved = full(20, 20, 20)
    del saved.files[0][HEADER + 30 :]
    damage = check(saved.put(MemoryBackend()), saved)
    path = f"model/{file_path(0)}"
    assert damage == [
        Damage(path, "t1", HEADER + 28, HEADER + 40, "12 bytes", "missing"),
        Damage(path, None, HEADER + 30, HEADER + 60, f"{HEADER + 60} bytes", f"{HEADER + 30} bytes"),
        Damage(path, "t2", HEADER + 40, HEADER + 60, "20 bytes", "missing"),
    ]


@given(deltas(), st.data())
def test_of_a_truncated_file_the_chunks_that_are_not_whole_are_named(
    saved: Stored, data: st.DataObject
) -> None:
    size = data.draw(st.integers(0, len(saved.files[0])))
    del saved.files[0][size:]
    damage = check(saved.put(MemoryBackend()), saved)
    for number, offset, length, _ in saved.chunks_of(0):
        named = any(d.tensor == f"t{number}" and d.start <= offset < d.stop for d in damage)
        assert named == (offset + length > size)


def test_a_file_that_lost_its_header_is_damaged() -> None:
    saved = full(20)
    del saved.files[0][HEADER - 1 :]
    assert [(d.start, d.stop) for d in check(saved.put(MemoryBackend()), saved)] == [
        (HEADER - 1, HEADER + 20),
        (HEADER, HEADER + 20),
    ]


def test_an_extended_file_is_damaged() -> None:
    saved = full(20)
    saved.files[0] += b"more"
    damage = check(saved.put(MemoryBackend()), saved)
    path, end = f"model/{file_path(0)}", HEADER + 20
    assert damage == [Damage(path, None, end, end + 4, f"{end} bytes", f"{end + 4} bytes")]


def test_a_missing_file_is_one_damage() -> None:
    saved = make([pattern(8), pattern(8)], [[Place(0, 0, 8)], [Place(1, 0, 8)]], 2)
    backend = saved.put(MemoryBackend())
    run_sync(backend.delete(f"model/{file_path(0)}"))
    damage = check(backend, saved)
    assert damage == [Damage(f"model/{file_path(0)}", None, 0, HEADER + 8, f"{HEADER + 8} bytes", "missing")]


@pytest.mark.parametrize("fault", [hidden(), truncated(3)])
def test_bytes_that_go_after_the_length_was_looked_at_are_damage(fault) -> None:
    saved = full(20)
    backend = FaultyBackend(saved.put(MemoryBackend()))
    backend.when("read_range", "*", fault, nth=2)
    (damage,) = check(backend, saved)
    assert (damage.tensor, damage.start, damage.stop, damage.actual) == ("t0", HEADER, HEADER + 20, "missing")


def test_a_file_that_is_cut_after_its_length_was_looked_at_is_damaged() -> None:
    saved = full(20)
    inner = saved.put(MemoryBackend())
    backend = FaultyBackend(inner)

    async def cut(call) -> object:
        await inner.write(call.path, bytes(saved.files[0][: HEADER + 1]))
        return await call.proceed()

    backend.when("read_range", "*", cut, nth=2)
    assert [(d.tensor, d.actual) for d in check(backend, saved)] == [("t0", "missing")]


@pytest.mark.parametrize("operation", ["size", "read_range"])
def test_a_storage_that_fails_is_no_damage(operation: str) -> None:
    saved = full(20)
    backend = FaultyBackend(saved.put(MemoryBackend()))
    backend.when(operation, "*", not_done(), nth=None)
    with pytest.raises(StorageError, match="scripted fault"):
        check(backend, saved)


def test_every_byte_is_counted_once_be_it_damaged_or_not() -> None:
    saved = make(
        [pattern(20), pattern(30), pattern(9)], [[Place(0, 0, 20)], [Place(1, 0, 30)], [Place(2, 0, 9)]], 3
    )
    saved.files[0][HEADER] ^= 1
    del saved.files[1][HEADER + 5 :]
    backend = saved.put(MemoryBackend())
    run_sync(backend.delete(f"model/{file_path(2)}"))
    counted: list[int] = []
    run_sync(check_part(backend, "model", saved.part, counted.append))
    assert sum(counted) == 59


def test_some_tensors_of_a_part_may_be_checked() -> None:
    saved = full(8, 8)
    saved.files[0][HEADER + 8] ^= 1
    backend = saved.put(MemoryBackend())
    assert run_sync(check_entries(backend, "model", saved.part, [0])) == []
    (damage,) = run_sync(check_entries(backend, "model", saved.part, [1]))
    assert damage.tensor == "t1"


def test_the_header_of_a_file_without_tensors_is_checked() -> None:
    saved = full()
    assert check(saved.put(MemoryBackend()), saved) == []
    saved.files[0][7] ^= 1
    assert [damage.stop for damage in check(saved.put(MemoryBackend()), saved)] == [HEADER]


def test_files_of_a_disk_are_checked(tmp_path: Path) -> None:
    tensors = [pattern(3_000_000), pattern(5)]
    saved = make(tensors, [[Place(0, 0, 3_000_000)], [Place(0, 0, 5)]], 1)
    assert check(saved.put(LocalBackend(tmp_path)), saved) == []
