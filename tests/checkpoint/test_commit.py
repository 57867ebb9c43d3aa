"""What makes a checkpoint exist, one call after the other, and what happens when a call fails or does not answer."""

from __future__ import annotations

import asyncio

import pytest
import torch

import dtruntime_torch as dt
from dtruntime_torch.checkpoint import catalog
from dtruntime_torch.checkpoint.commit import commit
from dtruntime_torch.checkpoint.names import CommitKey
from dtruntime_torch.errors import AlreadyExists, NotFound, StorageError
from dtruntime_torch.storage import LocalBackend, MemoryBackend, run_sync
from dtruntime_torch.storage.system_calls import SystemCalls
from dtruntime_torch.testing.faulty_backend import (
    FaultyBackend,
    Stopped,
    flipped,
    lost_answer,
    not_done,
)
from tests.checkpoint.commits import (
    COMMIT,
    MANIFEST,
    NAME,
    also,
    commit_path,
    creates,
    generation_path,
    manifest_of,
    manifest_path,
    void,
)

INTENT = manifest_path(MANIFEST)


def commit_now(backend, time, manifest=MANIFEST, seconds=60.0):
    return run_sync(commit(backend, manifest, time.patience(seconds)))


def deletes(backend):
    return [path for operation, path in backend.calls if operation == "delete"]


def exists(backend, path):
    try:
        run_sync(backend.size(path))
    except NotFound:
        return False
    return True


def test_the_manifest_comes_before_the_commit_and_that_is_all(backend, time):
    assert commit_now(backend, time).kind == "committed"
    assert backend.calls == [("write", INTENT), ("create", COMMIT)]


def test_a_whole_save_writes_the_parts_first_then_the_manifest_then_the_commit(backend):
    with dt.CheckpointManager(backend, NAME) as manager:
        info = manager.save({"w": torch.ones(3)}, 5)
    changes = [(operation, path) for operation, path in backend.calls if operation in ("write", "create")]
    assert changes == [
        ("create", generation_path(1)),
        ("write", f"{info.path}/shard-00000-of-00001.safetensors"),
        ("write", f"{info.path}/shard-00000-of-00001.json"),
        ("write", f"{info.path}/manifest.json"),
        ("create", commit_path(1, 5)),
    ]


def test_a_later_save_asks_storage_for_two_listings_and_nothing_else(backend):
    """Whether somebody has replaced this job, and whether others have put files where it is about to write."""
    with dt.CheckpointManager(backend, NAME, keep_last_n=None) as manager:
        manager.save({"w": torch.ones(3)}, 5)
        since = len(backend.calls)
        info = manager.save({"w": torch.ones(3)}, 6)
    asked = [call for call in backend.calls[since:] if call[0] not in ("write", "create")]
    assert asked == [("list", f"{NAME}/generations/"), ("list", f"{info.path.rpartition('/')[0]}/")]


def test_a_commit_names_its_attempt_and_the_digest_of_its_manifest(backend, time):
    outcome = commit_now(backend, time)
    found = run_sync(catalog.read_commit(backend, NAME, CommitKey(7, 100)))
    assert (found.attempt, found.manifest_sha256) == (MANIFEST.attempt, outcome.manifest_sha256)
    assert run_sync(catalog.read_manifest(backend, found)) == MANIFEST


def test_a_create_whose_answer_is_lost_is_found_to_have_won(backend, time):
    backend.when("create", COMMIT, lost_answer())
    assert commit_now(backend, time).kind == "committed"
    assert backend.calls[1:] == [("create", COMMIT), ("create", COMMIT), ("read", COMMIT)]
    assert deletes(backend) == []


def test_a_create_that_was_not_done_is_sent_again(backend, time):
    backend.when("create", COMMIT, not_done())
    assert commit_now(backend, time).kind == "committed"
    assert creates(backend) == [COMMIT, COMMIT]


def test_a_create_that_was_refused_where_nothing_is_then_is_sent_again(backend, time):
    backend.when("create", COMMIT, not_done(AlreadyExists("something is there")))
    assert commit_now(backend, time).kind == "committed"
    assert backend.calls[1:] == [("create", COMMIT), ("read", COMMIT), ("create", COMMIT)]


def test_a_commit_of_ours_that_a_create_finds_is_ours(backend, time):
    # A client library may have sent the create twice by itself.
    run_sync(commit(backend, MANIFEST))
    assert commit_now(backend, time).kind == "committed"


def test_an_error_of_any_kind_is_an_unknown_outcome(backend, time):
    for nth, error in enumerate([OSError("reset"), RuntimeError("library"), asyncio.TimeoutError()], 1):
        backend.when("create", COMMIT, lost_answer(error), nth)
    backend.when("read", COMMIT, not_done(RuntimeError("library")))
    assert commit_now(backend, time).kind == "committed"


