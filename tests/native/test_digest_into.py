"""Digests from an address to an address: what `torch.ops.dtruntime` calls."""

from __future__ import annotations

import ctypes
from random import Random

import pytest
import xxhash

from dtruntime_torch import _C

DATA = Random(4).randbytes(3 * 4096 + 5)
DIGESTS = b"".join(xxhash.xxh3_128_digest(DATA[i : i + 4096]) for i in range(0, len(DATA), 4096))
CANARY = b"\xaa" * 16


def address_of(data: bytearray) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(data))


@pytest.mark.parametrize("threads", [0, 1, 2])
@pytest.mark.parametrize("impl", [None, *_C.digest_impls()])
def test_the_digests_are_stored_and_nothing_else(impl, threads):
    source, digests = bytearray(DATA), bytearray(DIGESTS) + CANARY
    digests[:-16] = bytes(len(DIGESTS))
    _C.digest_into(address_of(digests), address_of(source), len(DATA), 4096, threads, impl=impl)
    assert digests == DIGESTS + CANARY


@pytest.mark.parametrize("impl", [None, *_C.digest_impls()])
def test_the_copy_and_its_digests_are_stored_and_nothing_else(impl):
    source = bytearray(DATA)
    target, digests = bytearray(len(DATA)) + CANARY, bytearray(len(DIGESTS)) + CANARY
    _C.copy_digest_into(
        address_of(digests), address_of(target), address_of(source), len(DATA), 4096, impl=impl
    )
    assert target == DATA + CANARY
    assert digests == DIGESTS + CANARY


@pytest.mark.parametrize("threads", [1, 3])
def test_a_copy_large_enough_to_be_streamed_arrives(threads):
    data = bytearray(DATA * 1000)  # 12 MB
    target = bytearray(len(data))
    digests = bytearray(-(-len(data) // (1 << 20)) * 16)
    addresses = address_of(digests), address_of(target), address_of(data)
    _C.copy_digest_into(*addresses, len(data), 1 << 20, threads)
    assert target == data
    assert digests == _C.digest(data, 1 << 20)


def test_nothing_to_digest_touches_nothing():
    _C.digest_into(0, 0, 0, 4096)
    _C.copy_digest_into(0, 0, 0, 0, 4096)


@pytest.mark.parametrize(
    ("nbytes", "chunk_bytes", "threads", "impl", "complaint"),
    [
        (-1, 4096, 0, None, "nbytes"),
        (5, 0, 0, None, "chunk_bytes"),
        (5, 4096, -1, None, "threads"),
        (5, 4096, 0, "mmx", "mmx"),
    ],
)
def test_a_bad_argument_is_refused(nbytes, chunk_bytes, threads, impl, complaint):
    with pytest.raises(ValueError, match=complaint):
        _C.digest_into(0, 0, nbytes, chunk_bytes, threads, impl=impl)
    with pytest.raises(ValueError, match=complaint):
        _C.copy_digest_into(0, 0, 0, nbytes, chunk_bytes, threads, impl=impl)


def test_a_null_source_of_a_copy_is_refused():
    target, digests = bytearray(5), bytearray(16)
    with pytest.raises(ValueError, match="null"):
        _C.copy_digest_into(address_of(digests), address_of(target), 0, 5, 4096)
