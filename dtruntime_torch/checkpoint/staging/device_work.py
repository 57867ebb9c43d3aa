"""What a staging has a device do: enqueued on a side stream, in flight until an event has passed."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from dtruntime_torch import _C
from dtruntime_torch.checkpoint.staging.device import Device, Event
from dtruntime_torch.checkpoint.staging.sources import PairNames
from dtruntime_torch.errors import SaveFailed

POLL_SECONDS = 0.001
"""CUDA cannot wait for an event with a time-out: it is asked this often."""


class DeviceWork(ABC):
    """Brings sources of one device into the arena; how, say `DeviceCopies` and `DeviceChanges`.

    It reads the sources as they are when the current stream comes to the point where it is as this is made. The
    sources' memory is not kept by this: whoever makes it holds them until `wait` returned True. (Holding them says
    until when; `record_stream` would leave that to the allocator, and not every allocator of torch has it.)

    Args:
        device: where the sources are.
        sources: number of the pair -> source and its offset in the arena.
        name: names pairs in a message.

    Attributes:
        numbers: of the pairs, in the order of `sources`.
        offsets: their first bytes in the arena.
        lengths: their bytes.
        nbytes: all bytes together.
        chunks_skipped: chunks that the arena held already; known once `digests` has returned.
    """

    chunks_skipped = 0
    _event: Event

    def __init__(
        self,
        device: Device,
        sources: Mapping[int, tuple[torch.Tensor, int]],
        name: PairNames,
    ) -> None:
        self.numbers = list(sources)
        self.offsets = [offset for _, offset in sources.values()]
        self.lengths = [tensor.nbytes for tensor, _ in sources.values()]
        self.nbytes = sum(self.lengths)
        self._device = device
        self._where = str(next(iter(sources.values()))[0].device)
        self._name = name

    @property
    @abstractmethod
    def nbytes_copied(self) -> int:
        """Bytes that were copied; known once `digests` has returned."""

    @abstractmethod
    def digests(self, arena: _C.Arena, chunk_bytes: int, threads: int) -> bytes:
        """The digests of what arrived, of all chunks in the order of the pairs. Only after `wait` returned True.

        Raises:
            SaveFailed: that is not what the device sent.
        """

    def hold_current(self) -> None:
        """Makes what the caller's current stream is given from now on wait for this.

        Raises:
            SaveFailed: the device failed.
        """
        with self.reported():
            self._device.hold_current(self._event)

    def done(self) -> bool:
        """Whether all bytes are in the arena.

        Raises:
            SaveFailed: the device failed.
        """
        with self.reported():
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
        with self.reported():
            if deadline is None:
                self._event.synchronize()
                return True
            # A device's event can be waited for without a limit or not at all; so it is looked at in turn.
            while not self._event.query():
                if time.monotonic() >= deadline:
                    return False
                time.sleep(POLL_SECONDS)
            return True

    @contextmanager
    def enqueuing(self) -> Iterator[None]:
        """For the block that enqueues all of it: on the side stream, and nothing is in flight if it fails."""
        with self.reported():
            self._device.follow_current()
            try:
                with self._device.on_side():
                    yield
            except BaseException:
                self._device.record().synchronize()
                raise
            self._event = self._device.record()

    @contextmanager
    def reported(self, pair: int | None = None) -> Iterator[None]:
        """Turns what the device says into SaveFailed, of one pair or all."""
        try:
            yield
        except SaveFailed:
            raise
        except RuntimeError as error:
            what = self._name(self.numbers if pair is None else [pair])
            raise SaveFailed(
                f"{what} could not be copied from {self._where} into the arena: {error}; this save is lost, the "
                f"next may go well if the device recovers or has memory free"
            ) from error
