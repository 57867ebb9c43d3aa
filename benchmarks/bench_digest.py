"""XXH3-128 beside PyPI xxhash and a plain read; copying with digesting beside memcpy and a bare non-temporal copy.

All memory comes from arenas, which have huge pages, for ours and for the peer alike: else misses in the table of pages
would decide. All of it was written before, for pages that nobody wrote are all the same page of zeros, in cache.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from functools import cache, partial

import xxhash

from benchmarks.harness import Case, main
from dtruntime_torch import _C

MIB = 1 << 20
CHUNK_BYTES = MIB
IN_CACHE = MIB
IN_MEMORY = 256 * MIB
# A single run in cache is shorter than what a clock can tell.
TIMES = 256
# Not in the lines of 64 bytes, as where a tensor of 4-byte elements may lie; and half a page away, for where source
# and target agree in their last 12 bits but for a few bytes, processors take one for the other and wait.
UNALIGNED = 2048 + 4

GOALS = {
    ("dispatched", IN_CACHE): 1.0,
    ("dispatched", IN_MEMORY): 1.0,
    ("avx2", IN_CACHE): 0.65,
    ("avx2", IN_MEMORY): 0.9,
}


def cases() -> Iterator[Case]:
    """Yields digests against xxhash, against reading, and by the size of a chunk; then copies."""
    for nbytes, times in ((IN_CACHE, TIMES), (IN_MEMORY, 1)):
        for impl in ("dispatched", *_C.digest_impls()[1:]):  # the first is the one dispatched
            name = None if impl == "dispatched" else impl
            yield Case(
                metric=f"digest/{nbytes // MIB}MiB/{impl}",
                ours=partial(_repeat, times, partial(_digest, nbytes, nbytes, impl=name)),
                peer=partial(_repeat, times, partial(_xxhash, nbytes)),
                peer_name="PyPI xxhash",
                nbytes=nbytes * times,
                goal=GOALS.get((impl, nbytes)),
            )
    for threads in (1, 2):
        yield Case(
            metric=f"digest/256MiB/threads={threads}",
            ours=partial(_digest, IN_MEMORY, CHUNK_BYTES, threads),
            peer=partial(_read, IN_MEMORY, threads),
            peer_name="prefetching read",
            nbytes=IN_MEMORY,
            goal=0.95 if threads == 2 else None,
        )
    for chunk_bytes in (4 << 10, 64 << 10, 256 << 10, 4 * MIB, 16 * MIB):
        yield Case(
            metric=f"digest/256MiB/chunk={chunk_bytes >> 10}KiB",
            ours=partial(_digest, IN_MEMORY, chunk_bytes),
            peer=partial(_digest, IN_MEMORY, CHUNK_BYTES),
            peer_name="chunks of 1 MiB",
            nbytes=IN_MEMORY,
        )
    yield from _copies()


def _copies() -> Iterator[Case]:
    for metric, offset in (("copy_digest/256MiB", 0), ("copy_digest/256MiB/unaligned", UNALIGNED)):
        for threads in (1, 2):
            yield Case(
                metric=f"{metric}/non-temporal/threads={threads}",
                ours=partial(_copy_digest, IN_MEMORY, offset, threads),
                peer=partial(_copy_streaming, IN_MEMORY, offset, threads),
                peer_name="non-temporal copy",
                nbytes=IN_MEMORY,
                goal=0.9 if offset == 0 and threads == 1 else None,
            )
        yield Case(
            metric=f"{metric}/memcpy",
            ours=partial(_copy_digest, IN_MEMORY, offset),
            peer=partial(_memcpy, IN_MEMORY, offset),
            peer_name="memcpy",
            nbytes=IN_MEMORY,
            goal=None if offset else 1.2,
        )
    yield Case(
        metric="copy_digest/1MiB/memcpy",
        ours=partial(_repeat, TIMES, partial(_copy_digest, IN_CACHE, 0)),
        peer=partial(_repeat, TIMES, partial(_memcpy, IN_CACHE, 0)),
        peer_name="memcpy",
        nbytes=IN_CACHE * TIMES,
        goal=0.8,
    )


@cache
def _memory(name: str) -> _C.Arena:
    # One size for all, since a small arena has small pages.
    arena = _C.Arena(IN_MEMORY + 2 * UNALIGNED)
    ctypes.memset(arena.address, ord(name[0]), len(arena))
    return arena


def _bytes_of(name: str, nbytes: int, offset: int = 0) -> memoryview:
    return memoryview(_memory(name))[offset : offset + nbytes]


def _repeat(times: int, work: Callable[[], object]) -> None:
    for _ in range(times):
        work()


def _digest(nbytes: int, chunk_bytes: int, threads: int = 1, impl: str | None = None) -> bytes:
    data = _bytes_of("source", nbytes)
    if impl is None:  # as one calls it; to pass a name costs 0.3 us, 2% of 1 MiB in cache
        return _C.digest(data, chunk_bytes, threads)
    return _C.digest(data, chunk_bytes, threads, impl=impl)


def _xxhash(nbytes: int) -> bytes:
    return xxhash.xxh3_128_digest(_bytes_of("source", nbytes))


def _read(nbytes: int, threads: int) -> int:
    return _C.read_memory(_bytes_of("source", nbytes), threads)


def _copy_digest(nbytes: int, offset: int, threads: int = 1) -> bytes:
    source, target = _memory("source"), _memory("target")
    return _C.copy_digest(target, [source.address], [nbytes], [offset], CHUNK_BYTES, threads)


def _copy_streaming(nbytes: int, offset: int, threads: int) -> None:
    _C.copy_streaming(_bytes_of("target", nbytes, offset), _bytes_of("source", nbytes), threads)


def _memcpy(nbytes: int, offset: int) -> None:
    source, target = _memory("source"), _memory("target")
    ctypes.memmove(target.address + offset, source.address, nbytes)


if __name__ == "__main__":
    main(cases)
