"""Plain copies from a device into the arena: on a side stream, merged where they meet, behind an event."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from dtruntime_torch import _C
from dtruntime_torch.checkpoint.staging.copy_plan import Span, merge_spans
from dtruntime_torch.checkpoint.staging.device import Device, in_one_piece
from dtruntime_torch.checkpoint.staging.device_work import DeviceWork
from dtruntime_torch.checkpoint.staging.sources import PairNames


class DeviceCopies(DeviceWork):
    """The copies of one staging from one device. `DeviceWork` says what they read, and when.

    Args:
        device: where the sources are.
        image: the arena's bytes, as uint8.
        sources: number of the pair -> source and its offset in the image.
        name: names pairs in a message.

    Raises:
        SaveFailed: a copy was refused; it names the pair. None is in flight then.
    """

    def __init__(
        self,
        device: Device,
        image: torch.Tensor,
        sources: Mapping[int, tuple[torch.Tensor, int]],
        name: PairNames,
    ) -> None:
        super().__init__(device, sources, name)
        with self.enqueuing():
            for pair, source, offset, nbytes in _copies(sources):
                with self.reported(pair):
                    device.copy(image[offset : offset + nbytes], source)

    @property
    def nbytes_copied(self) -> int:
        return self.nbytes

    def digests(self, arena: _C.Arena, chunk_bytes: int, threads: int) -> bytes:
        return _C.digest_ranges(arena, self.offsets, self.lengths, chunk_bytes, threads)


def _copies(sources: Mapping[int, tuple[torch.Tensor, int]]) -> Iterator[tuple[int, torch.Tensor, int, int]]:
    """First pair, source, arena offset and bytes of each copy that moves `sources`."""
    storages: dict[tuple[int, int], tuple[int, torch.UntypedStorage]] = {}
    spans = []
    for pair, (tensor, offset) in sources.items():
        if not in_one_piece(tensor):
            yield pair, tensor, offset, tensor.nbytes
            continue
        storage = tensor.untyped_storage()
        number, _ = storages.setdefault((storage.data_ptr(), storage.nbytes()), (pair, storage))
        spans.append(
            Span(pair, number, int(tensor.storage_offset()) * tensor.itemsize, tensor.nbytes, offset)
        )
    by_number = dict(storages.values())
    for span in merge_spans(spans):
        storage = by_number[span.storage]
        view = torch.empty(0, dtype=torch.uint8, device=storage.device)
        yield span.pair, view.set_(storage, span.start, (span.nbytes,), (1,)), span.offset, span.nbytes
