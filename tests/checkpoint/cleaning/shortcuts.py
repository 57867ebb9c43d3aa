"""What the tests of a cleaner do most."""

from __future__ import annotations

from dtruntime_torch.checkpoint.cleaning.cleaner import Cleaner
from dtruntime_torch.checkpoint.cleaning.retention import RetentionPolicy
from dtruntime_torch.checkpoint.names import CommitKey
from dtruntime_torch.storage import run_sync

KEEP_ONE = RetentionPolicy(keep_last_n=1)


def after_commit(cleaner: Cleaner, step: int, generation: int = 1, answered: bool = True) -> None:
    run_sync(cleaner.after_commit(CommitKey(generation, step), answered, 60.0))