def test_where_a_void_is_the_commit_is_lost(backend, time):
    run_sync(void(backend, 7, 100))
    before = run_sync(backend.read(COMMIT))
    outcome = commit_now(backend, time)
    assert outcome.kind == "lost"
    assert COMMIT in outcome.message and "void" in outcome.message
    assert run_sync(backend.read(COMMIT)) == before
    assert deletes(backend) == []


def test_where_a_void_comes_between_two_creates_the_commit_is_lost(inner, backend, time):
    backend.when("create", COMMIT, also(lambda: void(inner, 7, 100), then=not_done()))
    assert commit_now(backend, time).kind == "lost"


def test_where_the_commit_of_another_attempt_is_ours_is_lost(backend, time):
    other = manifest_of(7, 100, number=2)
    run_sync(commit(backend, other))
    outcome = commit_now(backend, time)
    assert outcome.kind == "lost"
    assert other.attempt in outcome.message
    assert run_sync(catalog.read_commit(backend, NAME, CommitKey(7, 100))).attempt == other.attempt


@pytest.mark.parametrize("fault", [not_done, lost_answer])
def test_an_outcome_that_is_undecided_at_the_deadline_is_unknown_and_deletes_nothing(backend, time, fault):
    backend.when("create", COMMIT, fault(StorageError("busy")), nth=None)
    backend.when("read", COMMIT, not_done(StorageError("busy, too")), nth=None)
    outcome = commit_now(backend, time)
    assert outcome.kind == "unknown"
    assert "may be committed or not" in outcome.message and "busy" in outcome.message
    assert exists(backend, INTENT)
    assert deletes(backend) == []


def test_it_asks_until_the_deadline_with_pauses_that_grow(backend, time):
    backend.when("create", COMMIT, not_done(), nth=None)
    commit_now(backend, time, seconds=10.0)
    assert time.slept == [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0, 2.0, 2.0]
    assert len(creates(backend)) == 11


def test_without_time_it_asks_once(backend, time):
    backend.when("create", COMMIT, lost_answer())
    assert commit_now(backend, time, seconds=0.0).kind == "unknown"
    assert creates(backend) == [COMMIT]


def test_a_commit_that_is_damaged_is_unknown_and_deletes_nothing(backend, time):
    backend.when("create", COMMIT, lost_answer())
    backend.when("read", COMMIT, flipped(5))
    outcome = commit_now(backend, time)
    assert outcome.kind == "unknown"
    assert COMMIT in outcome.message
    assert deletes(backend) == []


def test_a_create_that_never_answers_is_given_up(time):
    backend = FaultyBackend(MemoryBackend())
    backend.when("create", COMMIT, Stopped(), nth=None)
    outcome = run_sync(commit(backend, MANIFEST, time.patience(seconds=0.0, call_seconds=0.01)))
    assert outcome.kind == "unknown"
    assert "no answer in time" in outcome.message


def test_after_a_create_that_did_not_answer_in_time_the_next_one_decides(time):
    backend = FaultyBackend(MemoryBackend())
    backend.when("create", COMMIT, Stopped())
    assert run_sync(commit(backend, MANIFEST, time.patience(call_seconds=0.01))).kind == "committed"


@pytest.mark.parametrize("fault", [not_done, lost_answer])
def test_if_the_manifest_cannot_be_written_the_save_is_aborted_and_no_create_is_sent(backend, time, fault):
    backend.when("write", INTENT, fault(StorageError("no space left")))
    outcome = commit_now(backend, time)
    assert outcome.kind == "aborted"
    assert INTENT in outcome.message and "no space left" in outcome.message
    assert backend.calls == [("write", INTENT), ("delete", INTENT)]
    assert not exists(backend, INTENT)


def test_a_manifest_that_cannot_be_deleted_again_is_told(backend, time):
    backend.when("write", INTENT, lost_answer())
    backend.when("delete", INTENT, not_done(StorageError("read only")))
    outcome = commit_now(backend, time)
    assert outcome.kind == "aborted"
    assert "read only" in outcome.message


class LostFolders(SystemCalls):
    """A disk that fails to sync the folder of commits the first times."""

    def __init__(self, failures):
        self.failures = failures

    def sync_folder(self, path):
        if path.endswith("/commits") and self.failures > 0:
            self.failures -= 1
            raise OSError(5, "Input/output error", path)
        super().sync_folder(path)


@pytest.mark.parametrize(("failures", "kind"), [(1, "committed"), (3, "committed"), (1_000, "unknown")])
def test_a_commit_on_disk_counts_only_once_its_folder_is_synced(tmp_path, time, failures, kind):
    backend = FaultyBackend(LocalBackend(tmp_path, calls=LostFolders(failures)))
    assert commit_now(backend, time).kind == kind
    assert exists(backend, COMMIT)
    assert len(creates(backend)) == min(failures, 35) + 1
    assert deletes(backend) == []
