"""Whatever dies, fills up, lies or is damaged: what was committed is there, and the next save works."""

from __future__ import annotations

import asyncio
import errno
import multiprocessing
import subprocess
import sys
import tempfile
import textwrap
import threading
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import dtruntime_torch as dt
from dtruntime_torch import _C
from dtruntime_torch.errors import (
    CheckpointMismatch,
    CommitConflict,
    CommitUnknown,
    InvalidArgument,
    NewerFormat,
    SaveFailed,
)
from dtruntime_torch.storage import LocalBackend, MemoryBackend, run_sync
from dtruntime_torch.testing.faulty_backend import FaultyBackend, Stopped, killed, lost_answer, not_done
from tests.numbered_saves import load_newest, save, state_of


def calls_of_a_save() -> list[tuple[str, str]]:
    with tempfile.TemporaryDirectory() as folder:
        backend = FaultyBackend(LocalBackend(folder))
        save(backend, 1)
        before = len(backend.calls)
        save(backend, 2)
        return backend.calls[before:]


# Made when the tests are collected, for they are one for each of these calls: which there are only a real save tells.
CALLS = calls_of_a_save()
COMMIT = CALLS.index(("create", "model/commits/0002-00000002.json")) + 1


def save_and_die(folder: Path, nth: int) -> None:
    backend = FaultyBackend(LocalBackend(folder))
    backend.when("*", "*", killed(), nth=nth)
    save(backend, 2)


@pytest.mark.parametrize("nth", range(1, len(CALLS) + 1), ids=lambda n: f"{n}-{CALLS[n - 1][0]}")
def test_a_kill_before_any_call_loses_nothing_committed(tmp_path, nth):
    save(LocalBackend(tmp_path), 1)
    child = multiprocessing.get_context("fork").Process(target=save_and_die, args=(tmp_path, nth))
    child.start()
    child.join(60)
    assert child.exitcode == 137
    assert load_newest(LocalBackend(tmp_path)) == (1 if nth <= COMMIT else 2)
    save(LocalBackend(tmp_path), 3)
    assert load_newest(LocalBackend(tmp_path)) == 3


def test_the_calls_that_are_killed_include_reads_straight_into_place():
    assert "read_chunks" in {operation for operation, _ in CALLS}


def test_every_file_is_there_before_what_names_it():
    written = [path for operation, path in CALLS if operation in ("write", "create")]
    kinds = [path.partition("/")[2].split("/")[0].split("-")[0] + Path(path).suffix for path in written]
    assert kinds == ["generations.json", "step.safetensors", "step.json", "step.json", "commits.json"]


def test_a_create_whose_answer_is_lost_is_a_commit(tmp_path):
    backend = FaultyBackend(LocalBackend(tmp_path))
    backend.when("create", "*/commits/*", lost_answer())
    assert save(backend, 1).step == 1
    assert load_newest(LocalBackend(tmp_path)) == 1
    assert not [call for call in backend.calls if call[0] == "delete"]


def test_a_create_that_was_not_done_is_done_again():
    backend = FaultyBackend(MemoryBackend())
    backend.when("create", "*/commits/*", not_done())
    save(backend, 1)
    assert load_newest(backend) == 1


def test_a_commit_that_stays_undecided_is_unknown_and_deletes_nothing():
    inner = MemoryBackend()
    backend = FaultyBackend(inner)
    backend.when("create", "*/commits/*", not_done(), nth=None)
    with pytest.raises(CommitUnknown):
        save(backend, 1, timeout=0.3)
    assert not [call for call in backend.calls if call[0] == "delete"]
    assert [entry for entry in run_sync(inner.list("model/")) if entry.path.endswith(".safetensors")]


@pytest.mark.parametrize("pattern", ["*.safetensors", "*/shard-*.json"])
def test_a_part_that_cannot_be_written_is_deleted_and_the_next_save_works(pattern):
    inner = MemoryBackend()
    backend = FaultyBackend(inner)
    backend.when("write", pattern, not_done())
    with dt.CheckpointManager(backend) as manager:
        with pytest.raises(SaveFailed, match="rank 0"):
            manager.save(state_of(1), 1)
        assert not [entry for entry in run_sync(inner.list("model/")) if "step-" in entry.path]
        assert manager.save(state_of(1), 1).path.endswith("0001-2")
    assert load_newest(inner) == 1


