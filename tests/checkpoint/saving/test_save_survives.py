"""A save whose storage fails for a moment, at any one of its calls; and what it says when that does not pass."""

from __future__ import annotations

import errno
import re
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import dtruntime_torch as dt
from dtruntime_torch import RetryPolicy
from dtruntime_torch.checkpoint.commit import Patience, claim_generation
from dtruntime_torch.errors import DTRuntimeError, StorageError, UnsuitableStorage
from dtruntime_torch.storage import LocalBackend, MemoryBackend, run_sync
from dtruntime_torch.storage.system_calls import SystemCalls
from dtruntime_torch.testing.faulty_backend import Call, FaultyBackend, Stopped, hidden, lost_answer, not_done
from tests.checkpoint.commits import NAME, Time, creates, generation_path

RETRY = RetryPolicy(attempts=2, initial=0.0)


def state(step: int) -> dict[str, torch.Tensor]:
    return {"w": torch.arange(10_000) * step, "frozen": torch.arange(100_000)}


def manager_of(backend: FaultyBackend, **options: object) -> dt.CheckpointManager:
    return dt.CheckpointManager(backend, NAME, delta=True, chunk_bytes=4096, **options)  # type: ignore[arg-type]


def calls_of_a_save(before: int, keep_last_n: int) -> int:
    """How many calls the save makes that comes after so many others."""
    backend = FaultyBackend(MemoryBackend())
    with manager_of(backend, keep_last_n=keep_last_n) as manager:
        for step in range(1, before + 1):
            manager.save(state(step), step)
        backend.calls.clear()
        manager.save(state(before + 1), before + 1)
        return len(backend.calls)


@pytest.mark.parametrize("fault", [not_done, lost_answer])
@pytest.mark.parametrize("before", [0, 1, 2], ids=["the first save", "a delta", "a delta and a prune"])
def test_a_failure_that_passes_fails_no_save_at_whatever_call_it_comes(before, fault):
    for nth in range(1, calls_of_a_save(before, keep_last_n=2) + 1):
        backend = FaultyBackend(MemoryBackend())
        with manager_of(backend, retry=RETRY, keep_last_n=2) as manager:
            for step in range(1, before + 1):
                manager.save(state(step), step)
            backend.when("*", "*", fault(), nth=nth)
            backend.calls.clear()
            info = manager.save(state(before + 1), before + 1)
            met = backend.calls[nth - 1]
            assert info.step == before + 1, met
            assert manager.verify(before + 1).ok, met
            found = manager.load_checkpoint()
            assert all(torch.equal(found[name], t) for name, t in state(before + 1).items()), met


BEFORE_THE_WRITES = [("list", "*/generations/*"), ("list", "*/step-*"), ("list", "*/commits/*")]


@pytest.mark.parametrize(
    ("operation", "pattern"), [*BEFORE_THE_WRITES, ("write", "*.safetensors"), ("write", "*")]
)
def test_a_failure_that_stays_says_how_often_and_for_how_long_it_was_tried(operation, pattern):
    backend = FaultyBackend(MemoryBackend())
    with manager_of(backend, retry=RetryPolicy(attempts=3, initial=0.0)) as manager:
        backend.when(operation, pattern, not_done(), nth=None)
        with pytest.raises(DTRuntimeError, match=r"scripted fault.*\(tried 3 times in \d+\.\d s\)"):
            manager.save(state(1), 1)


@pytest.mark.parametrize("path", ["generations", "commits"])
def test_a_create_that_is_never_answered_says_so_too(path):
    backend = FaultyBackend(MemoryBackend())
    with manager_of(backend, timeout=0.8) as manager:
        backend.when("create", f"*/{path}/*", not_done(), nth=None)
        with pytest.raises(DTRuntimeError, match=r"tried \d+ times in \d+\.\d s: scripted fault"):
            manager.save(state(1), 1)


def test_without_a_policy_the_error_of_a_listing_is_told_as_it_is():
    backend = FaultyBackend(MemoryBackend())
    with manager_of(backend) as manager:
        backend.when("list", "*", not_done())
        with pytest.raises(StorageError, match=re.escape("was not done") + "$"):
            manager.save(state(1), 1)


class NoLinks(SystemCalls):
    """A file system with neither hard links nor renameat2."""

    def link(self, source: str, target: str) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    def rename_noreplace(self, source: str, target: str) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")


def test_where_nothing_can_be_created_a_claim_is_not_tried_again(tmp_path: Path):
    backend, time = FaultyBackend(LocalBackend(tmp_path, calls=NoLinks())), Time()
    patience = Patience(clock=lambda: time.now, sleep=time.sleep)
    with pytest.raises(UnsuitableStorage, match="neither hard links nor renameat2"):
        run_sync(claim_generation(backend, NAME, "0" * 32, None, False, 1, patience))
    assert creates(backend) == [generation_path(1)] and time.slept == []


def test_where_a_file_stands_in_the_way_a_claim_is_not_tried_again(tmp_path: Path):
    (tmp_path / NAME).write_bytes(b"")
    backend, time = FaultyBackend(LocalBackend(tmp_path)), Time()
    patience = Patience(clock=lambda: time.now, sleep=time.sleep)
    backend.when("list", "*", hidden(), nth=None)  # which it would be refused already
    with pytest.raises(StorageError, match=r"\(ENOTDIR\)"):
        run_sync(claim_generation(backend, NAME, "0" * 32, None, False, 1, patience))
    assert creates(backend) == [generation_path(1)] and time.slept == []


def test_where_nothing_can_be_created_a_save_is_not_tried_again(tmp_path: Path):
    backend = FaultyBackend(LocalBackend(tmp_path, calls=NoLinks()))
    manager = manager_of(backend, retry=RetryPolicy(attempts=9, initial=0.0))
    with manager, pytest.raises(UnsuitableStorage, match="use another one$"):
        manager.save(state(1), 1)
    assert creates(backend) == [generation_path(1)]
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


@pytest.mark.parametrize(("before", "timeout"), [(0, 0.2), (2, 0.8)])
def test_a_call_that_never_returns_keeps_no_save_for_ever_and_loses_nothing(before, timeout):
    """But the writes of a part, which take what they take: they keep nobody but their own save waiting."""
    for nth in range(1, calls_of_a_save(before, keep_last_n=2) + 1):
        backend, stopped = FaultyBackend(MemoryBackend()), Stopped()
        with manager_of(backend, timeout=timeout, keep_last_n=2) as manager:
            for step in range(1, before + 1):
                manager.save(state(step), step)
            backend.when("write", "*/shard-*", Call.proceed, nth=None)
            backend.when("*", "*", stopped, nth=nth)
            with suppress(DTRuntimeError):
                manager.save(state(before + 1), before + 1)
        with manager_of(backend, timeout=60) as manager:
            if (newest := manager.latest()) is None:
                assert before == 0
                continue
            assert newest.step >= before
            found = manager.load_checkpoint()
            assert all(torch.equal(found[name], t) for name, t in state(newest.step).items())
