"""A load while somebody prunes: what vanishes is not damage, and the load begins again from the newest."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import count

import pytest

import dtruntime_torch as dt
from dtruntime_torch.storage import MemoryBackend, StorageBackend
from dtruntime_torch.testing.faulty_backend import Call, FaultyBackend
from tests.checkpoint.sound import CHUNK, check_equal, state_of


def manager_on(backend: StorageBackend, keep: int | None = 1) -> dt.CheckpointManager:
    return dt.CheckpointManager(backend, chunk_bytes=CHUNK, keep_last_n=keep, delta=True)


def at_call(inner: StorageBackend, at: int, action: Callable[[], object]) -> FaultyBackend:
    """Somebody else acts just before call `at`, from 0, of who uses this."""
    backend, calls = FaultyBackend(inner), count()

    async def meet(call: Call) -> object:
        if next(calls) == at:
            action()
        return await call.proceed()

    backend.when("*", "*", meet, nth=None)
    return backend


def same_job(inner: StorageBackend) -> Callable[[], object]:
    """The job that saved goes on: its old commit is removed."""
    manager = manager_on(inner)
    manager.save(state_of(1), 1)
    return lambda: manager.save(state_of(2), 2)


def job_after_it(inner: StorageBackend) -> Callable[[], object]:
    """A job that follows goes on: the commit of the one before is voided."""
    with manager_on(inner) as manager:
        manager.save(state_of(1), 1)
    following = manager_on(inner)
    following.load(state_of(0))
    return lambda: following.save(state_of(2), 2)


@pytest.mark.parametrize("who", [same_job, job_after_it])
@pytest.mark.parametrize("fresh", [False, True], ids=["in place", "fresh"])
def test_a_load_that_is_overtaken_by_a_prune_at_any_call_has_the_old_or_the_new(who, fresh):
    for at in count():
        inner = MemoryBackend()
        backend = at_call(inner, at, who(inner))
        with manager_on(backend) as reader, warnings.catch_warnings():
            warnings.simplefilter("error")
            if fresh:
                state = reader.load_checkpoint()
            else:
                state = state_of(0)
                reader.load(state)
        assert isinstance(state, dict)
        check_equal(state, state["step"])
        if len(backend.calls) <= at:
            assert at > 5
            return


@pytest.mark.parametrize("who", [same_job, job_after_it])
def test_a_verify_and_a_list_that_are_overtaken_by_a_prune_find_no_damage(who):
    for at in count():
        inner = MemoryBackend()
        backend = at_call(inner, at, who(inner))
        with manager_on(backend) as reader:
            assert reader.verify().ok
            reader.list()
        if len(backend.calls) <= at:
            return
