"""Which chunks a load reads, beside a count of every element, and that each byte lies and is asked for exactly once."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtruntime_torch.checkpoint.format.records import FileRef, Part
from dtruntime_torch.checkpoint.loading import node_shares, placement
from dtruntime_torch.checkpoint.loading.chunk_needs import Needs, merge, needs_of, pack, runs_of, unpack
from dtruntime_torch.checkpoint.loading.load_plan import index_parts, make_load_plan
from dtruntime_torch.checkpoint.loading.node_shares import Shares, divide
from dtruntime_torch.checkpoint.loading.placement import PAGE_BYTES, place
from dtruntime_torch.checkpoint.specs import Extent, LoadPlan, Shape
from tests.checkpoint.loading.test_load_plan import boxes_in, partitions
from tests.checkpoint.plan_builders import part_of, stored, tensor

SIZE = 8  # bytes of an int64


@st.composite
def checkpoints(draw: st.DrawFn) -> tuple[dict[int, Part], dict[str, Shape]]:
    """Tensors cut in any way over ranks, whose chunks lie scattered over two files of each rank."""
    chunk_bytes = draw(st.sampled_from([1, 8, 24, 40, 64]))
    shapes = draw(st.lists(st.lists(st.integers(0, 6), max_size=3).map(tuple), min_size=1, max_size=3))
    held: dict[int, list] = {0: [], 1: []}
    for number, shape in enumerate(shapes):
        for box in draw(partitions(shape)):
            held[draw(st.integers(0, 1))].append(stored(f"t{number}", shape, box))
    parts = {}
    for rank, entries in held.items():
        ends = [64, 64]
        placed = []
        for entry in entries:
            extents, left = [], entry.nbytes
            while left:
                chunks = draw(st.integers(1, 3))
                length, file = min(left, chunks * chunk_bytes), draw(st.integers(0, 1))
                ends[file] += draw(st.sampled_from([0, 0, 5, 100_000]))
                extents.append(Extent(file, ends[file], length))
                ends[file] += length
                left -= length
            placed.append(replace(entry, extents=tuple(extents)))
        files = tuple(FileRef(f"r{rank}f{n}", end, 64, bytes(16)) for n, end in enumerate(ends))
        parts[rank] = replace(part_of(rank, *placed, chunk_bytes=chunk_bytes), files=files)
    return parts, {f"t{number}": shape for number, shape in enumerate(shapes)}


@st.composite
def nodes(draw: st.DrawFn) -> tuple[dict[int, Part], list[LoadPlan]]:
    """A checkpoint, and what each rank of a node wants of it."""
    parts, shapes = draw(checkpoints())
    saved = index_parts(parts, 0)
    plans = []
    for _ in range(draw(st.integers(1, 4))):
        wanted = [name for name in saved.tensors if draw(st.booleans())]
        boxes = {name: draw(boxes_in(shapes[name])) for name in wanted}
        specs = [tensor(n, *shapes[n], dtype="int64", offsets=b[0], shape=b[1]) for n, b in boxes.items()]
        plans.append(make_load_plan(saved, parts, specs))
    return parts, plans


def touched(plan: LoadPlan, parts: dict[int, Part]) -> dict[tuple[int, int], set[int]]:
    """The chunks that hold a byte of a wanted element, one element after the other."""
    chunks: dict[tuple[int, int], set[int]] = {}
    for item in plan.items:
        entry, size = parts[item.rank].tensors[item.entry], parts[item.rank].chunk_bytes
        numbers = np.arange(int(np.prod(entry.shape))).reshape(entry.shape)
        box = tuple(slice(at, at + n) for at, n in zip(item.source, item.shape, strict=True))
        for number in numbers[box].flatten().tolist():
            found = range(number * SIZE // size, (number * SIZE + SIZE - 1) // size + 1)
            chunks.setdefault((item.rank, item.entry), set()).update(found)
    return chunks


def chunks_in(needs: Needs) -> dict[tuple[int, int], set[int]]:
    return {key: {c for r in ranges for c in range(*r)} for key, ranges in needs.items()}


@given(nodes())
def test_the_chunks_that_boxes_touch_are_needed_and_no_others(node) -> None:
    parts, plans = node
    for plan in plans:
        assert chunks_in(needs_of(plan, parts)) == touched(plan, parts)


@given(nodes())
def test_needs_come_back_from_plain_integers(node) -> None:
    parts, plans = node
    for plan in plans:
        needs = needs_of(plan, parts)
        assert unpack(pack(needs)) == needs


def bytes_of(parts: dict[int, Part], chunks: dict[tuple[int, int], set[int]]) -> Counter[tuple[str, int]]:
    """Each byte of a file that the chunks lie in, by going through the extents."""
    found: Counter[tuple[str, int]] = Counter()
    for (rank, position), wanted in chunks.items():
        part = parts[rank]
        start = 0
        for extent in part.tensors[position].extents:
            for at in range(extent.length):
                if (start + at) // part.chunk_bytes in wanted:
                    found[part.files[extent.file].path, extent.offset + at] += 1
            start += extent.length
    return found


def bytes_read(shares: Shares) -> Counter[tuple[str, int]]:
    runs = itertools.chain.from_iterable((*shares.own, *shares.common))
    return Counter((run.path, run.offset + at) for run in runs for at in range(run.length))


@given(nodes())
def test_a_node_reads_each_needed_byte_once(node) -> None:
    parts, plans = node
    needs = [needs_of(plan, parts) for plan in plans]
    union: dict[tuple[int, int], set[int]] = {}
    for one in needs:
        for key, chunks in chunks_in(one).items():
            union.setdefault(key, set()).update(chunks)
    assert bytes_read(divide(needs, parts)) == bytes_of(parts, union)


@given(nodes())
def test_what_a_rank_wants_is_its_own_or_common(node) -> None:
    parts, plans = node
    needs = [needs_of(plan, parts) for plan in plans]
    shares = divide(needs, parts)
    common = bytes_read(replace(shares, own=()))
    for one, own in zip(needs, shares.own, strict=True):
        mine = bytes_read(Shares((own,), ()))
        assert (common | mine).keys() >= bytes_of(parts, chunks_in(one)).keys()
        assert mine.keys() <= bytes_of(parts, chunks_in(one)).keys()


@given(nodes(), st.sampled_from([4096, 8192, 1 << 20]))
def test_each_byte_has_a_place_of_its_own_and_comes_in_one_request(node, fetch_bytes) -> None:
    parts, plans = node
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placement, "FETCH_BYTES", fetch_bytes)
        placed = place(runs_of(parts, needs_of(plans[0], parts)))
    memory: dict[int, tuple[str, int]] = {}
    for fetch in placed.fetches:
        assert 0 < fetch.length <= fetch_bytes and fetch.at % PAGE_BYTES == fetch.offset % PAGE_BYTES
        for at in range(fetch.length) if fetch.length < 4096 else (0, fetch.length - 1):
            assert memory.setdefault(fetch.at + at, (fetch.path, fetch.offset + at)) == (
                fetch.path,
                fetch.offset + at,
            )
    edges = [(fetch.at, fetch.at + fetch.length) for fetch in placed.fetches]
    assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(edges))
    for run, at in placed.runs:
        source = [f for f in placed.fetches if f.at <= at < f.at + f.length]
        assert len(source) == 1
        assert (source[0].path, source[0].offset + at - source[0].at) == (run.path, run.offset)
        assert at + run.length <= placed.nbytes


def whole(length: int, count: int, chunk_bytes: int = 64) -> tuple[dict[int, Part], Needs]:
    """One file with tensors of that many bytes, all of them needed."""
    entries = [
        stored(f"t{n}", (length,), dtype="uint8", extents=(Extent(0, 64 + n * length, length),))
        for n in range(count)
    ]
    file = FileRef("f", 64 + count * length, 64, bytes(16))
    part = replace(part_of(0, *entries, chunk_bytes=chunk_bytes), files=(file,))
    return {0: part}, {(0, n): ((0, -(-length // chunk_bytes)),) for n in range(count)}


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_what_all_want_is_divided_evenly(ranks) -> None:
    parts, needs = whole(6400, 30)
    shares = divide([needs] * ranks, parts)
    sizes = [sum(run.length for run in runs) for runs in shares.common]
    assert sum(sizes) == 6400 * 30 and not any(shares.own)
    assert max(sizes) - min(sizes) <= 2 * (6400 * 30 // ranks // node_shares.UNEVEN + 64)


def test_tensors_are_not_cut_where_the_shares_are_even_without() -> None:
    parts, needs = whole(6400, 30)
    shares = divide([needs] * 3, parts)
    assert [len(runs) for runs in shares.common] == [10, 10, 10]


def test_one_large_tensor_is_cut_between_chunks() -> None:
    parts, needs = whole(64 * 10 + 1, 1)
    shares = divide([needs] * 2, parts)
    assert [[(run.start, run.length) for run in runs] for runs in shares.common] == [[(0, 384)], [(384, 257)]]


def test_the_first_to_read_a_file_checks_its_header() -> None:
    parts, needs = whole(6400, 30)
    shares = divide([needs] * 3, parts)
    assert [shares.files_of(rank) for rank in range(3)] == [["f"], [], []]


def test_rows_of_which_none_skips_a_chunk_are_one_range() -> None:
    entry = stored("x", (1000, 1000), extents=(Extent(0, 64, 8_000_000),))
    parts = {0: part_of(0, entry, chunk_bytes=8000)}
    plan = make_load_plan(
        index_parts(parts, 0), parts, [tensor("x", 1000, 1000, dtype="int64", shape=(1000, 1))]
    )
    assert needs_of(plan, parts) == {(0, 0): ((0, 1000),)}


def test_a_column_of_long_rows_leaves_chunks_out() -> None:
    entry = stored("x", (10, 1000), extents=(Extent(0, 64, 80_000),))
    parts = {0: part_of(0, entry, chunk_bytes=800)}
    plan = make_load_plan(
        index_parts(parts, 0), parts, [tensor("x", 10, 1000, dtype="int64", shape=(10, 150))]
    )
    assert needs_of(plan, parts) == {(0, 0): merge([(10 * row, 10 * row + 2) for row in range(10)])}


def test_rows_that_just_skip_a_chunk_leave_it_out() -> None:
    entry = stored("x", (4, 200), extents=(Extent(0, 64, 6400),))
    parts = {0: part_of(0, entry, chunk_bytes=800)}
    plan = make_load_plan(index_parts(parts, 0), parts, [tensor("x", 4, 200, dtype="int64", shape=(4, 100))])
    assert needs_of(plan, parts) == {(0, 0): ((0, 1), (2, 3), (4, 5), (6, 7))}
