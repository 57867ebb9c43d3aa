"""Which chunks changed, and bringing them together: both are decided on the device, and compared with torch there."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import torch

from dtruntime_torch.checkpoint.staging.chunk_table import ChunkTable
from dtruntime_torch.gpucheck.device import Bench, random_bytes
from dtruntime_torch.gpucheck.findings import Check, same_bytes
from dtruntime_torch.gpucheck.sizes import Sizes

LONGEST = 5000
STRIDE = 8192


def check_changes(bench: Bench, sizes: Sizes) -> Iterator[Check]:
    """Compares digests and gathers chunks, with none, one, some and all of them changed."""
    count = sizes.changed_chunks
    some = sorted(random.Random(7).sample(range(count), count // 3))
    for what, rows in {"none": [], "one": [count - 1], "some": some, "all": list(range(count))}.items():
        yield from find_changed(bench, what, count, rows)
        yield from gather_changed(bench, what, count, rows)


def find_changed(bench: Bench, what: str, count: int, rows: list[int]) -> Iterator[Check]:
    """The kernel names the rows that differ, in any order, and brings the known table up to date."""
    digests = random_bytes(bench, 16 * count, seed=8).view(torch.int64).view(count, 2)
    known = digests.clone()
    for number, row in enumerate(rows):
        # One half of the digest, in turns: a comparison of the other half alone finds nothing.
        known[row, number % 2] ^= 1 << (number % 63)
    differ = (known != digests).any(dim=1).nonzero().flatten().tolist()
    changed = torch.full((count,), -1, dtype=torch.int32, device=bench.torch_device)
    changed_count = torch.full((1,), -1, dtype=torch.int32, device=bench.torch_device)
    bench.native.cuda_find_changed(
        digests.data_ptr(),
        known.data_ptr(),
        count,
        changed.data_ptr(),
        changed_count.data_ptr(),
        bench.index,
        bench.stream(),
    )
    bench.synchronize()
    found = sorted(changed[: int(changed_count)].tolist())
    yield Check(
        f"changes/found, {what} of {count}", found == differ, f"{len(found)} found, {len(differ)} differ"
    )
    yield same_bytes(f"changes/table after, {what} of {count}", _bytes(known), _bytes(digests))


def gather_changed(bench: Bench, what: str, count: int, rows: list[int]) -> Iterator[Check]:
    """The kernel copies the chunks of a list one after another, or each to its own place in an arena."""
    draw = random.Random(9)
    lengths = [draw.randint(1, LONGEST) for _ in range(count)]
    offsets = [0, *itertools.accumulate(lengths)][:-1]
    data = random_bytes(bench, sum(lengths), seed=9)
    arena = bench.arena(sum(lengths))
    image = torch.frombuffer(arena, dtype=torch.uint8)
    table = ChunkTable(
        bench,
        [data.data_ptr() + offset for offset in offsets],
        lengths,
        LONGEST,
        [arena.address + offset for offset in offsets],
    )
    order = draw.sample(rows, len(rows))
    # There is more room than there are changes: what lies behind the count is no number of a chunk.
    changed = torch.full((count,), 1 << 30, dtype=torch.int32)
    changed[: len(order)] = torch.tensor(order, dtype=torch.int32)
    changed = changed.to(bench.torch_device)
    changed_count = torch.tensor([len(order)], dtype=torch.int32, device=bench.torch_device)

    staging = torch.zeros(count * STRIDE, dtype=torch.uint8, device=bench.torch_device)
    table.gather(changed, changed_count, staging, STRIDE)
    table.gather(changed, changed_count, None, STRIDE)
    bench.synchronize()

    host = data.cpu()
    staged, placed = torch.zeros(count * STRIDE, dtype=torch.uint8), torch.zeros_like(host)
    for number, row in enumerate(order):
        chunk = host[offsets[row] : offsets[row] + lengths[row]]
        staged[number * STRIDE : number * STRIDE + lengths[row]] = chunk
        placed[offsets[row] : offsets[row] + lengths[row]] = chunk
    yield same_bytes(f"changes/gathered, {what} of {count}", staging, staged)
    yield same_bytes(f"changes/in their places, {what} of {count}", image, placed)


def _bytes(table: torch.Tensor) -> torch.Tensor:
    return table.view(torch.uint8).flatten()
