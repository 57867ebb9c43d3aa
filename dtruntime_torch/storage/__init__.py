"""Where checkpoints lie: the seam, and the backends behind it."""

from __future__ import annotations

from dtruntime_torch.storage.backend import Entry, StorageBackend
from dtruntime_torch.storage.local import LocalBackend
from dtruntime_torch.storage.memory import MemoryBackend
from dtruntime_torch.storage.sync import run_sync
from dtruntime_torch.storage.targets import backend_for

__all__ = ["StorageBackend", "Entry", "LocalBackend", "MemoryBackend", "backend_for", "run_sync"]
