"""A job is killed before any call of a save, its cleaning included: the next one loads, saves and leaves nothing over."""

from __future__ import annotations

import itertools

import pytest
import torch

import dtruntime_torch as dt
from dtruntime_torch.storage import MemoryBackend, StorageBackend, run_sync
from dtruntime_torch.testing.faulty_backend import Call, FaultyBackend


class Killed(BaseException):
    """The process is no more."""


def state_of(step: int) -> dict[str, torch.Tensor]:
    return {"w": torch.arange(3000.0) + step, "b": torch.full((3,), step)}


def go_on(backend: StorageBackend, *steps: int) -> int:
    """Loads the newest, checks every bit of it, and saves; returns what was loaded."""
    manager = dt.CheckpointManager(backend, keep_last_n=1, chunk_bytes=4096)
    state = state_of(0)
    loaded = manager.load(state).step
    assert all(torch.equal(state[key], tensor) for key, tensor in state_of(loaded).items())
    for step in steps:
        manager.save(state_of(step), step)
    manager.close()
    return loaded


def begun() -> MemoryBackend:
    """A checkpoint, and what a job before it left."""
    inner = MemoryBackend()
    with dt.CheckpointManager(inner) as manager:
        manager.save(state_of(1), 1)
    run_sync(inner.write("model/step-00000002/0001-1/shard-00000-of-00001.safetensors", b"half"))
    return inner


def calls_of_a_job() -> list[tuple[str, str]]:
    backend = FaultyBackend(begun())
    go_on(backend, 2, 3)
    return backend.calls


CALLS = calls_of_a_job()


@pytest.mark.parametrize("nth", range(len(CALLS)), ids=lambda n: f"{n}-{CALLS[n][0]}")
def test_nothing_committed_is_lost_and_nothing_is_left_over(nth):
    inner = begun()
    backend = FaultyBackend(inner)
    count = itertools.count()

    async def die(call: Call) -> object:
        if next(count) >= nth:
            raise Killed
        return await call.proceed()

    backend.when("*", "*", die, nth=None)
    with pytest.raises(Killed):
        go_on(backend, 2, 3)
    committed = [n for n, call in enumerate(CALLS[:nth]) if call[0] == "create" and "/commits/" in call[1]]
    # The first create is the fence of what the job before left.
    loaded = go_on(inner, 9)
    assert loaded == (1, 1, 2, 3)[len(committed)]
    files = {entry.path.split("/")[1] for entry in run_sync(inner.list("model/step-"))}
    assert files == {"step-00000009"}
    with dt.CheckpointManager(inner) as manager:
        assert [info.step for info in manager.list()] == [9] and manager.verify().ok


def test_the_job_cleans_at_every_place():
    deleted = [path for operation, path in CALLS if operation == "delete"]
    assert any("/commits/" in path for path in deleted) and any(
        "step-00000002/0001-1" in path for path in deleted
    )
