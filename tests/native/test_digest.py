"""XXH3-128 beside PyPI xxhash and the golden vectors; chunks, ranges, and copying with digesting."""

from __future__ import annotations

import ctypes
import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from dtruntime_torch import _C
from tests.boundaries import CHUNK_BYTES, LENGTHS

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "digest.json").read_text())
DATA = Random(0).randbytes((4 << 20) + 7)


def chunked(data: bytes, chunk_bytes: int) -> bytes:
    chunks = (data[i : i + chunk_bytes] for i in range(0, len(data), chunk_bytes))
    return b"".join(xxhash.xxh3_128_digest(chunk) for chunk in chunks)


def address_of(data: bytearray, offset: int = 0) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(data)) + offset


@pytest.mark.parametrize("first", range(0, 2049, 256))
def test_every_short_length_agrees_with_xxhash(first):
    for length in range(first, min(first + 256, 2049)):
        for start in (0, 1, 12345):  # aligned and not
            data = DATA[start : start + length]
            assert _C.digest(data, max(length, 1)) == chunked(data, max(length, 1)), (length, start)


@pytest.mark.parametrize("length", [*(n for n in LENGTHS if n > 2048), 3 << 20, len(DATA)])
def test_long_data_agrees_with_xxhash(length):
    assert _C.digest(DATA[:length], length) == xxhash.xxh3_128_digest(DATA[:length])


def test_extreme_bytes_agree_with_xxhash():
    for byte in (0x00, 0xFF, 0x80):
        data = bytes([byte]) * 5000
        assert _C.digest(data, 5000) == xxhash.xxh3_128_digest(data)


def test_the_golden_vectors_hold():
    data = bytearray(i % 251 for i in range(max(case["length"] for case in VECTORS["whole"])))
    for case in VECTORS["whole"]:
        length, chunk_bytes = case["length"], max(case["length"], 1)
        expected = bytes.fromhex(case["digest"]) if length else b""
        assert _C.digest(data[:length], chunk_bytes) == expected
        assert _C.copy_digest(_C.Arena(length), [address_of(data)], [length], [0], chunk_bytes) == expected
    for case in VECTORS["chunked"]:
        assert _C.digest(data[: case["length"]], case["chunk_bytes"]).hex() == case["digests"]


@pytest.mark.parametrize("threads", [0, 1, 2, 7])
@pytest.mark.parametrize("chunk_bytes", [1000, CHUNK_BYTES, 1 << 20, len(DATA), len(DATA) + 1])
def test_chunks_are_digested_each_by_itself(chunk_bytes, threads):
    assert _C.digest(DATA, chunk_bytes, threads) == chunked(DATA, chunk_bytes)


@pytest.mark.parametrize("length", [n for n in LENGTHS if n <= 9000])
def test_the_last_chunk_may_be_shorter(length):
    for chunk_bytes in (1, 3, 1024, CHUNK_BYTES):
        assert _C.digest(DATA[:length], chunk_bytes) == chunked(DATA[:length], chunk_bytes)


def test_empty_data_has_no_digest():
    assert _C.digest(b"", 1) == b""
    assert _C.digest_ranges(b"", [], [], 1) == b""
    assert _C.digest_ranges(b"abc", [0, 3], [0, 0], 1) == b""


@given(
    st.lists(st.tuples(st.integers(0, 20_000), st.integers(0, 3_000)), max_size=12),
    st.sampled_from([1, 64, 1000, CHUNK_BYTES]),
)
def test_ranges_are_digested_in_turn(ranges, chunk_bytes):
    expected = b"".join(chunked(DATA[start : start + length], chunk_bytes) for start, length in ranges)
    offsets, lengths = [r[0] for r in ranges], [r[1] for r in ranges]
    assert _C.digest_ranges(DATA, offsets, lengths, chunk_bytes) == expected


def test_ten_thousand_small_ranges_are_digested_in_turn():
    lengths = [i % 700 for i in range(10_000)]
    offsets = [i * 391 for i in range(10_000)]
    expected = b"".join(
        xxhash.xxh3_128_digest(DATA[o : o + n]) for o, n in zip(offsets, lengths, strict=True) if n
    )
    assert _C.digest_ranges(DATA, offsets, lengths, 1 << 20, 3) == expected


