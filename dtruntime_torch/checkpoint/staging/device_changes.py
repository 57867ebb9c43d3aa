"""Only the chunks of a device's tensors that changed, into the arena: found there, copied by a kernel, checked here.

The device digests all chunks, compares them with those of what the arena holds, and a kernel of few blocks writes the
ones that differ straight to their places in the pinned arena: all behind one another on the side stream, with no
decision of the host in between. What crosses to the host is what changed; reading it costs the device one pass over all.

The digests that are known and those that it takes lie in pinned memory of the host, where its kernels read and write
them: so the known ones are always those of this staging's arena, and the new ones come back with no copy of their own.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from itertools import accumulate

import torch

from dtruntime_torch import _C
from dtruntime_torch.checkpoint.specs import DIGEST_BYTES
from dtruntime_torch.checkpoint.staging.chunk_table import ChunkTable
from dtruntime_torch.checkpoint.staging.device import Device, in_one_piece
from dtruntime_torch.checkpoint.staging.device_work import DeviceWork
from dtruntime_torch.checkpoint.staging.sources import PairNames
from dtruntime_torch.errors import SaveFailed
from dtruntime_torch.ops import CHUNKS_LIMIT


def comparable(
    device: Device, arena: _C.Arena, sources: Mapping[int, torch.Tensor], chunk_bytes: int
) -> list[int]:
    """Which sources of a device `DeviceChanges` can take: none, where its kernels do not reach the arena.

    Args:
        device: where they are.
        arena: where to.
        sources: number of the pair -> source.
        chunk_bytes: bytes of a chunk.
    """
    in_reach = [number for number, tensor in sources.items() if in_one_piece(tensor)]
    count = sum(-(-sources[number].nbytes // chunk_bytes) for number in in_reach)
    return in_reach if device.can_write(arena) and count < CHUNKS_LIMIT else []


class DeviceChanges(DeviceWork):
    """The changes of one staging on one device. `DeviceWork` says what they read, and when.

    Args:
        device: where the sources are.
        arena: where to.
        sources: number of the pair -> source and its offset in the arena; `comparable` gives them.
        known: digests of what the arena holds at their places, in their order.
        chunk_bytes: bytes of a chunk.
        name: names pairs in a message.

    Raises:
        SaveFailed: something was refused. Nothing is in flight then.
    """

    def __init__(
        self,
        device: Device,
        arena: _C.Arena,
        sources: Mapping[int, tuple[torch.Tensor, int]],
        known: bytes,
        chunk_bytes: int,
        name: PairNames,
    ) -> None:
        super().__init__(device, sources, name)
        self._known = known
        self._chunk_bytes = chunk_bytes
        counts = [-(-length // chunk_bytes) for length in self.lengths]
        self._firsts = list(accumulate(counts, initial=0))  # rows of the first chunk of each source
        self.nbytes_changed = 0
        with self.enqueuing():
            before, self._sent = device.host_memory(2 * len(known)).view(2, -1).unbind()
            before[:] = torch.frombuffer(bytearray(known), dtype=torch.uint8)
            self._sent.zero_()  # no digests that were there before are taken for new ones
            chunks = ChunkTable(
                device,
                [tensor.data_ptr() for tensor, _ in sources.values()],
                self.lengths,
                chunk_bytes,
                [arena.address + offset for offset in self.offsets],
            )
            chunks.digest(self._sent)
            changed, changed_count = chunks.find_changed(self._sent, before)
            chunks.gather(changed, changed_count, None, min(chunk_bytes, max(self.lengths)))
        # The kernels use it until the event has passed.
        self._scratch: tuple[object, ...] = (chunks, before, changed, changed_count)

    @property
    def nbytes_copied(self) -> int:
        return self.nbytes_changed

    def wait(self, deadline: float | None) -> bool:
        """As `DeviceWork.wait`; gives back what the kernels needed."""
        arrived = super().wait(deadline)
        if arrived:
            self._scratch = ()
        return arrived

    def digests(self, arena: _C.Arena, chunk_bytes: int, threads: int) -> bytes:
        """Those that the device took of what it sent, if that arrived; of the others the host looks at nothing."""
        known = torch.frombuffer(bytearray(self._known), dtype=torch.uint8)
        # By the tables, not by the device's list: so a change that it did not copy is found, too.
        rows = (self._sent != known).view(-1, DIGEST_BYTES).any(dim=1).nonzero().flatten().tolist()
        places = [self._place_of(row) for row in rows]
        offsets, lengths = [offset for _, offset, _ in places], [length for _, _, length in places]
        arrived = _C.digest_ranges(arena, offsets, lengths, chunk_bytes, threads)
        sent = bytes(self._sent.numpy())
        for at, (row, (pair, offset, length)) in enumerate(zip(rows, places, strict=True)):
            of_device, of_host = _row(sent, row), _row(arrived, at)
            if of_device != of_host:
                raise SaveFailed(
                    f"{self._name([pair])} did not arrive from {self._where} as it was sent: bytes {offset} to "
                    f"{offset + length} of the arena have the digest {of_host.hex()}, and had {of_device.hex()} on "
                    f"the device; it was overwritten while it was staged, or the transfer failed. This save is "
                    f"lost, the next copies all"
                )
        self.nbytes_changed = sum(lengths)
        self.chunks_skipped = len(sent) // DIGEST_BYTES - len(rows)
        return sent

    def _place_of(self, row: int) -> tuple[int, int, int]:
        """Number of the pair, offset in the arena and length of the chunk whose digest is in that row."""
        at = bisect_right(self._firsts, row) - 1
        start = (row - self._firsts[at]) * self._chunk_bytes
        return self.numbers[at], self.offsets[at] + start, min(self._chunk_bytes, self.lengths[at] - start)


def _row(table: bytes, row: int) -> bytes:
    return table[row * DIGEST_BYTES : (row + 1) * DIGEST_BYTES]