def test_a_full_disk_is_said_so_left_clean_and_saved_to_again(mount):
    disk = mount("size=4m")
    with dt.CheckpointManager(disk / "checkpoints") as manager:
        manager.save(state_of(1), 1)
        before = sorted(disk.rglob("*"))
        with pytest.raises(SaveFailed, match="The disk is full"):
            manager.save({"large": torch.zeros(1 << 21)}, 2)
        assert sorted(disk.rglob("*")) == before
        manager.save(state_of(2), 2)
    assert load_newest(LocalBackend(disk / "checkpoints")) == 2


def test_a_failed_delete_is_finished_by_the_next_save():
    inner = MemoryBackend()
    backend = FaultyBackend(inner)
    backend.when("write", "*/shard-*.json", not_done())
    backend.when("delete", "*", not_done())
    with dt.CheckpointManager(backend) as manager:
        with pytest.raises(SaveFailed):
            manager.save(state_of(1), 1)
        assert [entry for entry in run_sync(inner.list("model/")) if "step-" in entry.path]
        manager.save(state_of(2), 2)
    assert not [entry for entry in run_sync(inner.list("model/")) if "step-00000001" in entry.path]


def test_a_failure_that_nobody_asked_for_is_told_at_the_next_save():
    backend = FaultyBackend(MemoryBackend())
    backend.when("write", "*.safetensors", not_done())
    with dt.CheckpointManager(backend) as manager:
        manager.save_async(state_of(1), 1)
        with pytest.warns(RuntimeWarning, match="failed"):
            manager.save_async(state_of(2), 2)


def test_a_failure_that_nobody_asked_for_is_raised_by_close():
    backend = FaultyBackend(MemoryBackend())
    backend.when("write", "*.safetensors", not_done())
    manager = dt.CheckpointManager(backend)
    manager.save_async(state_of(1), 1)
    with pytest.raises(SaveFailed):
        manager.close()


def test_a_failure_after_an_await_was_given_up_is_still_told():
    stopped = Stopped()
    backend = FaultyBackend(MemoryBackend())
    backend.when("write", "*.safetensors", stopped)
    backend.when("write", "*.json", not_done())
    manager = dt.CheckpointManager(backend)

    async def give_up() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(manager.save_async(state_of(1), 1), 0.05)

    asyncio.run(give_up())
    stopped.release()
    with pytest.raises(SaveFailed):
        manager.close()


def test_a_manager_is_not_used_by_a_forked_child():
    with dt.CheckpointManager(MemoryBackend()) as manager:
        manager.save(state_of(1), 1)
        child = multiprocessing.get_context("fork").Process(target=use_in_child, args=(manager,))
        child.start()
        child.join(60)
        assert child.exitcode == 0


def use_in_child(manager: dt.CheckpointManager) -> None:
    with pytest.raises(InvalidArgument, match="forked"):
        manager.save(state_of(2), 2)


