"""The leader dies before and after each of its storage calls: what was committed is there, and the next job saves."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import pytest

import dtruntime_torch as dt
from dtruntime_torch.storage import MemoryBackend, StorageBackend, run_sync
from tests.checkpoint.mortal import Dead, Mortal
from tests.checkpoint.sound import CHUNK, check_equal, check_sound, state_of

Life = Callable[[StorageBackend], None]


def manager_on(backend: StorageBackend) -> dt.CheckpointManager:
    return dt.CheckpointManager(backend, chunk_bytes=CHUNK, keep_last_n=None)


def save_first(backend: StorageBackend) -> None:
    with manager_on(backend) as manager:
        manager.save(state_of(1), 1)


def load_and_save(backend: StorageBackend) -> None:
    with manager_on(backend) as manager:
        manager.load(state_of(0))
        manager.save(state_of(3), 3)


def save_twice(backend: StorageBackend) -> None:
    with manager_on(backend) as manager:
        manager.load(state_of(0))
        manager.save(state_of(3), 3)
        manager.save(state_of(4), 4)


def save_deltas_and_prune(backend: StorageBackend) -> None:
    with dt.CheckpointManager(backend, chunk_bytes=CHUNK, keep_last_n=2, delta=True) as manager:
        manager.load(state_of(0))
        for step in (3, 4, 5):
            manager.save(state_of(step), step)
        manager.load(state_of(0))
        manager.prune()


# A life, and the steps that are committed before it.
LIVES: dict[str, tuple[Life, tuple[int, ...]]] = {
    "the first save": (save_first, ()),
    "a load and a save": (load_and_save, (1, 2)),
    "two saves": (save_twice, (1, 2)),
    "deltas, retention and a prune": (save_deltas_and_prune, (1, 2)),
}


def world_before(steps: tuple[int, ...]) -> MemoryBackend:
    inner = MemoryBackend()
    if steps:
        with manager_on(inner) as manager:
            for step in steps:
                manager.save(state_of(step), step)
    return inner


def live_and_die(life: Life, backend: Mortal) -> bool:
    """Whether it died."""
    try:
        life(backend)
    except Dead:
        return True
    return False


def calls_of(life: Life, steps: tuple[int, ...]) -> int:
    backend = Mortal(world_before(steps))
    life(backend)
    return len(backend.calls)


def deaths(life: Life, steps: tuple[int, ...], every: int = 1) -> list[tuple[int, bool]]:
    """Before each call and after the last: a rank has one call at a time, so after one is before the next."""
    calls = calls_of(life, steps)
    return [*((at, False) for at in range(1, calls + 1, every)), (calls, True)]


@pytest.mark.parametrize("name", LIVES)
def test_a_leader_that_dies_at_any_call_loses_nothing_and_the_next_job_saves(name):
    life, steps = LIVES[name]
    for at, after in deaths(life, steps):
        inner = world_before(steps)
        assert live_and_die(life, Mortal(inner, at, after)), f"it lived beyond call {at}"
        found = check_sound(inner)
        assert not steps or found[-1] >= steps[-1], f"call {at}: what was committed is gone"
        with manager_on(inner) as manager:
            with suppress(dt.errors.CheckpointNotFound):
                manager.load(state_of(0))
            manager.save(state_of(9), 9)
            state = state_of(0)
            assert manager.load(state).step == 9
            check_equal(state, 9)
        assert check_sound(inner)[-1] == 9


def test_what_a_dead_leader_left_is_gone_after_the_next_jobs_save():
    life, steps = LIVES["deltas, retention and a prune"]
    for at, after in deaths(life, steps, every=2):
        inner = world_before(steps)
        live_and_die(life, Mortal(inner, at, after))
        with dt.CheckpointManager(inner, chunk_bytes=CHUNK, keep_last_n=1) as manager:
            manager.load(state_of(0))
            path = manager.save(state_of(9), 9).path
        left = {entry.path.rpartition("/")[0] for entry in run_sync(inner.list("model/step-"))}
        assert left == {path}, f"call {at}"
