"""Every variant of the digest loop beside PyPI xxhash and the golden vectors, and how a process chooses one.

The other tests of digests run on the variant that the process chose; to run them on another, name it:
`DTRUNTIME_DIGEST_IMPL=avx2 pytest tests/native`.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
import xxhash

from dtruntime_torch import _C
from tests.boundaries import CHUNK_BYTES, LENGTHS

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "digest.json").read_text())
DATA = Random(1).randbytes((1 << 20) + 4096)
LINE = 64
STRIPE, BLOCK = 64, 1024
CANARY = 0xAA

every_impl = pytest.mark.parametrize("impl", _C.digest_impls())
both_stores = pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])


def address_of(data: bytearray, offset: int = 0) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(data)) + offset


def chunked(data: bytes, chunk_bytes: int) -> bytes:
    chunks = (data[i : i + chunk_bytes] for i in range(0, len(data), chunk_bytes))
    return b"".join(xxhash.xxh3_128_digest(chunk) for chunk in chunks)


def aligned(nbytes: int) -> tuple[bytearray, int]:
    """A buffer, and where in it `nbytes` bytes start at a line."""
    buffer = bytearray(nbytes + LINE)
    return buffer, -address_of(buffer) % LINE


@every_impl
def test_the_golden_vectors_hold(impl):
    data = bytes(i % 251 for i in range(max(case["length"] for case in VECTORS["whole"])))
    for case in VECTORS["whole"]:
        if case["length"]:
            found = _C.digest(data[: case["length"]], case["length"], impl=impl)
            assert found.hex() == case["digest"], case["length"]
    for case in VECTORS["chunked"]:
        found = _C.digest(data[: case["length"]], case["chunk_bytes"], impl=impl)
        assert found.hex() == case["digests"]


@every_impl
def test_every_length_up_to_three_blocks_agrees_with_xxhash(impl):
    for length in range(1, 3 * BLOCK + 2):
        data = DATA[length : 2 * length]
        assert _C.digest(data, length, impl=impl) == xxhash.xxh3_128_digest(data), length


@every_impl
@pytest.mark.parametrize("length", [n for n in LENGTHS if n > 3 * BLOCK])
def test_long_data_agrees_with_xxhash(impl, length):
    assert _C.digest(DATA[:length], length, impl=impl) == xxhash.xxh3_128_digest(DATA[:length])


@every_impl
@pytest.mark.parametrize("byte", [0x00, 0xFF, 0x80])
def test_extreme_bytes_agree_with_xxhash(impl, byte):
    data = bytes([byte]) * 5000  # carries between lanes and within products
    assert _C.digest(data, 5000, impl=impl) == xxhash.xxh3_128_digest(data)


@every_impl
def test_every_alignment_of_the_source_agrees_with_xxhash(impl):
    length = 2 * BLOCK + 3 * STRIPE + 5
    buffer, start = aligned(LINE + length)
    buffer[start:] = DATA[: len(buffer) - start]
    view = memoryview(buffer)[start:]
    for shift in range(LINE):
        data = view[shift : shift + length]
        assert _C.digest(data, length, impl=impl) == xxhash.xxh3_128_digest(data), shift


@every_impl
def test_ragged_ranges_agree_with_xxhash(impl):
    random = Random(2)
    ranges = [(random.randrange(len(DATA) // 2), random.randrange(6000)) for _ in range(500)]
    expected = b"".join(chunked(DATA[start : start + length], 1000) for start, length in ranges)
    offsets, lengths = zip(*ranges, strict=True)
    assert _C.digest_ranges(DATA, offsets, lengths, 1000, 3, impl=impl) == expected


@every_impl
@both_stores
@pytest.mark.parametrize("length", [1, 240, 241, BLOCK, 5 * BLOCK + 1, 9 * BLOCK + 7 * STRIPE + 63])
def test_a_copy_is_exact_at_every_alignment_of_the_target(impl, stream, length):
    # Past 4096 bytes a target beside the lines is streamed in several pieces.
    arena = _C.Arena(LINE + length + LINE)
    view = memoryview(arena)
    source = bytearray(DATA[:length])
    expected = xxhash.xxh3_128_digest(source)
    for shift in range(LINE):
        ctypes.memset(arena.address, CANARY, len(arena))
        digests = _C.copy_digest(
            arena, [address_of(source)], [length], [shift], length, impl=impl, stream=stream
        )
        assert digests == expected, shift
        assert view[shift : shift + length] == source, shift
        around = bytes(view[:shift]) + bytes(view[shift + length :])
        assert around == bytes([CANARY]) * len(around), f"written beside the target, shift {shift}"


@every_impl
@both_stores
def test_a_copy_is_exact_at_every_alignment_of_the_source(impl, stream):
    length = 2 * BLOCK + 3 * STRIPE + 5
    buffer, start = aligned(LINE + length)
    buffer[start:] = DATA[: len(buffer) - start]
    for target in (0, 1, 32):
        for shift in range(LINE):
            arena = _C.Arena(target + length)
            source = address_of(buffer, start + shift)
            found = _C.copy_digest(arena, [source], [length], [target], length, impl=impl, stream=stream)
            data = buffer[start + shift : start + shift + length]
            assert found == xxhash.xxh3_128_digest(data)
            assert memoryview(arena)[target:] == data


@every_impl
@both_stores
@pytest.mark.parametrize("shift", [0, 4])
def test_a_copy_of_every_length_is_exact(impl, stream, shift):
    arena = _C.Arena(3 * BLOCK + LINE)
    source = bytearray(DATA[: 2 * BLOCK + 2])
    for length in range(1, len(source)):
        found = _C.copy_digest(
            arena, [address_of(source)], [length], [shift], length, impl=impl, stream=stream
        )
        assert found == xxhash.xxh3_128_digest(memoryview(source)[:length]), length
        assert memoryview(arena)[shift : shift + length] == memoryview(source)[:length], length


@every_impl
@both_stores
@pytest.mark.parametrize("threads", [1, 3])
def test_many_sources_are_copied_in_one_call(impl, stream, threads):
    random = Random(3)
    lengths = [random.randrange(20_000) for _ in range(200)]
    starts = [random.randrange(len(DATA) - 20_000) for _ in lengths]
    offsets = [sum(lengths[:i]) for i in range(len(lengths))]  # one beside the other: they share lines
    source = bytearray(DATA)
    arena = _C.Arena(sum(lengths))
    found = _C.copy_digest(
        arena,
        [address_of(source, start) for start in starts],
        lengths,
        offsets,
        CHUNK_BYTES,
        threads,
        impl=impl,
        stream=stream,
    )
    pieces = [DATA[start : start + length] for start, length in zip(starts, lengths, strict=True)]
    assert bytes(arena) == b"".join(pieces)
    assert found == b"".join(chunked(piece, CHUNK_BYTES) for piece in pieces)


def run_with(impl: str, code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", f"from dtruntime_torch import _C; {code}"],
        env={**os.environ, "DTRUNTIME_DIGEST_IMPL": impl},
        capture_output=True,
        text=True,
        timeout=60,
    )


@every_impl
def test_the_environment_forces_a_variant(impl):
    child = run_with(impl, "print(_C.build_info()['simd'])")
    assert (child.stdout.strip(), child.stderr) == (impl, "")


def test_an_empty_variable_forces_nothing():
    child = run_with("", "print(_C.build_info()['simd'])")
    assert child.stdout.strip() == _C.digest_impls()[0]


@pytest.mark.parametrize(
    "use",
    [
        "_C.digest(b'abc', 1)",
        "_C.digest_ranges(b'abc', [0], [3], 1)",
        "_C.copy_digest(_C.Arena(1), [], [], [], 1)",
        "_C.digest_into(0, 0, 0, 1)",
        "_C.copy_digest_into(0, 0, 0, 0, 1)",
        "_C.build_info()",
    ],
)
def test_a_wrong_name_in_the_environment_is_an_error_that_says_what_to_do(use):
    child = run_with("sse9", use)
    last = child.stderr.splitlines()[-1]
    assert last.startswith("ValueError: DTRUNTIME_DIGEST_IMPL must be changed or unset")
    assert "'sse9'" in last
    assert last.endswith("choose one of: " + ", ".join(_C.digest_impls()))


def test_a_named_variant_is_used_whatever_the_environment_says():
    child = run_with("sse9", "print(_C.digest(b'abcd', 4, impl='scalar').hex())")
    assert child.stdout.strip() == xxhash.xxh3_128_hexdigest(b"abcd")


def test_an_unknown_variant_is_refused():
    with pytest.raises(ValueError, match="no digest variant 'mmx'.*scalar"):
        _C.digest(b"abc", 1, impl="mmx")


def test_scalar_runs_everywhere_and_comes_last():
    assert _C.digest_impls()[-1] == "scalar"
