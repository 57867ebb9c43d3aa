"""A failed save is an event: logged, counted, told as the job wants it, and never the end of training by itself."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Iterator
from concurrent.futures import wait
from types import SimpleNamespace

import pytest
import torch

import dtruntime_torch as dt
from dtruntime_torch.checkpoint.saving import health
from dtruntime_torch.errors import CommitConflict, InvalidArgument, SaveFailed
from dtruntime_torch.storage import MemoryBackend
from dtruntime_torch.testing.faulty_backend import FaultyBackend, not_done

STATE = {"w": torch.arange(6.0)}


@pytest.fixture
def backend() -> FaultyBackend:
    return FaultyBackend(MemoryBackend())


@pytest.fixture
def manager(backend) -> Iterator[dt.CheckpointManager]:
    with dt.CheckpointManager(backend, on_failure="raise") as manager:
        yield manager


def fail(manager: dt.CheckpointManager, backend: FaultyBackend, step: int) -> dt.SaveHandle:
    """Begins a save that fails, and waits for that without asking for its result."""
    backend.when("write", "*.safetensors", not_done())
    handle = manager.save_async(STATE, step)
    wait([handle._future])
    return handle


def test_raise_raises_at_the_next_save_once(manager, backend):
    fail(manager, backend, 1)
    with pytest.raises(SaveFailed, match="step 1"):
        manager.save_async(STATE, 2)
    assert manager.save(STATE, 2).step == 2
    assert [info.step for info in manager.list()] == [2]


@pytest.mark.parametrize("look", ["result", "await"])
def test_what_the_user_saw_is_not_raised_again(manager, backend, look):
    handle = fail(manager, backend, 1)

    async def awaited() -> None:
        await handle

    with pytest.raises(SaveFailed):
        handle.result() if look == "result" else asyncio.run(awaited())
    assert manager.save(STATE, 2).step == 2


def test_what_was_raised_is_not_raised_by_close(backend):
    with dt.CheckpointManager(backend, on_failure="raise") as manager:
        fail(manager, backend, 1)
        with pytest.raises(SaveFailed):
            manager.save_async(STATE, 2)


def test_what_was_not_told_is_raised_by_close(backend):
    manager = dt.CheckpointManager(backend, on_failure="raise")
    fail(manager, backend, 1)
    with pytest.raises(SaveFailed):
        manager.close()


def test_warn_warns_at_the_next_save_and_goes_on(backend):
    with dt.CheckpointManager(backend) as manager:
        fail(manager, backend, 1)
        with pytest.warns(RuntimeWarning, match="the save before this one failed: .*step 1"):
            handle = manager.save_async(STATE, 2)
        assert handle.result().step == 2
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            manager.save(STATE, 3)


def test_a_job_that_was_replaced_is_stopped_whatever_was_asked_for(backend):
    with dt.CheckpointManager(backend) as old:
        old.save(STATE, 1)
        with dt.CheckpointManager(backend) as new:
            new.load({"w": torch.zeros(6)})
            new.save(STATE, 2)
        handle = old.save_async(STATE, 3)
        wait([handle._future])
        for _ in range(2):
            with pytest.raises(CommitConflict):
                old.save_async(STATE, 4)
        with pytest.raises(CommitConflict):
            handle.result()


def test_failed_saves_are_logged_and_counted(backend, caplog):
    with dt.CheckpointManager(backend, on_failure="raise") as manager:
        manager.save(STATE, 1)
        assert manager.failed_saves == 0
        fail(manager, backend, 2)
        assert manager.failed_saves == 1
        assert "a save failed" in caplog.text
        with pytest.raises(SaveFailed):
            manager.save_async(STATE, 3)
        assert manager.failed_saves == 1
        with pytest.raises(dt.errors.UnsupportedType):
            manager.save({"w": object()}, 3)
        with pytest.raises(InvalidArgument):
            manager.save(STATE, 3, metadata={1})  # type: ignore[arg-type]
        with pytest.raises(InvalidArgument):
            manager.save(STATE, 1)
        assert manager.failed_saves == 1  # no save began


def test_the_age_of_the_last_good_one_counts_from_a_commit_or_a_load(backend, monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(health, "time", SimpleNamespace(monotonic=lambda: clock.now))
    with dt.CheckpointManager(backend) as manager:
        clock.now += 5
        with pytest.raises(SaveFailed):
            fail(manager, backend, 1).result()
        assert manager.age_of_last_good == 5  # since the manager was made
        manager.save(STATE, 1)
        clock.now += 7
        assert manager.age_of_last_good == 7
        with pytest.raises(SaveFailed):
            fail(manager, backend, 2).result()
        assert manager.age_of_last_good == 7
        manager.load({"w": torch.zeros(6)})
        clock.now += 2
        assert manager.age_of_last_good == 2


def test_another_word_than_these_two_is_refused(tmp_path):
    with pytest.raises(InvalidArgument, match="on_failure is 'ignore'"):
        dt.CheckpointManager(tmp_path, on_failure="ignore")  # type: ignore[arg-type]
