"""Saves whose content tells their step, each by a job of its own, and loads that check every bit."""

from __future__ import annotations

import torch

import dtruntime_torch as dt
from dtruntime_torch.storage import StorageBackend

CHUNK = 4096


def state_of(step: int) -> dict[str, torch.Tensor]:
    return {"w": torch.arange(5000.0) + step, "b": torch.full((3,), step)}


def load_newest(backend: StorageBackend) -> int:
    """Loads the newest checkpoint and checks every bit of it; returns its step."""
    with dt.CheckpointManager(backend) as manager:
        state = state_of(0)
        step = manager.load(state).step
    assert all(torch.equal(state[key], tensor) for key, tensor in state_of(step).items())
    return step


def save(backend: StorageBackend, step: int, timeout: float = 600.0) -> dt.CheckpointInfo:
    """Goes on from what is there, as a restarted job does."""
    with dt.CheckpointManager(backend, chunk_bytes=CHUNK, timeout=timeout) as manager:
        if manager.latest() is not None:
            manager.load(state_of(0))
        return manager.save(state_of(step), step)