def test_an_exception_in_the_body_is_not_hidden_by_a_failed_save():
    backend = FaultyBackend(MemoryBackend())
    backend.when("write", "*.safetensors", not_done())

    def train() -> None:
        with dt.CheckpointManager(backend) as manager:
            manager.save_async(state_of(1), 1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()


def test_a_commit_that_another_incarnation_voided_is_lost_and_its_files_are_deleted(tmp_path):
    # What a sweep of a later incarnation does: it makes the commit impossible before it deletes.
    from dtruntime_torch.checkpoint.manifest import Commit, encode_commit

    void = encode_commit(Commit("model", 1, 1, "", "", void=True))
    (tmp_path / "model/commits").mkdir(parents=True)
    backend = FaultyBackend(LocalBackend(tmp_path))

    async def voided(call: object) -> object:
        (tmp_path / "model/commits/0001-00000001.json").write_bytes(void)
        return await call.proceed()  # type: ignore[attr-defined]

    backend.when("create", "*/commits/*", voided)
    with pytest.raises(CommitConflict):
        save(backend, 1)
    deleted = [path for operation, path in backend.calls if operation == "delete"]
    assert deleted[0].endswith("/manifest.json")
    assert not list(tmp_path.glob("model/step-*"))


def test_a_script_that_ends_without_close_finishes_its_save(tmp_path):
    script = f"""
        import torch, dtruntime_torch as dt
        manager = dt.CheckpointManager({str(tmp_path)!r})
        manager.save_async({{"w": torch.zeros(1 << 22)}}, 1)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=120)
    with dt.CheckpointManager(tmp_path) as manager:
        assert manager.verify().ok


def test_a_hundred_saves_leave_no_threads_or_store_keys_behind(tmp_path):
    before = threading.active_count()
    with dt.CheckpointManager(MemoryBackend()) as manager:
        for step in range(100):
            manager.save_async(state_of(step), step)
        assert threading.active_count() <= before + 2
    assert threading.active_count() <= before


def test_a_foreign_checkpoint_is_refused_by_names(tmp_path):
    save(LocalBackend(tmp_path), 1)
    with dt.CheckpointManager(tmp_path) as manager, pytest.raises(CheckpointMismatch, match="other"):
        manager.load({"other": torch.zeros(1)})


def test_a_checkpoint_of_a_later_version_stops_the_load_in_place_of_an_older_one(tmp_path, monkeypatch):
    # Going back silently to what an old version understands would lose work that is not lost.
    with dt.CheckpointManager(tmp_path) as manager:
        manager.save(state_of(1), 1)
        monkeypatch.setattr("dtruntime_torch.checkpoint.manifest.VERSION", 2)
        manager.save(state_of(2), 2)
    monkeypatch.undo()
    # The commit file is of version 2 too; its own version says nothing about what it names.
    path = tmp_path / "model/commits/0001-00000002.json"
    path.write_bytes(path.read_bytes().replace(b'"version":2', b'"version":1'))
    with dt.CheckpointManager(tmp_path) as manager, pytest.raises(NewerFormat, match="upgrade"):
        manager.load(state_of(0))


def test_failed_saves_keep_no_memory_though_somebody_keeps_their_errors(tmp_path):
    with dt.CheckpointManager(tmp_path) as manager:
        manager.save(state_of(1), 1)
        arena = manager._saver._stager.arena
        failures = []
        _C.inject_fault("fsync", 0, "fail", errno.ENOSPC)
        try:
            for step in (2, 3):
                with pytest.raises(SaveFailed) as failure:
                    manager.save(state_of(step), step)
                failures.append(failure.value)
        finally:
            _C.clear_faults()
        manager.save(state_of(4), 4)
        assert manager._saver._stager.arena is arena
    assert len(failures) == 2


def test_threads_that_save_at_once_take_turns():
    for _ in range(20):
        backend = MemoryBackend()
        manager = dt.CheckpointManager(backend)
        together = threading.Barrier(2)

        def save_one(step: int, manager=manager, together=together) -> None:
            together.wait()
            # Steps rise: the one that comes second may be refused.
            with suppress(InvalidArgument):
                manager.save({"w": torch.full((1 << 16,), float(step))}, step)

        threads = [threading.Thread(target=save_one, args=(step,)) for step in (1, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for info in manager.list():
            assert manager.verify(info.step).ok
            assert manager.load_checkpoint(step=info.step)["w"].eq(float(info.step)).all()
        manager.close()


def test_a_save_from_within_a_save_of_the_same_thread_is_refused_and_costs_nothing():
    class SavesAgain:
        def __init__(self, manager: dt.CheckpointManager) -> None:
            self.manager = manager
            self.refusals: list[InvalidArgument] = []

        def state_dict(self) -> dict[str, int]:
            with pytest.raises(InvalidArgument, match="signal handler") as refusal:
                self.manager.save({"x": 1}, 7)
            self.refusals.append(refusal.value)
            return {"x": 2}

        def load_state_dict(self, state: dict[str, int]) -> None:
            pass

    with dt.CheckpointManager(MemoryBackend()) as manager:
        value = SavesAgain(manager)
        manager.save({"value": value}, 1)
        assert value.refusals
        assert [info.step for info in manager.list()] == [1]