@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, 11), (10, 1), (11, 0), (1 << 62, 1 << 62), (5, (1 << 63) - 1), (-1, 3), (3, -1)],
)
def test_a_range_outside_the_data_is_refused(offset, length):
    # Also the one of 2**62 bytes, for whose digests there is no room anywhere.
    with pytest.raises(ValueError):
        _C.digest_ranges(bytes(10), [0, offset], [10, length], 1)


@pytest.mark.parametrize("chunk_bytes", [0, -1])
def test_a_chunk_has_at_least_one_byte(chunk_bytes):
    with pytest.raises(ValueError, match="chunk_bytes"):
        _C.digest(b"abc", chunk_bytes)


def test_data_must_be_contiguous():
    with pytest.raises(BufferError):
        _C.digest(memoryview(b"abcdef")[::2], 1)


@pytest.mark.parametrize("threads", [0, 1, 3])
@pytest.mark.parametrize("chunk_bytes", [1000, CHUNK_BYTES, 1 << 20])
def test_what_is_copied_arrives_and_is_digested(chunk_bytes, threads):
    source = bytearray(DATA)
    arena = _C.Arena(len(DATA) + 100)
    memoryview(arena)[:] = b"\xaa" * len(arena)
    # Out of order, with a gap, an empty one, and unaligned on both sides.
    lengths, starts, offsets = [2_000_000, 0, 1_500_001, 7], [1, 0, 2_000_003, 0], [1_600_000, 50, 64, 20]
    digests = _C.copy_digest(
        arena, [address_of(source, start) for start in starts], lengths, offsets, chunk_bytes, threads
    )
    expected = bytearray(b"\xaa" * len(arena))
    for start, length, offset in zip(starts, lengths, offsets, strict=True):
        expected[offset : offset + length] = DATA[start : start + length]
    assert bytes(arena) == expected
    assert digests == b"".join(
        chunked(DATA[s : s + n], chunk_bytes) for s, n in zip(starts, lengths, strict=True)
    )


@pytest.mark.parametrize("length", LENGTHS)
def test_copy_and_digest_agree_at_every_boundary(length):
    arena = _C.Arena(length)
    source = bytearray(DATA[:length]) + b"!"
    for chunk_bytes in (CHUNK_BYTES, 1 << 20):
        assert _C.copy_digest(arena, [address_of(source)], [length], [0], chunk_bytes) == chunked(
            DATA[:length], chunk_bytes
        )
        assert bytes(arena) == DATA[:length]


@pytest.mark.parametrize(
    ("lengths", "offsets"),
    [
        ([60, 41], [0, 60]),
        ([10, 10], [0, 9]),
        ([10, 5], [20, 22]),
        ([1], [100]),
        ([1, 1], [-1, 5]),
        ([5], [1, 2]),
    ],
)
def test_targets_outside_the_arena_or_on_each_other_are_refused(lengths, offsets):
    source = bytearray(b"x" * 100)
    arena = _C.Arena(100)
    with pytest.raises(ValueError):
        _C.copy_digest(arena, [address_of(source)] * len(lengths), lengths, offsets, 16)
    assert bytes(arena) == bytes(100), "something was copied"


def test_a_null_source_is_refused():
    with pytest.raises(ValueError, match="null"):
        _C.copy_digest(_C.Arena(10), [0], [1], [0], 16)
    assert _C.copy_digest(_C.Arena(10), [0], [0], [0], 16) == b""


def test_only_an_arena_can_be_copied_to():
    with pytest.raises(TypeError):
        _C.copy_digest(bytearray(10), [], [], [], 16)


def test_several_threads_may_digest_at_once():
    expected = chunked(DATA, CHUNK_BYTES)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: _C.digest(DATA, CHUNK_BYTES, 3), range(20)))
    assert results == [expected] * 20


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_can_digest_on_threads_of_its_own():
    expected = _C.digest(DATA, CHUNK_BYTES, 4)  # the pool exists now, and its threads stay behind
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # a child that hangs ends, and fails the test
        right = _C.digest(DATA, CHUNK_BYTES, 4) == expected
        os._exit(0 if right and len(os.listdir("/proc/self/task")) >= 4 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
