"""A load during which something happens at one storage call, at each in turn; beside the state and straight into place.

What vanishes because somebody prunes is not damage, and the load begins again from the newest.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest

import dtruntime_torch as dt
from dtruntime_torch.checkpoint.loading import home_reader, landings
from dtruntime_torch.checkpoint.loading.load_together import HALF_FILLED
from dtruntime_torch.errors import DTRuntimeError
from dtruntime_torch.storage import LocalBackend, MemoryBackend, StorageBackend, run_sync
from dtruntime_torch.testing.faulty_backend import Call, FaultyBackend, not_done
from tests.checkpoint.sound import CHUNK, check_equal, state_of


@pytest.fixture(params=["memory", "local"])
def places(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[StorageBackend]:
    """Empty storages without end: loads from a local one go straight into place, each chunk by a call of its own."""
    monkeypatch.setattr(landings, "PIECE_BYTES", 1)
    monkeypatch.setattr(home_reader, "CALL_BYTES", 1)
    local = request.param == "local"
    return (LocalBackend(tmp_path / str(n)) if local else MemoryBackend() for n in count())


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


def chunk_calls(backend: FaultyBackend) -> int:
    """How many reads went straight into place."""
    return sum(operation == "read_chunks" for operation, _ in backend.calls)


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
def test_a_load_that_is_overtaken_by_a_prune_at_any_call_has_the_old_or_the_new(places, who, fresh):
    for at, inner in enumerate(places):
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
            assert (chunk_calls(backend) > 2) == (isinstance(inner, LocalBackend) and not fresh)
            return


@pytest.mark.parametrize("who", [same_job, job_after_it])
def test_a_verify_and_a_list_that_are_overtaken_by_a_prune_find_no_damage(places, who):
    for at, inner in enumerate(places):
        backend = at_call(inner, at, who(inner))
        with manager_on(backend) as reader:
            assert reader.verify().ok
            reader.list()
        if len(backend.calls) <= at:
            return


def flip(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def cut(data: bytes) -> bytes:
    return data[:-1]


def two_steps(inner: StorageBackend) -> str:
    """Two full checkpoints; returns the path of the newer one's data."""
    with dt.CheckpointManager(inner, chunk_bytes=CHUNK) as manager:
        for step in (1, 2):
            manager.save(state_of(step), step)
    (path,) = [e.path for e in run_sync(inner.list("model/step-00000002/")) if "safetensors" in e.path]
    return path


@pytest.mark.parametrize("change", [flip, cut, None], ids=["flipped", "cut", "deleted"])
def test_a_load_during_which_data_are_damaged_at_any_call_has_one_step_whole_and_says_which(places, change):
    steps = []
    for at, inner in enumerate(places):
        path = two_steps(inner)

        def damage(inner=inner, path=path) -> None:
            data = bytes(run_sync(inner.read(path)))
            run_sync(inner.delete(path) if change is None else inner.write(path, change(data)))

        backend, state = at_call(inner, at, damage), state_of(0)
        with manager_on(backend) as reader, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            steps.append(reader.load(state).step)
        check_equal(state, steps[-1])
        assert [path in str(warning.message) for warning in caught] == [True] * (steps[-1] == 1)
        if len(backend.calls) <= at:
            assert {1, 2} == set(steps) and steps[-1] == 2
            return


def test_a_storage_that_fails_at_any_call_leaves_the_state_whole_or_says_that_it_is_not(places):
    half_filled = 0
    for at, inner in enumerate(places):
        two_steps(inner)
        backend, state, failure = FaultyBackend(inner), state_of(0), ""
        backend.when("*", "*", not_done(), nth=at + 1)
        try:
            with manager_on(backend) as reader:
                reader.load(state)
        except DTRuntimeError as error:
            failure = str(error)
        if len(backend.calls) <= at:
            check_equal(state, 2)
            assert not failure and at > 5
            chunks = chunk_calls(backend)
            assert half_filled >= chunks and bool(half_filled) == bool(chunks)
            return
        assert "scripted" in failure and state["step"] == 0, at
        half_filled += HALF_FILLED in failure
        if HALF_FILLED not in failure:
            check_equal(state, 0)
