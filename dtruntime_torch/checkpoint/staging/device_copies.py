"""Plain copies from a device into the arena: on a side stream, merged where they meet, behind an event."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from dtruntime_torch import _C
from dtruntime_torch.checkpoint.staging.copy_plan import Span, merge_spans
from dtruntime_torch.checkpoint.staging.device import Device
from dtruntime_torch.checkpoint.staging.device_work import DeviceWork, Placed
from dtruntime_torch.checkpoint.staging.sources import PairNames


class DeviceCopies(DeviceWork):
    """The copies of one staging from one device. `DeviceWork` says what they read, and when.

    Where our kernels do not run (this build or its driver has no CUDA for them), nothing is digested at the call.
    There the arena is not pinned either, so a copy has arrived when it was enqueued, and all before `start` returns:
    only what other streams or threads overwrite meanwhile can tear, and goes unnoticed.

    Args:
        device: where the sources are.
        arena: where to.
        image: its bytes, as uint8.
        sources: number of the pair -> source and its offset in the image.
        chunk_bytes: bytes of a chunk.
        name: names pairs in a message.

    Raises:
        SaveFailed: a copy was refused; it names the pair. None is in flight then.
    """

    def __init__(
        self,
        device: Device,
        arena: _C.Arena,
        image: torch.Tensor,
        sources: Placed,
        chunk_bytes: int,
        name: PairNames,
    ) -> None:
        super().__init__(device, sources, chunk_bytes, name)
        with self.enqueuing(digest=device.has_kernels(), pinned=device.can_write(arena)) as (pieces, _):
            for pair, source, offset in _copies(pieces, self.offsets):
                with self.reported(pair):
                    device.copy(image[offset : offset + source.nbytes], source)

    @property
    def nbytes_copied(self) -> int:
        return self.nbytes

    def digests(self, arena: _C.Arena, threads: int) -> bytes:
        if self._taken is None:
            return _C.digest_ranges(arena, self.offsets, self.lengths, self._chunk_bytes, threads)
        return self._taken.check_all(arena, threads)


def _copies(
    pieces: Mapping[int, torch.Tensor], offsets: list[int]
) -> Iterator[tuple[int, torch.Tensor, int]]:
    """First pair, bytes and arena offset of each copy that moves pieces of memory."""
    storages: dict[tuple[int, int], tuple[int, torch.UntypedStorage]] = {}
    spans = []
    for (pair, piece), offset in zip(pieces.items(), offsets, strict=True):
        storage = piece.untyped_storage()
        number, _ = storages.setdefault((storage.data_ptr(), storage.nbytes()), (pair, storage))
        spans.append(Span(pair, number, int(piece.storage_offset()) * piece.itemsize, piece.nbytes, offset))
    by_number = dict(storages.values())
    for span in merge_spans(spans):
        storage = by_number[span.storage]
        view = torch.empty(0, dtype=torch.uint8, device=storage.device)
        yield span.pair, view.set_(storage, span.start, (span.nbytes,), (1,)), span.offset
