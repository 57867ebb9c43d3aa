"""What a user of CheckpointManager meets when checkpoints go: arguments, reports, and saves that never fail for it."""

from __future__ import annotations

import asyncio
import os
import warnings

import pytest
import torch

import dtruntime_torch as dt
from dtruntime_torch.checkpoint.commit import forbid
from dtruntime_torch.checkpoint.names import CommitKey
from dtruntime_torch.errors import CheckpointNotFound, CommitConflict
from dtruntime_torch.storage import LocalBackend, MemoryBackend, run_sync
from dtruntime_torch.testing.faulty_backend import FaultyBackend, Stopped, lost_answer, not_done

STATE = {"w": torch.arange(6.0)}


def steps(manager: dt.CheckpointManager) -> list[int]:
    return [info.step for info in manager.list()]


def folders(backend: MemoryBackend | LocalBackend) -> set[str]:
    return {entry.path.split("/")[1] for entry in run_sync(backend.list("model/step-"))}


@pytest.fixture
def inner():
    return MemoryBackend()


@pytest.fixture
def backend(inner):
    return FaultyBackend(inner)


def test_three_are_kept_unless_told_otherwise(inner):
    with dt.CheckpointManager(inner) as manager:
        for step in range(1, 6):
            manager.save(STATE, step)
            assert steps(manager) == list(range(max(1, step - 2), step + 1))
    assert folders(inner) == {"step-00000003", "step-00000004", "step-00000005"}


def test_all_are_kept_with_none(inner):
    with dt.CheckpointManager(inner, keep_last_n=None) as manager:
        for step in range(1, 6):
            manager.save(STATE, step)
        assert steps(manager) == [1, 2, 3, 4, 5]


def test_every_argument_keeps_something(inner):
    arguments = {"keep_every_n_steps": 4, "keep_best": dt.KeepBest("loss"), "pinned_steps": [3]}
    with dt.CheckpointManager(inner, keep_last_n=1, **arguments) as manager:  # type: ignore[arg-type]
        for step in range(1, 7):
            manager.save(STATE, step, metadata={"loss": abs(step - 2)})
        assert steps(manager) == [2, 3, 4, 6]


def test_a_line_that_goes_on_keeps_counting_what_it_loaded(inner):
    for step in (1, 2):
        with dt.CheckpointManager(inner, keep_last_n=2) as manager:
            if step > 1:
                manager.load({"w": torch.zeros(6)})
            manager.save(STATE, step)
    with dt.CheckpointManager(inner, keep_last_n=2) as manager:
        manager.load({"w": torch.zeros(6)})
        manager.save(STATE, 3)
        assert steps(manager) == [2, 3]


def test_a_failed_delete_fails_no_save_and_is_made_up_for(inner, backend):
    backend.when("delete", "*", not_done())
    with dt.CheckpointManager(backend, keep_last_n=1) as manager, warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in (1, 2, 3):
            manager.save(STATE, step)
        assert steps(manager) == [3]
    assert folders(inner) == {"step-00000003"}


def test_a_delete_that_never_ends_costs_a_quarter_of_the_time_out_and_no_save(inner, backend):
    stopped = Stopped()
    backend.when("delete", "*", stopped, nth=None)
    with dt.CheckpointManager(backend, keep_last_n=1, timeout=0.4) as manager:
        manager.save(STATE, 1)
        assert manager.save(STATE, 2).step == 2
        stopped.release()
        manager.save(STATE, 3)
        assert steps(manager) == [3]


def test_a_commit_whose_create_was_not_answered_is_voided_not_removed(inner, backend):
    backend.when("create", "*/commits/*", lost_answer())
    with dt.CheckpointManager(backend, keep_last_n=1) as manager:
        for step in (1, 2, 3):
            manager.save(STATE, step)
    commits = [entry.path for entry in run_sync(inner.list("model/commits/"))]
    assert commits == ["model/commits/0001-00000001.json", "model/commits/0001-00000003.json"]
    assert b'"void":true' in bytes(run_sync(inner.read(commits[0])))


def test_what_a_job_that_died_left_is_gone_after_the_next_ones_save(tmp_path):
    with dt.CheckpointManager(tmp_path) as manager:
        manager.save(STATE, 1)
    dead = tmp_path / "model" / "step-00000002" / "0001-1"
    dead.mkdir(parents=True)
    (dead / "shard-00000-of-00001.safetensors").write_bytes(b"half of it")
    (dead / ".tmp-0123456789abcdef").write_bytes(b"a quarter")
    with dt.CheckpointManager(tmp_path) as manager:
        manager.load({"w": torch.zeros(6)})
        manager.save(STATE, 2)
    assert not dead.exists() and not dead.with_name("0001-2").exists()


