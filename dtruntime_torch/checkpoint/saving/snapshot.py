"""A state as it was when a save was called: what its first half hands to the second."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dtruntime_torch import _C
from dtruntime_torch.checkpoint.names import Attempt
from dtruntime_torch.checkpoint.objects import Json
from dtruntime_torch.checkpoint.saving.delta import Base
from dtruntime_torch.checkpoint.saving.handle import SaveMetrics
from dtruntime_torch.checkpoint.saving.layout import Layout
from dtruntime_torch.checkpoint.specs import Members, SavePlan, digest_length
from dtruntime_torch.checkpoint.staging.capture import Capture
from dtruntime_torch.errors import SaveFailed


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What one rank saves.

    Attributes:
        key: the save's prefix in the Store.
        step: the training step.
        members: who holds what.
        plan: what this rank writes.
        layout: where it lies in `image`.
        image: the data file of a full save, which is there when `capture` says so; unchanged until the save has ended.
        capture: fills the image, perhaps still, and knows the digests of its chunks, in the order of the layout.
        chunk_bytes: bytes of a chunk.
        values: fqn -> encoded object, for the objects of the plan.
        metadata: the user's.
        metrics: to be filled in.
        attempt: where it goes, if that was opened before it was taken.
        base: this rank's part of the last committed save, if the ranks held the same then.
        delta: only what differs from the base is to be written. Of the image only what differed from itself was
            copied: the rest lies there since an earlier save.
    """

    key: str
    step: int
    members: Members
    plan: SavePlan
    layout: Layout
    image: memoryview
    capture: Capture
    chunk_bytes: int
    values: Mapping[str, Json]
    metadata: Json
    metrics: SaveMetrics
    attempt: Attempt | None
    base: Base | None = None
    delta: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(slot.nbytes for slot in self.layout.slots)

    def check_image(self, digests: bytes) -> None:
        """Digests what lies in the image again.

        Args:
            digests: what they were.

        Raises:
            SaveFailed: memory is no longer what was put there.
        """
        slots = self.layout.slots
        found = _C.digest_ranges(
            self.image, [slot.offset for slot in slots], [slot.nbytes for slot in slots], self.chunk_bytes
        )
        if found == digests:
            return
        start = 0
        for slot in slots:
            stop = start + digest_length(slot.nbytes, self.chunk_bytes)
            if found[start:stop] != digests[start:stop]:
                raise SaveFailed(
                    f"staging memory that holds {slot.item.spec.fqn!r} changed since it was filled, so this save is "
                    f"given up; suspect the memory of this machine, or code that writes where it should not"
                )
            start = stop
