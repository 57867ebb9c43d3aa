"""The list of chunks that the kernels work on, in device memory, and the calls that work on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from dtruntime_torch.ops import CHUNK_RECORD_BYTES, QUEUE_BYTES


class NativeCalls(Protocol):
    """The functions of `_C` for a device; `_C.pyi` explains them. `_C` itself is one of these."""

    def cuda_list_chunks(
        self,
        sources: Sequence[int],
        lengths: Sequence[int],
        targets: Sequence[int],
        chunk_bytes: int,
        chunks: int,
        device: int,
        stream: int,
    ) -> None: ...
    def cuda_digest(
        self,
        chunks: int,
        count: int,
        digests: int,
        queue: int,
        device: int,
        stream: int,
        copy: bool = False,
    ) -> None: ...
    def cuda_find_changed(
        self,
        digests: int,
        known: int,
        count: int,
        changed: int,
        changed_count: int,
        device: int,
        stream: int,
    ) -> None: ...
    def cuda_gather_changed(
        self,
        chunks: int,
        changed: int,
        changed_count: int,
        most: int,
        staging: int,
        stride: int,
        device: int,
        stream: int,
    ) -> None: ...
    def cuda_read(self, data: int, nbytes: int, sink: int, device: int, stream: int) -> None: ...


class Place(Protocol):
    """Where native calls go.

    Attributes:
        torch_device: where tensors go.
        index, native: its number for the native calls, and these.
    """

    @property
    def torch_device(self) -> torch.device: ...
    @property
    def index(self) -> int: ...
    @property
    def native(self) -> NativeCalls: ...

    def stream(self) -> int:
        """The current stream, for the native calls."""


def cut_lists(lengths: Sequence[int], chunk_bytes: int, most: int) -> Iterator[list[tuple[int, int, int]]]:
    """Cuts pieces of memory so that no list of them has more chunks than a table can have.

    Args:
        lengths: bytes of each piece.
        chunk_bytes: of a chunk.
        most: chunks of a list.

    Yields:
        (number of the piece, first byte, bytes) of what is in a list, in the order of the pieces.

    Example:
        >>> list(cut_lists([10, 25], 10, 2))
        [[(0, 0, 10), (1, 0, 10)], [(1, 10, 15)]]
    """
    listed: list[tuple[int, int, int]] = []
    room = most
    for number, length in enumerate(lengths):
        start = 0
        while start < length:
            nbytes = min(length - start, room * chunk_bytes)
            listed.append((number, start, nbytes))
            start += nbytes
            room -= -(-nbytes // chunk_bytes)
            if room == 0:
                yield listed
                listed, room = [], most
    if listed:
        yield listed


class ChunkTable:
    """Pieces of device memory, cut into chunks.

    Args:
        place: where.
        addresses: of each piece; who makes the table keeps the memory.
        lengths: bytes of each.
        chunk_bytes: of a chunk, counted from the start of its piece.
        targets: addresses where a copy of each goes; empty if nothing is copied.

    Attributes:
        count: how many chunks these are, below `ops.CHUNKS_LIMIT`.
    """

    def __init__(
        self,
        place: Place,
        addresses: Sequence[int],
        lengths: Sequence[int],
        chunk_bytes: int,
        targets: Sequence[int] = (),
    ) -> None:
        self._place = place
        self.count = sum(-(-length // chunk_bytes) for length in lengths)
        self._chunks = self._empty(self.count * CHUNK_RECORD_BYTES, torch.uint8)
        self._queue = self._empty(QUEUE_BYTES, torch.uint8)
        place.native.cuda_list_chunks(
            addresses,
            lengths,
            targets,
            chunk_bytes,
            self._chunks.data_ptr(),
            place.index,
            place.stream(),
        )

    def digest(self, into: torch.Tensor | None = None, copy: bool = False) -> torch.Tensor:
        """Enqueues the kernel that digests them all.

        Args:
            into: where the digests go, 16 canonical bytes each; None for fresh memory.
            copy: copies each chunk to its target in the same pass.

        Returns:
            `into`, or (count, 2) int64.
        """
        digests = self._empty((self.count, 2), torch.int64) if into is None else into
        self._place.native.cuda_digest(
            self._chunks.data_ptr(),
            self.count,
            digests.data_ptr(),
            self._queue.data_ptr(),
            self._place.index,
            self._place.stream(),
            copy,
        )
        return digests

    def find_changed(self, digests: torch.Tensor, known: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Enqueues the kernel that compares digests with known ones, and brings these up to date.

        Args:
            digests: what `digest` returned.
            known: as many bytes that the device can reach, equal to `digests` afterwards.

        Returns:
            What `gather` takes: the numbers of the chunks that differ, and how many they are.
        """
        changed = self._empty(self.count, torch.int32)
        changed_count = self._empty(1, torch.int32)
        self._place.native.cuda_find_changed(
            digests.data_ptr(),
            known.data_ptr(),
            self.count,
            changed.data_ptr(),
            changed_count.data_ptr(),
            self._place.index,
            self._place.stream(),
        )
        return changed, changed_count

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
        self._place.native.cuda_gather_changed(
            self._chunks.data_ptr(),
            changed.data_ptr(),
            changed_count.data_ptr(),
            changed.numel(),
            0 if staging is None else staging.data_ptr(),
            stride,
            self._place.index,
            self._place.stream(),
        )

    def _empty(self, shape: int | tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self._place.torch_device)
