"""What gpucheck measures of training: each way to save runs, leaves nothing behind, and asks for room before it writes."""

from __future__ import annotations

import shutil
import threading
from collections import namedtuple
from dataclasses import replace

import pytest
import torch
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from dtruntime_torch.gpucheck.findings import NotRun
from dtruntime_torch.gpucheck.loop import Loop
from dtruntime_torch.gpucheck.saves import by_dcp, by_manager
from dtruntime_torch.gpucheck.staging import while_training
from dtruntime_torch.gpucheck.training import DCP, SHARED_MEMORY, measure_training
from dtruntime_torch.manager import CheckpointManager
from tests.gpucheck.host_device import TINY, HostBench

Usage = namedtuple("Usage", "total used free")
PEERS = ["no save", DCP, "dcp.async_save as it comes"]


@pytest.fixture
def loop():
    return Loop(HostBench(), TINY)


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return tmp_path


@pytest.fixture
def room(monkeypatch):
    """Says how much room there is, by whether it is shared memory that is asked for."""

    def say(shared, other):
        def usage(path):
            return Usage(0, 0, shared if path == SHARED_MEMORY else other)

        monkeypatch.setattr(shutil, "disk_usage", usage)

    return say


def bytes_in(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def rows_of(found):
    return [(row.metric.partition(",")[0], row.peer_name) for row in found if not isinstance(row, NotRun)]


def test_each_way_to_save_is_run_and_cleans_up(folder, room):
    room(shared=1 << 40, other=1 << 40)
    found = list(measure_training(HostBench(), TINY))
    assert rows_of(found) == [
        *(("step/save_async", peer) for peer in PEERS),
        *(("step/staging alone", peer) for peer in PEERS),
    ]
    assert not any(isinstance(row, NotRun) for row in found)
    # Torch itself may leave a folder there.
    assert list(folder.glob("dtruntime*")) == []


def test_the_manager_cleans_up_nothing_itself(room, caplog):
    """What was saved is removed behind its back, of which it would complain."""
    room(shared=0, other=1 << 40)
    list(measure_training(HostBench(), replace(TINY, windows=4)))
    assert [record for record in caplog.records if record.name.startswith("dtruntime")] == []


def test_where_a_checkpoint_has_no_room_nothing_is_written(folder, room, loop):
    room(shared=1 << 40, other=loop.nbytes)
    (found,) = measure_training(HostBench(), TINY)
    assert isinstance(found, NotRun) and found.name == "step"
    assert str(folder) in found.why and "1 MB are needed; set TMPDIR" in found.why


def test_without_room_in_shared_memory_only_the_peer_that_needs_it_is_left_out(room, loop):
    room(shared=loop.nbytes, other=1 << 40)
    found = list(measure_training(HostBench(), TINY))
    assert [(left.name, "/dev/shm" in left.why) for left in found if isinstance(left, NotRun)] == [
        (f"step beside {DCP}", True)
    ]
    assert {peer for _, peer in rows_of(found)} == {"no save", "dcp.async_save as it comes"}


def test_the_manager_s_checkpoints_do_not_pile_up(folder, loop):
    folder /= "ours"
    with CheckpointManager(folder) as manager:
        save = by_manager(manager, loop, folder)
        for step in (1, 2, 3):
            finish = save(step)
            finish()
            assert bytes_in(folder) < loop.nbytes / 10
        assert len(list(folder.glob("model/commits/*"))) == 3


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("pinned", [True, False])
def test_dcp_s_checkpoints_do_not_pile_up(pinned, folder, loop):
    stager = HostBench().dcp_stager() if pinned else None
    save = by_dcp(loop, folder / "dcp", stager)
    for step in (1, 2):
        finish = save(step)
        finish()
        assert list((folder / "dcp").iterdir()) == []
    if stager is not None:
        stager.close()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_dcp_s_asynchronous_stager_is_waited_for_before_the_optimizer_steps(folder, loop):
    go, asked = threading.Event(), []

    class Slow(DefaultStager):
        def _stage(self, state_dict, **options):
            assert go.wait(60)
            return super()._stage(state_dict, **options)

    stager = Slow(StagingOptions(False, False, True, False))
    before = [tensor.clone() for tensor in loop.tensors()]
    finish = by_dcp(loop, folder, stager)(1)
    training = threading.Thread(target=lambda: (loop.step(), asked.append(go.is_set())))
    training.start()
    # It cannot get past the door, however long it is given.
    training.join(0.05)
    assert all(map(torch.equal, before, loop.tensors()))
    go.set()
    training.join(60)
    assert asked == [True]
    finish()
    stager.close()


def test_dcp_as_it_comes_returns_when_all_is_copied(loop, folder, monkeypatch):
    """By which `by_dcp` tells them apart, and why it is not the main peer."""
    asked = []
    monkeypatch.setattr(loop, "before_overwrite", asked.append)
    monkeypatch.setattr("dtruntime_torch.gpucheck.saves._finish_dcp", lambda wait, place: wait())
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        by_dcp(loop, folder / "dcp", None)(1)()
    assert asked == []
    assert bytes_in(folder / "dcp") > loop.nbytes


def test_training_that_changes_nothing_shows_nothing(monkeypatch):
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)
    monkeypatch.setattr(Loop, "before_overwrite", lambda self, call: Nothing())
    check = while_training(HostBench(), replace(TINY, training_rounds=1))
    assert not check.ok and "training left" in check.detail


class Nothing:
    def remove(self) -> None:
        pass
