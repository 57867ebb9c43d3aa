"""What the sources on a device were at the call: its own digests of them, and whether that is what arrived.

A copy runs on a side stream, some time after the call. Nothing but this shows that a source was overwritten before it
was copied: by work on a stream that nobody made wait, or by another thread.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import torch

from dtruntime_torch import _C
from dtruntime_torch.checkpoint.specs import DIGEST_BYTES
from dtruntime_torch.checkpoint.staging.chunk_table import ChunkTable, cut_lists
from dtruntime_torch.checkpoint.staging.device import Device
from dtruntime_torch.checkpoint.staging.sources import PairNames
from dtruntime_torch.errors import TornSnapshot
from dtruntime_torch.ops import CHUNKS_LIMIT


class DeviceDigests:
    """The digests of some sources, a row for each chunk.

    The kernels write them to pinned memory of the host, so that they need no copy of their own. Where an arena could not
    be pinned, that is not counted on either: they go to the device's memory, and are copied as the sources are.

    Args:
        device: where the sources are.
        numbers: of their pairs.
        offsets: their first bytes in the arena.
        lengths: their bytes.
        chunk_bytes: bytes of a chunk.
        name: names pairs in a message.
        pinned: whether memory of the host can be pinned.

    Attributes:
        count: of rows.
        sent: the rows, once the work is over; zero if the kernels did not run.
    """

    def __init__(
        self,
        device: Device,
        numbers: Sequence[int],
        offsets: Sequence[int],
        lengths: Sequence[int],
        chunk_bytes: int,
        name: PairNames,
        pinned: bool,
    ) -> None:
        self._device = device
        self._numbers = numbers
        self._offsets = offsets
        self._lengths = lengths
        self._chunk_bytes = chunk_bytes
        self._name = name
        counts = (-(-length // chunk_bytes) for length in lengths)
        self._firsts = list(accumulate(counts, initial=0))  # rows of the first chunk of each source
        self.count = self._firsts[-1]
        nbytes = DIGEST_BYTES * self.count
        if pinned:
            self.sent = self._rows = device.host_memory(nbytes)
        else:
            self.sent = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
            self._rows = torch.empty(nbytes, dtype=torch.uint8, device=device.torch_device)
        self._rows.zero_()  # no digests that were there before are taken for new ones

    def take(self, addresses: Sequence[int], targets: Sequence[int] = ()) -> list[ChunkTable]:
        """Enqueues the kernels that digest the sources on the stream that is current.

        Args:
            addresses: of the sources' bytes, each in one piece.
            targets: addresses where chunks may be gathered; none if they will not be.

        Returns:
            The lists of chunks that the kernels work on, to be held until these are done. More than one only if
            there are more chunks than one can have.
        """
        tables: list[ChunkTable] = []
        row = 0
        for pieces in cut_lists(self._lengths, self._chunk_bytes, CHUNKS_LIMIT - 1):
            table = ChunkTable(
                self._device,
                [addresses[number] + start for number, start, _ in pieces],
                [length for _, _, length in pieces],
                self._chunk_bytes,
                [targets[number] + start for number, start, _ in pieces] if targets else (),
            )
            tables.append(table)
            table.digest(self._rows[DIGEST_BYTES * row :])
            row += table.count
        return tables

    def bring(self) -> None:
        """Enqueues on the side stream the copy to the host, if it takes one."""
        if self._rows is not self.sent:
            self._device.copy(self.sent, self._rows)

    def check_all(self, arena: _C.Arena, threads: int) -> bytes:
        """The host's digests of all that arrived, which are those of the device.

        Raises:
            TornSnapshot: they are not; it names the first pair whose bytes are others.
        """
        arrived = _C.digest_ranges(arena, self._offsets, self._lengths, self._chunk_bytes, threads)
        if self._sent_bytes() != arrived:
            self._compare(range(self.count), arrived)
        return arrived

    def check_rows(self, arena: _C.Arena, rows: Sequence[int], threads: int) -> int:
        """As `check_all`, of some chunks. Returns how many bytes these are."""
        places = [self._place_of(row) for row in rows]
        offsets, lengths = [offset for _, offset, _ in places], [length for _, _, length in places]
        self._compare(rows, _C.digest_ranges(arena, offsets, lengths, self._chunk_bytes, threads))
        return sum(lengths)

    def _sent_bytes(self) -> bytes:
        return bytes(self.sent.numpy())

    def _compare(self, rows: Sequence[int], arrived: bytes) -> None:
        sent = self._sent_bytes()
        for at, row in enumerate(rows):
            of_device, of_host = _row(sent, row), _row(arrived, at)
            if of_device != of_host:
                pair, offset, length = self._place_of(row)
                raise TornSnapshot(
                    f"{self._name([pair])} did not arrive from {self._device.torch_device} as it was sent: bytes "
                    f"{offset} to {offset + length} of the arena have the digest {of_host.hex()}, and had "
                    f"{of_device.hex()} on the device; it was overwritten while it was staged, or the transfer "
                    f"failed. This save is lost, the next copies all"
                )

    def _place_of(self, row: int) -> tuple[int, int, int]:
        """Number of the pair, offset in the arena and length of the chunk whose digest is in that row."""
        at = bisect_right(self._firsts, row) - 1
        start = (row - self._firsts[at]) * self._chunk_bytes
        return self._numbers[at], self._offsets[at] + start, min(self._chunk_bytes, self._lengths[at] - start)


def _row(table: bytes, row: int) -> bytes:
    return table[row * DIGEST_BYTES : (row + 1) * DIGEST_BYTES]
