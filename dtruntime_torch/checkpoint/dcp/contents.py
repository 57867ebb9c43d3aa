"""What a folder holds, as its reader knows it once the manifests were read, and as DCP is told of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from dtruntime_torch.checkpoint.loading.load_plan import SavedState, SavedTensor
from dtruntime_torch.checkpoint.manifest import Part, TensorEntry
from dtruntime_torch.checkpoint.specs import Shape
from dtruntime_torch.errors import CorruptCheckpoint
from dtruntime_torch.storage.backend import ReadsChunks, StorageBackend

Stored = tuple[int, int]
"""Number of a part, position among its tensors."""


@dataclass(frozen=True, slots=True)
class Contents:
    """A checkpoint of which the data is not read yet.

    Attributes:
        backend: where its files have the paths that the records name.
        reader: the same, as what reads chunks.
        name: of the checkpoint in the records.
        where: the folder, for messages.
        parts: number -> part.
        saved: what they hold, by name.
        planner_data: what the planner that saved it left.
        told: makes an error name the files as they are called in the folder.
        raw_bytes: what is kept as bytes is what a planner handed over, and not a Python value.
        has_digests: its files may be checked.
        is_current: whether it is still what the folder holds; None where nothing replaces it in place.
        sound: paths of the files whose length and header were checked; added to.
    """

    backend: StorageBackend
    reader: ReadsChunks
    name: str
    where: str
    parts: Mapping[int, Part]
    saved: SavedState
    planner_data: object
    told: Callable[[CorruptCheckpoint], CorruptCheckpoint]
    raw_bytes: bool
    has_digests: bool = True
    is_current: Callable[[], Awaitable[bool]] | None = None
    sound: set[str] = field(default_factory=set)

    def entry(self, stored: Stored) -> TensorEntry:
        """The stored shard of that place."""
        return self.parts[stored[0]].tensors[stored[1]]

    def metadata(self) -> Metadata:
        """What DCP's planners plan a load by."""
        leaves: list[tuple[int, str, STORAGE_TYPES]] = []
        for fqn, tensor in self.saved.tensors.items():
            leaves.append((tensor.index, fqn, self._tensor_metadata(tensor)))
        for fqn, value in self.saved.objects.items():
            leaves.append((value.index, fqn, BytesStorageMetadata()))
        leaves.sort(key=lambda leaf: leaf[0])
        return Metadata(
            {fqn: found for _, fqn, found in leaves}, planner_data=self.planner_data, storage_data=self
        )

    def find(self, fqn: str, offsets: Sequence[int]) -> Stored | None:
        """The stored shard that begins there; of several the one that holds something."""
        found = [place for place in self._shards(fqn) if self.entry(place).offsets == tuple(offsets)]
        return max(found, key=lambda place: self.entry(place).nbytes, default=None)

    def _shards(self, fqn: str) -> tuple[Stored, ...]:
        tensor = self.saved.tensors.get(fqn)
        return () if tensor is None else tensor.shards

    def _tensor_metadata(self, tensor: SavedTensor) -> STORAGE_TYPES:
        if tensor.is_bytes:
            return BytesStorageMetadata()
        boxes: dict[tuple[Shape, Shape], None] = {}
        for place in tensor.shards:
            entry = self.entry(place)
            boxes.setdefault((entry.offsets, entry.shape))
        return TensorStorageMetadata(
            TensorProperties(dtype=getattr(torch, tensor.dtype)),
            torch.Size(tensor.global_shape),
            [ChunkStorageMetadata(torch.Size(offsets), torch.Size(shape)) for offsets, shape in boxes],
        )
