"""What has to hold of a storage whatever happened there: every commit loads bit for bit, and saving goes on."""

from __future__ import annotations

import torch

import dtruntime_torch as dt
from dtruntime_torch.checkpoint.verify import verify
from dtruntime_torch.storage import StorageBackend, run_sync

CHUNK = 4096
FLOATS = CHUNK // 4


def state_of(step: int) -> dict[str, object]:
    """A few chunks, of which another one changes from step to step; a small tensor and a value that always do."""
    chunks = torch.zeros(6, FLOATS)
    for earlier in range(1, step + 1):
        chunks[earlier % 6] = earlier
    return {"chunks": chunks, "small": torch.full((3,), float(step)), "step": step}


def check_equal(loaded: object, step: int) -> None:
    """Checks that a state is that of a step, bit for bit."""
    expected = state_of(step)
    assert isinstance(loaded, dict) and loaded.keys() == expected.keys()
    assert loaded["step"] == step
    for name in ("chunks", "small"):
        assert torch.equal(loaded[name], expected[name]), f"{name} of step {step}"


def check_sound(backend: StorageBackend) -> list[int]:
    """Checks everything that is committed; returns the steps, oldest first."""
    with dt.CheckpointManager(backend, keep_last_n=None) as manager:
        infos = manager.list()
        for info in infos:
            assert run_sync(verify(backend, info.name, info.key)).ok
            # Of a step that two generations saved this is the newer.
            check_equal(manager.load_checkpoint(step=info.step), info.step)
    return [info.step for info in infos]
