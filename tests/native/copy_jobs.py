"""What the tests of copy jobs start: sources and where they go, and a job that runs for longer than a test."""

from __future__ import annotations

import ctypes
from random import Random

import xxhash

from dtruntime_torch import _C
from tests.boundaries import CHUNK_BYTES

MIB = 1 << 20
DATA = bytearray(Random(1).randbytes(8 * MIB + 11))
TIMEOUT = 120.0
# More than any machine copies between two statements.
LONG = 1 << 30


def address_of(data: bytearray, offset: int = 0) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(data)) + offset


def chunked(data: bytes | bytearray, chunk_bytes: int) -> bytes:
    chunks = (data[i : i + chunk_bytes] for i in range(0, len(data), chunk_bytes))
    return b"".join(xxhash.xxh3_128_digest(chunk) for chunk in chunks)


class Sources:
    """Sources of these lengths, and where they go in an arena: with gaps of 3 bytes, whose bytes are canaries."""

    def __init__(self, lengths: list[int]) -> None:
        self.data = [bytearray(DATA[i : i + n]) for i, n in enumerate(lengths)]
        self.lengths = lengths
        self.offsets = [sum(lengths[:i]) + 3 * (i + 1) for i in range(len(lengths))]
        self.arena = _C.Arena(sum(lengths) + 3 * (len(lengths) + 1))
        memoryview(self.arena)[:] = b"\xaa" * len(self.arena)

    def start(
        self, chunk_bytes: int = CHUNK_BYTES, threads: int = 0, known: bytes | None = None
    ) -> _C.CopyJob:
        addresses = [address_of(data) if data else 0 for data in self.data]
        return _C.CopyJob(self.arena, addresses, self.lengths, self.offsets, chunk_bytes, threads, known)

    def arrived(self, i: int) -> bytes:
        return bytes(memoryview(self.arena)[self.offsets[i] : self.offsets[i] + self.lengths[i]])

    def digests(self, chunk_bytes: int = CHUNK_BYTES) -> bytes:
        return b"".join(chunked(data, chunk_bytes) for data in self.data)


def start_long(source: _C.Arena, arena: _C.Arena | None = None, threads: int = 1) -> _C.CopyJob:
    """One that takes far longer than a test needs to look at it; its targets take as much memory as it gets to."""
    target = arena or _C.Arena(LONG)
    return _C.CopyJob(target, [source.address], [LONG], [0], MIB, threads)
