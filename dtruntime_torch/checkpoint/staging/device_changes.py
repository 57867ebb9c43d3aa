"""Only the chunks of a device's tensors that changed, into the arena: found there, copied by a kernel, checked here.

The device digests all chunks, compares them with those of what the arena holds, and a kernel of few blocks writes the
ones that differ straight to their places in the pinned arena: all in stream order, with no decision of the host in
between. What crosses to the host is what changed; reading it costs the device one pass over all.

The digests that are known lie in pinned memory of the host, as those that it takes, where its kernels read and write
them: so the known ones are always those of this staging's arena, and the new ones come back with no copy of their own.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from dtruntime_torch import _C
from dtruntime_torch.checkpoint.specs import DIGEST_BYTES
from dtruntime_torch.checkpoint.staging.device import Device
from dtruntime_torch.checkpoint.staging.device_work import DeviceWork, Placed
from dtruntime_torch.checkpoint.staging.sources import PairNames
from dtruntime_torch.ops import CHUNKS_LIMIT


def comparable(device: Device, arena: _C.Arena, lengths: Iterable[int], chunk_bytes: int) -> bool:
    """Whether `DeviceChanges` can take sources of a device: its kernels reach the arena, and one list their chunks.

    Args:
        device: where they are.
        arena: where to.
        lengths: their bytes.
        chunk_bytes: bytes of a chunk.
    """
    count = sum(-(-length // chunk_bytes) for length in lengths)
    return device.can_write(arena) and count < CHUNKS_LIMIT


class DeviceChanges(DeviceWork):
    """The changes of one staging on one device. `DeviceWork` says what they read, and when.

    Args:
        device: where the sources are.
        arena: where to.
        sources: number of the pair -> source and its offset in the arena; they are `comparable`.
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
        sources: Placed,
        known: bytes,
        chunk_bytes: int,
        name: PairNames,
    ) -> None:
        super().__init__(device, sources, chunk_bytes, name)
        self._known = known
        self.nbytes_changed = 0
        with self.enqueuing([arena.address + offset for offset in self.offsets]) as (_, tables):
            (chunks,) = tables
            assert self._taken is not None
            before = device.host_memory(len(known))
            before[:] = torch.frombuffer(bytearray(known), dtype=torch.uint8)
            changed, changed_count = chunks.find_changed(self._taken.sent, before)
            self.hold(before, changed, changed_count)
            chunks.gather(changed, changed_count, None, min(chunk_bytes, max(self.lengths)))

    @property
    def nbytes_copied(self) -> int:
        return self.nbytes_changed

    def digests(self, arena: _C.Arena, threads: int) -> bytes:
        """Those that the device took of what it sent, if that arrived; of the others the host looks at nothing."""
        assert self._taken is not None
        sent, known = self._taken.sent, torch.frombuffer(bytearray(self._known), dtype=torch.uint8)
        # By the tables, not by the device's list: so a change that it did not copy is found, too.
        rows = (sent != known).view(-1, DIGEST_BYTES).any(dim=1).nonzero().flatten().tolist()
        self.nbytes_changed = self._taken.check_rows(arena, rows, threads)
        self.chunks_skipped = self._taken.count - len(rows)
        return bytes(sent.numpy())
