"""Three managers that save, prune and load in one place at once, whole as they are, each storage call in its turn."""

from __future__ import annotations

from contextlib import suppress

import pytest

import dtruntime_torch as dt
from dtruntime_torch.errors import CheckpointNotFound, CommitConflict, CommitUnknown, SaveFailed
from dtruntime_torch.storage import MemoryBackend, StorageBackend
from tests.checkpoint.mortal import Dead
from tests.checkpoint.sound import CHUNK, check_equal, check_sound, state_of
from tests.checkpoint.turns import Turns
from tests.checkpoint.walk_jobs import judge
from tests.checkpoint.walk_storage import at_once


def live(backend: StorageBackend) -> None:
    """A job that starts again, as torchrun would let it, when it was replaced or a save failed."""
    for _ in range(4):
        with suppress(CommitConflict, CommitUnknown, SaveFailed):
            live_once(backend)


def live_once(backend: StorageBackend) -> None:
    """Loads, saves in full and deltas, prunes, steps back."""
    manager = dt.CheckpointManager(backend, chunk_bytes=CHUNK, keep_last_n=1, delta=True)
    step = load(manager)
    for _ in range(3):
        step += 1
        manager.save(state_of(step), step)
    manager.prune()
    step = load(manager)
    manager.save(state_of(step), step)
    manager.close()


def load(manager: dt.CheckpointManager) -> int:
    """Loads the newest, bit for bit; returns its step, 0 if there is none."""
    state = state_of(0)
    try:
        step = manager.load(state).step
    except CheckpointNotFound:
        return 0
    check_equal(state, step)
    return step


class Watched:
    """What lies on a storage, looked at after each call."""

    def __init__(self, backend: MemoryBackend) -> None:
        self._backend = backend
        self._was_live = False

    def check(self) -> None:
        listed = at_once(self._backend.list(""))
        judged = judge({entry.path: bytes(at_once(self._backend.read(entry.path))) for entry in listed})
        assert judged.broken is None, judged.broken
        assert judged.live or not self._was_live, "nothing is committed any more"
        self._was_live = bool(judged.live)


@pytest.mark.parametrize("seed", range(12))
def test_three_managers_at_once_lose_nothing(seed):
    inner = MemoryBackend()
    ends = Turns(inner, seed, Watched(inner).check).run([live, live, live])
    assert all(end is None or isinstance(end, Dead) for end in ends), ends
    found = check_sound(inner)
    with dt.CheckpointManager(inner, chunk_bytes=CHUNK, keep_last_n=1) as manager:
        if found:
            state = state_of(0)
            check_equal(state, manager.load(state).step)
        manager.save(state_of(99), 99)
    assert check_sound(inner) == [99]
