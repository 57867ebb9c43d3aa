"""What gpucheck finds of late saves: what the planted faults of `test_faults` do not show."""

from __future__ import annotations

import shutil
from collections import namedtuple
from dataclasses import replace

import pytest
import torch

from dtruntime_torch import _C
from dtruntime_torch.checkpoint.door import DOOR
from dtruntime_torch.gpucheck import door
from dtruntime_torch.gpucheck.door import AHEAD, _Costs, check_door, measure_door
from dtruntime_torch.gpucheck.findings import Check, NotRun
from dtruntime_torch.gpucheck.loop import Loop
from tests.checkpoint.late_jobs import LateJobs
from tests.gpucheck.host_device import ROUND, TICK, TINY, HostBench

CAPTURED = "door/the next save after a step was captured"

Usage = namedtuple("Usage", "total used free")


class CapturingBench(HostBench):
    """Taken for a GPU, where steps can be captured; the optimizers that say so cannot be made here."""

    kind = "gpu"

    def capture(self, work):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "is_initialized", lambda: True)
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            return super().capture(work)


def checks_of(bench):
    return {found.name: found for found in check_door(bench, TINY) if isinstance(found, Check)}


@pytest.fixture
def without_capturable(monkeypatch):
    monkeypatch.delitem(door.WAYS, "AdamW capturable")


def test_after_a_step_was_captured_the_next_save_is_immediate(without_capturable):
    assert checks_of(CapturingBench())[CAPTURED].ok


def test_a_captured_step_that_nobody_noticed_is_found(without_capturable):
    bench = CapturingBench()
    bench.capture = lambda work: HostBench.capture(bench, work)
    found = checks_of(bench)[CAPTURED]
    assert not found.ok and "something was still to be copied when the call returned" in found.detail


def test_what_is_measured_later_is_not_slowed_down_by_the_graph(without_capturable):
    checks_of(CapturingBench())
    assert not DOOR.bypassed


def test_training_that_changes_nothing_shows_nothing(monkeypatch):
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: None)
    found = checks_of(HostBench())["door/SGD with momentum"]
    assert not found.ok and "training left 6 alone" in found.detail


@pytest.mark.parametrize(("section", "name"), [(check_door, "door"), (measure_door, "door/cost")])
def test_without_room_for_checkpoints_nothing_is_saved(section, name, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 0))
    (found,) = section(HostBench(), TINY)
    assert isinstance(found, NotRun) and found.name == name and "set TMPDIR" in found.why


def test_a_call_is_measured_by_the_clock_of_the_host_and_beside_an_immediate_one():
    found = next(iter(measure_door(HostBench(), TINY)))
    assert (
        found.metric.startswith("door/call of save_async, ") and found.peer_name == "consistency='immediate'"
    )
    assert found.ours == found.peer == pytest.approx(1e3 * TICK)


def test_ours_returns_before_all_is_staged_and_what_it_is_measured_beside_does_not(monkeypatch):
    staged = {}

    def by_manager(manager, loop, folder):
        def save(step):
            handle = manager.save_async(loop.state(), step)
            staged.setdefault(folder.name, set()).add(handle.staged())
            return handle.result

        return save

    monkeypatch.setattr(door, "by_manager", by_manager)
    # Nothing late is copied but by the step that follows each save.
    monkeypatch.setattr(_C, "CopyJob", LateJobs())
    list(measure_door(HostBench(), TINY))
    assert staged == {"late": {False}, "immediate": {True}}


def test_a_step_is_measured_with_what_a_save_has_the_device_do_and_without_the_start_of_the_host():
    bench = HostBench()
    costs = _Costs(bench, Loop(bench, TINY))

    def save(step):
        bench.compute(4)
        return lambda: bench.compute(100)

    assert costs.step(save) == pytest.approx(5 * ROUND)
    assert bench.record() >= AHEAD * ROUND


def test_the_managers_that_are_measured_clean_up_nothing_themselves(caplog):
    """What was saved is removed behind their back, of which they would complain."""
    list(measure_door(HostBench(), replace(TINY, repetitions=4)))
    assert caplog.records == []
