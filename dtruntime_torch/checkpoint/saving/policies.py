"""What the user of a manager chose about its saves, as one value: made at the manager's door and handed on whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dtruntime_torch.checkpoint.cleaning.retention import KEEP_ALL, RetentionPolicy
from dtruntime_torch.checkpoint.saving.delta import DeltaPolicy
from dtruntime_torch.retry import RetryPolicy

OnFailure = Literal["warn", "raise"]
ONCE = RetryPolicy(attempts=1)


@dataclass(frozen=True, slots=True)
class SavePolicies:
    """How checkpoints are saved, and which of them stay.

    Attributes:
        chunk_bytes: bytes of a chunk.
        retention: which checkpoints stay.
        delta: when to save in full; None: always.
        retry: how often a save that storage failed is tried.
        on_failure: what becomes, at the next save, of a failure that nobody was told of.
    """

    chunk_bytes: int = 1 << 20
    retention: RetentionPolicy = KEEP_ALL
    delta: DeltaPolicy | None = None
    retry: RetryPolicy = ONCE
    on_failure: OnFailure = "warn"
