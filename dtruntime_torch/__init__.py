"""Checkpoints and samplers for people who train with torchrun.

The public names are loaded when they are first used, so that the command line starts without torch.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING

from dtruntime_torch import errors
from dtruntime_torch._version import __version__

if TYPE_CHECKING:
    from dtruntime_torch.build import build_info
    from dtruntime_torch.checkpoint.cleaning.prune_plan import PruneReport
    from dtruntime_torch.checkpoint.cleaning.retention import KeepBest
    from dtruntime_torch.checkpoint.dcp.pinned_stager import PinnedStager
    from dtruntime_torch.checkpoint.dcp.storage_reader import StorageReader
    from dtruntime_torch.checkpoint.dcp.storage_writer import StorageWriter
    from dtruntime_torch.checkpoint.flatten import PerRank, register_codec
    from dtruntime_torch.checkpoint.info import CheckpointInfo, LoadedCheckpoint
    from dtruntime_torch.checkpoint.saving.delta import DeltaPolicy
    from dtruntime_torch.checkpoint.saving.handle import SaveHandle, SaveMetrics
    from dtruntime_torch.checkpoint.verify import VerifyReport
    from dtruntime_torch.hook import CheckpointHook
    from dtruntime_torch.manager import CheckpointManager
    from dtruntime_torch.retry import RetryPolicy
    from dtruntime_torch.sampler import ElasticDistributedSampler
    from dtruntime_torch.storage import LocalBackend, MemoryBackend, StorageBackend
    from dtruntime_torch.writer import CheckpointWriter

if sys.modules.get("torch") is not None:
    importlib.import_module("dtruntime_torch.ops")  # they belong to torch.ops, where a user looks for them

_HOMES = {
    "CheckpointHook": "dtruntime_torch.hook",
    "CheckpointInfo": "dtruntime_torch.checkpoint.info",
    "CheckpointManager": "dtruntime_torch.manager",
    "CheckpointWriter": "dtruntime_torch.writer",
    "DeltaPolicy": "dtruntime_torch.checkpoint.saving.delta",
    "ElasticDistributedSampler": "dtruntime_torch.sampler",
    "KeepBest": "dtruntime_torch.checkpoint.cleaning.retention",
    "LoadedCheckpoint": "dtruntime_torch.checkpoint.info",
    "LocalBackend": "dtruntime_torch.storage",
    "MemoryBackend": "dtruntime_torch.storage",
    "PerRank": "dtruntime_torch.checkpoint.flatten",
    "PinnedStager": "dtruntime_torch.checkpoint.dcp.pinned_stager",
    "PruneReport": "dtruntime_torch.checkpoint.cleaning.prune_plan",
    "RetryPolicy": "dtruntime_torch.retry",
    "SaveHandle": "dtruntime_torch.checkpoint.saving.handle",
    "SaveMetrics": "dtruntime_torch.checkpoint.saving.handle",
    "StorageBackend": "dtruntime_torch.storage",
    "StorageReader": "dtruntime_torch.checkpoint.dcp.storage_reader",
    "StorageWriter": "dtruntime_torch.checkpoint.dcp.storage_writer",
    "VerifyReport": "dtruntime_torch.checkpoint.verify",
    "build_info": "dtruntime_torch.build",
    "register_codec": "dtruntime_torch.checkpoint.flatten",
}

__all__ = [
    "CheckpointHook",
    "CheckpointInfo",
    "CheckpointManager",
    "CheckpointWriter",
    "DeltaPolicy",
    "ElasticDistributedSampler",
    "KeepBest",
    "LoadedCheckpoint",
    "LocalBackend",
    "MemoryBackend",
    "PerRank",
    "PinnedStager",
    "PruneReport",
    "RetryPolicy",
    "SaveHandle",
    "SaveMetrics",
    "StorageBackend",
    "StorageReader",
    "StorageWriter",
    "VerifyReport",
    "__version__",
    "build_info",
    "errors",
    "register_codec",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
