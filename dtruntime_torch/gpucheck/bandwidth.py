"""How fast digests and staging are, beside the fastest way to do nothing but move the bytes."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dtruntime_torch.checkpoint.staging.chunk_table import ChunkTable
from dtruntime_torch.gpucheck.comparison import Comparison, compare, gigabytes_per_second, in_turns
from dtruntime_torch.gpucheck.device import Bench, random_bytes
from dtruntime_torch.gpucheck.sizes import MIB, Sizes, said
from dtruntime_torch.gpucheck.staging import TIMEOUT
from dtruntime_torch.gpucheck.timing import Work, by_clock, by_events

OF_READ_BANDWIDTH = 0.9
TENSORS = 64


def measure_digest(bench: Bench, sizes: Sizes) -> Iterator[Comparison]:
    """The kernels against plain reads and plain copies of the same memory, by events of the device."""
    for number, nbytes in enumerate(sizes.measured_bytes):
        if 3 * nbytes > bench.free_bytes():
            continue
        data = random_bytes(bench, nbytes, seed=13)
        yield _against_read(bench, sizes, data, MIB, OF_READ_BANDWIDTH)
        if number == 0:
            for chunk_bytes in sizes.other_chunk_sizes:
                yield _against_read(bench, sizes, data, chunk_bytes, None)
            yield _op_against_read(bench, sizes, data)
            yield _copy_against_copy(bench, sizes, data)


def measure_staging(bench: Bench, sizes: Sizes) -> Iterator[Comparison]:
    """A whole staging against one plain copy of as many bytes, by the host's clock.

    The host's digests of what arrived are included. Each tensor has memory of its own, so each is a copy of its own.
    """
    nbytes = sizes.copied_bytes
    part = -(-nbytes // TENSORS)
    starts = range(0, nbytes, part)
    tensors = [random_bytes(bench, min(part, nbytes - start), seed=14 + start) for start in starts]
    source = torch.cat(tensors)
    arena = bench.arena(nbytes)
    target = torch.frombuffer(arena, dtype=torch.uint8)
    stager = bench.stager(arena, MIB)
    pairs = list(zip(tensors, starts, strict=True))
    works: dict[str, Work] = {
        "ours": lambda: stager.start(pairs).wait(TIMEOUT),
        "peer": lambda: bench.copy(target, source),
    }
    seconds = in_turns(works, lambda work: by_clock(bench, work), sizes.repetitions)
    yield compare(
        f"staging/{said(nbytes)} in {len(pairs)} tensors",
        seconds["ours"],
        seconds["peer"],
        peer_name="one copy to pinned memory",
        unit="GB/s",
        figure=gigabytes_per_second(nbytes),
    )


def _against_read(
    bench: Bench, sizes: Sizes, data: torch.Tensor, chunk_bytes: int, goal: float | None
) -> Comparison:
    table = ChunkTable(bench, [data.data_ptr()], [data.numel()], chunk_bytes)
    digests = table.digest()
    name = f"digest/{said(data.numel())} in chunks of {said(chunk_bytes)}"
    return _beside_read(bench, sizes, data, name, lambda: table.digest(digests), goal)


def _op_against_read(bench: Bench, sizes: Sizes, data: torch.Tensor) -> Comparison:
    """The op makes its list of chunks and its result anew at each call."""
    name = f"digest op/{said(data.numel())} in chunks of {said(MIB)}"
    return _beside_read(bench, sizes, data, name, lambda: bench.digest(data, MIB), None)


def _beside_read(
    bench: Bench, sizes: Sizes, data: torch.Tensor, metric: str, ours: Work, goal: float | None
) -> Comparison:
    sink = torch.empty(1, dtype=torch.int64, device=bench.torch_device)

    def read() -> None:
        bench.native.cuda_read(data.data_ptr(), data.numel(), sink.data_ptr(), bench.index, bench.stream())

    return _by_events(bench, sizes, metric, ours, read, "reads of 16 bytes", data.numel(), goal)


def _copy_against_copy(bench: Bench, sizes: Sizes, data: torch.Tensor) -> Comparison:
    target = torch.empty_like(data)
    table = ChunkTable(bench, [data.data_ptr()], [data.numel()], MIB, [target.data_ptr()])
    digests = table.digest()
    return _by_events(
        bench,
        sizes,
        f"copy with digest/{said(data.numel())} in chunks of {said(MIB)}",
        lambda: table.digest(digests, copy=True),
        lambda: bench.copy(target, data),
        "a copy on the device",
        data.numel(),
        None,
    )


def _by_events(
    bench: Bench,
    sizes: Sizes,
    metric: str,
    ours: Work,
    peer: Work,
    peer_name: str,
    nbytes: int,
    goal: float | None,
) -> Comparison:
    works = {"ours": ours, "peer": peer}
    seconds = in_turns(works, lambda work: by_events(bench, work, sizes.launches), sizes.repetitions)
    return compare(
        metric,
        seconds["ours"],
        seconds["peer"],
        peer_name=peer_name,
        unit="GB/s",
        figure=gigabytes_per_second(nbytes),
        goal=goal,
    )