def test_a_full_disk_heals_itself_by_what_is_left_over(mount):
    disk = mount("size=6m")
    state = {"w": torch.zeros(300_000)}
    with dt.CheckpointManager(disk / "c", keep_last_n=1) as manager:
        manager.save(state, 1)
    dead = disk / "c" / "model" / "step-00000002" / "0001-1"
    dead.mkdir(parents=True)
    (dead / "shard-00000-of-00001.safetensors").write_bytes(bytes(4 << 20))
    with dt.CheckpointManager(disk / "c", keep_last_n=1) as manager:
        manager.load(state)
        manager.save(state, 2)
        assert steps(manager) == [2]


def test_prune_tells_what_goes_and_then_deletes_it(inner):
    with dt.CheckpointManager(inner, keep_last_n=None) as manager:
        written = [manager.save(STATE, step) for step in (1, 2, 3)]
    with dt.CheckpointManager(inner, keep_last_n=1) as manager:
        told = manager.prune(dry_run=True)
        assert steps(manager) == [1, 2, 3]
        done = manager.prune()
        assert steps(manager) == [3]
    assert told.dry_run and not done.dry_run and told.commits == done.commits
    assert [key.step for key in done.commits] == [1, 2] and done.blocked == ()
    assert done.attempts == tuple(info.path.removeprefix("model/") for info in written[:2])
    assert done.nbytes == told.nbytes > written[0].written + written[1].written
    assert folders(inner) == {"step-00000003"}


def test_prune_of_a_manager_that_has_saved_removes_what_it_made_itself(inner):
    with dt.CheckpointManager(inner, keep_last_n=3) as manager:
        for step in (1, 2, 3):
            manager.save(STATE, step)
        assert manager.prune().commits == ()


def test_prune_of_nothing_does_nothing(tmp_path):
    with dt.CheckpointManager(tmp_path / "new") as manager:
        assert manager.prune() == dt.PruneReport(False, (), (), 0, ())
    assert not (tmp_path / "new").exists()


def test_prune_without_a_generation_leaves_what_the_newest_one_is_saving(inner):
    with dt.CheckpointManager(inner) as manager:
        manager.save(STATE, 1)
    run_sync(inner.write("model/step-00000002/0001-1/shard-00000-of-00001.safetensors", b"on its way"))
    with dt.CheckpointManager(inner, keep_last_n=1) as manager:
        assert manager.prune().attempts == ()
    assert "step-00000002" in folders(inner)


def test_who_was_pruned_by_another_job_goes_on(inner):
    with dt.CheckpointManager(inner, keep_last_n=None) as manager:
        for step in (1, 2):
            manager.save(STATE, step)
        with dt.CheckpointManager(inner, keep_last_n=1) as other:
            other.prune()
        manager.save(STATE, 3)
        assert steps(manager) == [2, 3]


def test_who_lost_its_commit_cleans_up_at_once(inner, backend):
    async def swept(call: object) -> object:
        await forbid(inner, "model", CommitKey(1, 2))
        return await call.proceed()  # type: ignore[attr-defined]

    with dt.CheckpointManager(backend) as manager:
        manager.save(STATE, 1)
        backend.when("create", "*/commits/*", swept)
        with pytest.raises(CommitConflict):
            manager.save(STATE, 2)
    assert folders(inner) == {"step-00000001"}


def test_a_step_that_has_gone_is_not_found(inner):
    with dt.CheckpointManager(inner, keep_last_n=1) as manager:
        for step in (1, 2):
            manager.save(STATE, step)
        with pytest.raises(CheckpointNotFound, match="of step 1"):
            manager.load({"w": torch.zeros(6)}, step=1)


def test_a_writer_keeps_as_many_as_it_is_told(inner):
    writer = dt.CheckpointWriter(inner, keep_last_n=2)

    async def write_all() -> None:
        for step in (1, 2, 3):
            await writer.write_checkpoint("blob", step, os.urandom(8))

    asyncio.run(write_all())
    assert len(run_sync(inner.list("blob/commits/"))) == 2


def test_a_hundred_saves_leave_as_many_files_as_three(inner):
    with dt.CheckpointManager(inner) as manager:
        for step in range(1, 4):
            manager.save(STATE, step)
        files = len(run_sync(inner.list("")))
        for step in range(4, 101):
            manager.save(STATE, step)
    assert len(run_sync(inner.list(""))) == files
