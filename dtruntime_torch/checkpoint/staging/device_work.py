"""What a staging has a device do: in flight until an event has passed.

What the sources are is settled on the caller's current stream, at its end as it is now, so that nothing that the caller
enqueues later comes before it: their digests are taken there, and those that do not lie in one piece are copied into one.
Bringing them into the arena is for a side stream, behind that.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import torch

from dtruntime_torch import _C
from dtruntime_torch.checkpoint.staging.chunk_table import ChunkTable
from dtruntime_torch.checkpoint.staging.device import Device, Event, in_one_piece
from dtruntime_torch.checkpoint.staging.device_digests import DeviceDigests
from dtruntime_torch.checkpoint.staging.sources import PairNames
from dtruntime_torch.errors import SaveFailed

POLL_SECONDS = 0.001
"""CUDA cannot wait for an event with a time-out: it is asked this often."""

Placed: TypeAlias = Mapping[int, tuple[torch.Tensor, int]]
"""Number of a pair -> source and its offset in the arena."""


class DeviceWork(ABC):
    """Brings sources of one device into the arena; how, say `DeviceCopies` and `DeviceChanges`.

    It reads the sources as they are when the current stream comes to the point where it is as this is made. The
    sources' memory is not kept by this: whoever makes it holds them until `wait` returned True. (Holding them says
    until when; `record_stream` would leave that to the allocator, and not every allocator of torch has it.) What it
    allocates itself, on whichever stream, it holds as long: another may be given it only when no stream uses it.

    Args:
        device: where the sources are.
        sources: what, and where to.
        chunk_bytes: bytes of a chunk.
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
        sources: Placed,
        chunk_bytes: int,
        name: PairNames,
    ) -> None:
        self.numbers = list(sources)
        self.offsets = [offset for _, offset in sources.values()]
        self.lengths = [tensor.nbytes for tensor, _ in sources.values()]
        self.nbytes = sum(self.lengths)
        self._device = device
        self._sources = sources
        self._chunk_bytes = chunk_bytes
        self._name = name
        self._taken: DeviceDigests | None = None
        self._held: list[object] = []

    @property
    @abstractmethod
    def nbytes_copied(self) -> int:
        """Bytes that were copied; known once `digests` has returned."""

    @abstractmethod
    def digests(self, arena: _C.Arena, threads: int) -> bytes:
        """The digests of what arrived, of all chunks in the order of the pairs. Only after `wait` returned True.

        Raises:
            SaveFailed: that is not what the device sent.
        """

    def hold_current(self) -> None:
        """Makes what the caller's current stream is given from now on wait for this.

        While that stream is captured into a graph, the thread itself waits: an event from outside is none of the
        graph's. Whoever captures has synchronized the device before, as `torch.cuda.graph` does, so it has passed.

        Raises:
            SaveFailed: the device failed.
        """
        with self.reported():
            if not self._device.capturing():
                self._device.hold_current(self._event)
            elif not self._event.query():
                self._event.synchronize()

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
            # A device's event can be waited for without a limit or not at all; so it is looked at in turn.
            while deadline is not None and not self._event.query():
                if time.monotonic() >= deadline:
                    return False
                time.sleep(POLL_SECONDS)
        self._held.clear()
        return True

    @contextmanager
    def enqueuing(
        self, targets: Sequence[int] = (), digest: bool = True, pinned: bool = True
    ) -> Iterator[tuple[Mapping[int, torch.Tensor], list[ChunkTable]]]:
        """For the block that enqueues on the side stream what brings the sources; nothing is in flight if it fails.

        Args:
            targets: as `DeviceDigests.take`.
            digest: whether the sources are digested.
            pinned: as `DeviceDigests`.

        Yields:
            The sources by number, each in one piece, and the lists of their chunks: with what `hold` is given, they
            are kept until the work is over.
        """
        device = self._device
        with self.reported():
            if device.capturing():
                # To wait for that stream would draw the side stream into the graph, and spoil it.
                raise RuntimeError("a CUDA graph is being captured; save before or after that")
            try:
                pieces = self._in_pieces()
                tables = self._digest(pieces, targets, pinned) if digest else []
                self.hold(pieces, tables)
                device.follow_current()
                with device.on_side():
                    if self._taken is not None:
                        self._taken.bring()
                    yield pieces, tables
                self._event = device.record()
            except BaseException:
                device.follow_current()
                device.record().synchronize()
                raise

    def hold(self, *memory: object) -> None:
        """Keeps what a stream uses until the work is over."""
        self._held += memory

    def _in_pieces(self) -> dict[int, torch.Tensor]:
        pieces = {}
        for number, (tensor, _) in self._sources.items():
            if in_one_piece(tensor):
                pieces[number] = tensor
                continue
            with self.reported(number):
                pieces[number] = self._device.as_bytes(tensor)
        self._sources = {}
        return pieces

    def _digest(
        self, pieces: Mapping[int, torch.Tensor], targets: Sequence[int], pinned: bool
    ) -> list[ChunkTable]:
        self._taken = DeviceDigests(
            self._device, self.numbers, self.offsets, self.lengths, self._chunk_bytes, self._name, pinned
        )
        return self._taken.take([piece.data_ptr() for piece in pieces.values()], targets)

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
                f"{what} could not be copied from {self._device.torch_device} into the arena: {error}; this save is "
                f"lost, the next may go well if the device recovers or has memory free"
            ) from error
