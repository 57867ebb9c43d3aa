"""Many small pieces that changed: gathered by a kernel, against one copy for each."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import torch

from dtruntime_torch.checkpoint.staging.chunk_table import ChunkTable
from dtruntime_torch.gpucheck.comparison import Comparison, compare, gigabytes_per_second, in_turns
from dtruntime_torch.gpucheck.device import Bench, random_bytes
from dtruntime_torch.gpucheck.sizes import KIB, Sizes
from dtruntime_torch.gpucheck.timing import Work, by_events

PIECE_BYTES = 64 * KIB


def measure_gather(bench: Bench, sizes: Sizes) -> Iterator[Comparison]:
    """Brings every second piece to pinned memory, by events of the device.

    An idle device waits for each launch, so the time in which the host gives them out counts.
    """
    count = sizes.pieces
    nbytes = count * PIECE_BYTES
    data = random_bytes(bench, 2 * nbytes, seed=22)
    arena = bench.arena(nbytes)
    rows = [2 * number for number in range(count)]
    random.Random(23).shuffle(rows)
    works: dict[str, Work] = {
        "staged": _gathered(bench, data, arena.address, rows, torch.frombuffer(arena, dtype=torch.uint8)),
        "direct": _gathered(bench, data, arena.address, rows, None),
        "copies": _one_by_one(bench, data, rows, torch.frombuffer(arena, dtype=torch.uint8)),
    }
    seconds = in_turns(works, lambda work: by_events(bench, work), sizes.repetitions)
    for way, what in (("staged", "to the device and one copy"), ("direct", "to pinned memory")):
        yield compare(
            f"gather {what}/{count} pieces of 64 KiB",
            seconds[way],
            seconds["copies"],
            peer_name="a copy for each piece",
            unit="GB/s",
            figure=gigabytes_per_second(nbytes),
        )


def _gathered(
    bench: Bench, data: torch.Tensor, address: int, rows: list[int], image: torch.Tensor | None
) -> Callable[[], None]:
    """By way of a buffer on the device and one copy to `image`; without one, each to its place at `address`."""
    nbytes = len(rows) * PIECE_BYTES
    places = {row: number for number, row in enumerate(rows)}
    pieces = range(data.numel() // PIECE_BYTES)
    table = ChunkTable(
        bench,
        [data.data_ptr() + piece * PIECE_BYTES for piece in pieces],
        [PIECE_BYTES for _ in pieces],
        PIECE_BYTES,
        # Where those go that are not gathered does not matter.
        [address + places.get(piece, 0) * PIECE_BYTES for piece in pieces],
    )
    changed = torch.tensor(rows, dtype=torch.int32, device=bench.torch_device)
    changed_count = torch.tensor([len(rows)], dtype=torch.int32, device=bench.torch_device)
    staging = None if image is None else torch.empty(nbytes, dtype=torch.uint8, device=bench.torch_device)

    def gather() -> None:
        table.gather(changed, changed_count, staging, PIECE_BYTES)
        if staging is not None and image is not None:
            bench.copy(image, staging)

    return gather


def _one_by_one(bench: Bench, data: torch.Tensor, rows: list[int], image: torch.Tensor) -> Callable[[], None]:
    pairs = [(_piece(image, number), _piece(data, row)) for number, row in enumerate(rows)]

    def copy() -> None:
        for target, piece in pairs:
            bench.copy(target, piece)

    return copy


def _piece(memory: torch.Tensor, number: int) -> torch.Tensor:
    return memory[number * PIECE_BYTES : (number + 1) * PIECE_BYTES]
