"""The list of chunks that the kernels work on, in device memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dtruntime_torch.gpucheck.device import Bench
from dtruntime_torch.ops import CHUNK_RECORD_BYTES, QUEUE_BYTES


class ChunkTable:
    """Pieces of device memory, cut into chunks.

    Args:
        bench: where.
        addresses: of each piece; who makes the table keeps the memory.
        lengths: bytes of each.
        chunk_bytes: of a chunk, counted from the start of its piece.
        targets: addresses where a copy of each goes; empty if nothing is copied.

    Attributes:
        count: how many chunks these are.
    """

    def __init__(
        self,
        bench: Bench,
        addresses: Sequence[int],
        lengths: Sequence[int],
        chunk_bytes: int,
        targets: Sequence[int] = (),
    ) -> None:
        self._bench = bench
        self.count = sum(-(-length // chunk_bytes) for length in lengths)
        self._chunks = self._empty(self.count * CHUNK_RECORD_BYTES, torch.uint8)
        self._queue = self._empty(QUEUE_BYTES, torch.uint8)
        bench.native.cuda_list_chunks(
            addresses,
            lengths,
            targets,
            chunk_bytes,
            self._chunks.data_ptr(),
            bench.index,
            bench.stream(),
        )

    def digest(self, into: torch.Tensor | None = None, copy: bool = False) -> torch.Tensor:
        """Enqueues the kernel that digests them all.

        Args:
            into: where the digests go; None for fresh memory.
            copy: copies each chunk to its target in the same pass.

        Returns:
            (count, 2) int64, 16 canonical bytes a row.
        """
        digests = self._empty((self.count, 2), torch.int64) if into is None else into
        self._bench.native.cuda_digest(
            self._chunks.data_ptr(),
            self.count,
            digests.data_ptr(),
            self._queue.data_ptr(),
            self._bench.index,
            self._bench.stream(),
            copy,
        )
        return digests

    def gather(
        self, changed: torch.Tensor, changed_count: torch.Tensor, staging: torch.Tensor | None, stride: int
    ) -> None:
        """Enqueues the kernel that copies the chunks which `changed` names.

        Args:
            changed: int32, numbers of chunks.
            changed_count: one int32: how many of them count.
            staging: the i-th goes to byte `i * stride` of it; None: each to its own target.
            stride: bytes; no chunk is longer.
        """
        self._bench.native.cuda_gather_changed(
            self._chunks.data_ptr(),
            changed.data_ptr(),
            changed_count.data_ptr(),
            changed.numel(),
            0 if staging is None else staging.data_ptr(),
            stride,
            self._bench.index,
            self._bench.stream(),
        )

    def _empty(self, shape: int | tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self._bench.torch_device)
