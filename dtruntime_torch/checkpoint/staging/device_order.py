"""In which order a staging gives devices their work: what may not come late, and then the rest."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch

from dtruntime_torch import _C
from dtruntime_torch.checkpoint.staging.device import Device
from dtruntime_torch.checkpoint.staging.device_changes import DeviceChanges, comparable
from dtruntime_torch.checkpoint.staging.device_copies import DeviceCopies
from dtruntime_torch.checkpoint.staging.device_work import DeviceWork
from dtruntime_torch.checkpoint.staging.sources import Sources


def enqueue(
    arena: _C.Arena,
    image: torch.Tensor,
    sources: Sources,
    known: bytes | None,
    chunk_bytes: int,
    late: Collection[int],
) -> Iterator[DeviceWork]:
    """Enqueues the work of all devices, each piece as it is asked for.

    Args:
        arena: where to.
        image: its bytes, as uint8.
        sources: of which those on a device are taken.
        known: digests of what the arena holds, if that is known: then only changes are copied where that can be.
        chunk_bytes: bytes of a chunk.
        late: numbers of the pairs that come after all others of their device, behind an event of their own.

    Yields:
        What was enqueued: of a device, first what is not late.

    Raises:
        SaveFailed: something was refused; that piece is not in flight, those before it are.
    """
    for awaited in (False, True):
        for device, numbers in sources.on_device.items():
            some = [number for number in numbers if (number in late) is awaited]
            if some:
                yield _work(device, arena, image, sources, some, known, chunk_bytes)


def _work(
    device: Device,
    arena: _C.Arena,
    image: torch.Tensor,
    sources: Sources,
    numbers: Sequence[int],
    known: bytes | None,
    chunk_bytes: int,
) -> DeviceWork:
    placed, lengths = sources.placed(numbers), [sources.lengths[number] for number in numbers]
    if known is None or not comparable(device, arena, lengths, chunk_bytes):
        return DeviceCopies(device, arena, image, placed, chunk_bytes, sources.name)
    table = sources.of_some(numbers, known, chunk_bytes)
    return DeviceChanges(device, arena, placed, table, chunk_bytes, sources.name)
