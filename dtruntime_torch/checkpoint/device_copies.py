"""Copies from a device into the arena: on a side stream, merged where they meet, behind an event."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch

from dtruntime_torch.checkpoint.copy_plan import Span, merge_spans
from dtruntime_torch.checkpoint.device import Device, in_one_piece
from dtruntime_torch.errors import SaveFailed

POLL_SECONDS = 0.001
"""CUDA cannot wait for an event with a time-out: it is asked this often."""


class DeviceCopies:
    """The copies of one staging from one device: enqueued when it is made, in flight until its event has passed.

    They read the sources as they are when the current stream comes to the point where it is now. The sources'
    memory is not kept by this: whoever makes it holds them until `wait` returned True. (Holding them says until
    when; `record_stream` would leave that to the allocator, and not every allocator of torch has it.)

    Args:
        device: where the sources are.
        image: the arena's bytes, as uint8.
        sources: number of the pair -> source and its offset in the image.

    Raises:
        SaveFailed: a copy was refused; it names the pair. None is in flight then.
    """

    def __init__(
        self, device: Device, image: torch.Tensor, sources: Mapping[int, tuple[torch.Tensor, int]]
    ) -> None:
        self.pairs = frozenset(sources)
        self.nbytes = sum(tensor.nbytes for tensor, _ in sources.values())
        self._device = device
        self._where = str(next(iter(sources.values()))[0].device)
        with self._reported():
            device.follow_current()
            try:
                with device.on_side():
                    for pair, source, offset, nbytes in _copies(sources):
                        with self._reported(pair):
                            device.copy(image[offset : offset + nbytes], source)
            except BaseException:
                device.record().synchronize()
                raise
            self._event = device.record()

    def hold_current(self) -> None:
        """Makes what the caller's current stream is given from now on wait for these copies.

        Raises:
            SaveFailed: the device failed.
        """
        with self._reported():
            self._device.hold_current(self._event)

    def done(self) -> bool:
        """Whether all bytes are in the arena.

        Raises:
            SaveFailed: the device failed.
        """
        with self._reported():
            return self._event.query()

    def wait(self, deadline: float | None) -> bool:
        """Blocks until all bytes are in the arena.

        Args:
            deadline: by `time.monotonic()`; None waits as long as the device takes.

        Returns:
            False if the deadline has passed.

        Raises:
            SaveFailed: the device failed.
        """
        with self._reported():
            if deadline is None:
                self._event.synchronize()
                return True
            while not self._event.query():
                if time.monotonic() >= deadline:
                    return False
                time.sleep(POLL_SECONDS)
            return True

    @contextmanager
    def _reported(self, pair: int | None = None) -> Iterator[None]:
        try:
            yield
        except SaveFailed:
            raise
        except RuntimeError as error:
            what = name_pairs(self.pairs) if pair is None else f"pair {pair}"
            raise SaveFailed(
                f"{what} could not be copied from {self._where} into the arena: {error}; this save is lost, the "
                f"next may go well if the device recovers or has memory free"
            ) from error


def name_pairs(pairs: Collection[int]) -> str:
    """Names pairs in a message, the first few by number.

    Example:
        >>> name_pairs({3}), name_pairs(range(2, 9))
        ('pair 3', 'pairs 2, 3, 4 and 4 more')
    """
    first = sorted(pairs)[:3]
    named = f"pair{'s' * (len(pairs) > 1)} {', '.join(map(str, first))}"
    return f"{named} and {len(pairs) - 3} more" if len(pairs) > 3 else named


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
