"""Digests of the device are those of the host: at every length, alignment, chunk size and dtype."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path

import torch

from dtruntime_torch import _C
from dtruntime_torch.checkpoint.staging.chunk_table import ChunkTable
from dtruntime_torch.gpucheck.device import Bench, on_host, random_bytes
from dtruntime_torch.gpucheck.findings import Check, Finding, NotRun, same_bytes, same_digests
from dtruntime_torch.gpucheck.sizes import Sizes

ALIGNMENTS = 16
VECTORS = Path(__file__).parents[2] / "tests" / "vectors" / "digest.json"
NAMES = (
    *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
    *("float8_e4m3fn", "float8_e5m2", "float16", "bfloat16", "float32", "float64"),
    *("complex32", "complex64", "complex128"),
)
# An older torch lacks some.
DTYPES: list[torch.dtype] = [getattr(torch, name) for name in NAMES if hasattr(torch, name)]


def check_digests(bench: Bench, sizes: Sizes) -> Iterator[Finding]:
    """Compares the kernels and the ops with the host."""
    yield every_length_and_alignment(bench, sizes.longest)
    yield many_ragged_chunks(bench, sizes.ragged_chunks, sizes.ragged_longest)
    for chunk_bytes in sizes.chunk_sizes:
        yield one_tensor(bench, f"digest/chunks of {chunk_bytes}", sizes.chunked_bytes + 4321, chunk_bytes)
    yield one_tensor(bench, f"digest/{sizes.large_bytes} bytes", sizes.large_bytes, 1 << 20)
    yield from every_dtype(bench)
    yield from copies_at_every_alignment(bench)
    yield from copy_by_the_op(bench, sizes.chunked_bytes + 4321)
    if VECTORS.exists():
        yield from known_digests(bench, VECTORS)
    else:
        yield NotRun("digest/vectors", f"{VECTORS} is not there: it comes with the sources, not with a wheel")


def every_length_and_alignment(bench: Bench, longest: int) -> Check:
    """All of them in one launch: the pieces overlap, for they are only read."""
    data = random_bytes(bench, longest + ALIGNMENTS, seed=1)
    pieces = list(itertools.product(range(ALIGNMENTS), range(longest + 1)))
    offsets, lengths = [offset for offset, _ in pieces], [length for _, length in pieces]
    table = ChunkTable(bench, [data.data_ptr() + offset for offset in offsets], lengths, longest + 1)
    name = f"digest/lengths 0 to {longest}, {ALIGNMENTS} alignments"
    return same_digests(name, table.digest(), _host_digests(data, offsets, lengths, longest + 1))


def many_ragged_chunks(bench: Bench, count: int, longest: int) -> Check:
    """Pieces of any length that lie one after another, so at any alignment."""
    draw = random.Random(2)
    lengths = [draw.randint(0, longest) for _ in range(count)]
    offsets = [0, *itertools.accumulate(lengths)][:-1]
    chunk_bytes = longest // 2 + 1
    data = random_bytes(bench, sum(lengths), seed=2)
    table = ChunkTable(bench, [data.data_ptr() + offset for offset in offsets], lengths, chunk_bytes)
    name = f"digest/{count} ragged pieces"
    return same_digests(name, table.digest(), _host_digests(data, offsets, lengths, chunk_bytes))


def one_tensor(bench: Bench, name: str, nbytes: int, chunk_bytes: int) -> Check:
    """By the op, as users call it."""
    data = random_bytes(bench, nbytes, seed=3)
    return same_digests(name, bench.digest(data, chunk_bytes), _C.digest(on_host(data), chunk_bytes))


def every_dtype(bench: Bench) -> Iterator[Check]:
    """Three elements in, so that a start is aligned to its dtype and to nothing else."""
    # Bytes of 0 and 1, which are elements of every dtype, bool included.
    data = random_bytes(bench, 48_000, seed=4) & 1
    for dtype in DTYPES:
        tensor = data.view(dtype)[3:]
        expected = _C.digest(on_host(data[3 * dtype.itemsize :]), 4096)
        yield same_digests(
            f"digest/{str(dtype).removeprefix('torch.')}", bench.digest(tensor, 4096), expected
        )


def copies_at_every_alignment(bench: Bench) -> Iterator[Check]:
    """From each of 16 alignments to each, in one launch; what lies around the targets stays as it was."""
    length, gap = 3001, 3001 + 64
    pairs = list(itertools.product(range(ALIGNMENTS), repeat=2))
    source = random_bytes(bench, length + ALIGNMENTS, seed=5)
    target = torch.full((len(pairs) * gap,), 0xA5, dtype=torch.uint8, device=bench.torch_device)
    expected = target.clone()
    places = [number * gap + to for number, (_, to) in enumerate(pairs)]
    for (start, _), place in zip(pairs, places, strict=True):
        expected[place : place + length] = source[start : start + length]
    table = ChunkTable(
        bench,
        [source.data_ptr() + start for start, _ in pairs],
        [length] * len(pairs),
        length,
        [target.data_ptr() + place for place in places],
    )
    digests = table.digest(copy=True)
    host = _host_digests(source, [start for start, _ in pairs], [length] * len(pairs), length)
    yield same_digests(f"copy/digests at {len(pairs)} alignments", digests, host)
    yield same_bytes(f"copy/bytes at {len(pairs)} alignments", target, expected)


def copy_by_the_op(bench: Bench, nbytes: int) -> Iterator[Check]:
    """By the op, as users call it."""
    source = random_bytes(bench, nbytes, seed=6)
    target = ~source  # memory that was merely reused might hold the right bytes already
    digests = bench.copy_digest_(target, source, 1 << 20)
    yield same_digests("copy/digests by the op", digests, _C.digest(on_host(source), 1 << 20))
    yield same_bytes("copy/bytes by the op", target, source)


def known_digests(bench: Bench, file: Path) -> Iterator[Check]:
    """The vectors of the tests, which come from another implementation."""
    vectors = json.loads(file.read_text(encoding="utf-8"))
    whole = [vector for vector in vectors["whole"] if vector["length"]]
    longest = max(vector["length"] for vector in [*whole, *vectors["chunked"]])
    data = (torch.arange(longest) % 251).to(torch.uint8).to(bench.torch_device)
    table = ChunkTable(bench, [data.data_ptr()] * len(whole), [v["length"] for v in whole], longest)
    expected = bytes.fromhex("".join(vector["digest"] for vector in whole))
    yield same_digests("digest/vectors", table.digest(), expected)
    for vector in vectors["chunked"]:
        found = bench.digest(data[: vector["length"]], vector["chunk_bytes"])
        name = f"digest/vector of {vector['length']} in chunks of {vector['chunk_bytes']}"
        yield same_digests(name, found, bytes.fromhex(vector["digests"]))


def _host_digests(data: torch.Tensor, offsets: list[int], lengths: list[int], chunk_bytes: int) -> bytes:
    return _C.digest_ranges(on_host(data), offsets, lengths, chunk_bytes)
