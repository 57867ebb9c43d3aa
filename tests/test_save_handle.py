"""What a handle promises while its save ends, and what a manager keeps when it is over."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Collection

import pytest
import torch

import dtruntime_torch as dt
from dtruntime_torch.checkpoint.staging.watch import Watch
from dtruntime_torch.errors import DTRuntimeError, InvalidArgument
from dtruntime_torch.storage import MemoryBackend
from dtruntime_torch.testing.faulty_backend import FaultyBackend, Stopped
from tests.late_saves import jobs, make_model, manager

__all__ = ["jobs", "manager"]

STATE = {"weight": torch.arange(3000.0)}


@pytest.mark.parametrize("use", ["save", "load", "close"])
def test_a_done_callback_that_uses_the_manager_is_refused_at_once(use):
    stopped, called = Stopped(), threading.Event()
    backend = FaultyBackend(MemoryBackend())
    backend.when("create", "*/commits/*", stopped)
    # It would wait for itself as long as that.
    manager = dt.CheckpointManager(backend, timeout=5)
    raised: list[DTRuntimeError] = []
    uses = {
        "save": lambda: manager.save_async(STATE, 2),
        "load": lambda: manager.load({"weight": torch.zeros(3000)}),
        "close": manager.close,
    }

    def call(_: dt.SaveHandle) -> None:
        try:
            uses[use]()
        except DTRuntimeError as error:
            raised.append(error)
        finally:
            called.set()

    handle = manager.save_async(STATE, 1)
    stopped.reached.wait(60)
    handle.add_done_callback(call)
    stopped.release()
    assert called.wait(60)
    assert [type(error) for error in raised] == [InvalidArgument]
    assert "a done callback runs in the thread that saves" in str(raised[0])
    assert manager.save(STATE, 3).step == 3
    manager.close()


def test_a_closed_manager_keeps_no_staging_memory(tmp_path):
    manager = dt.CheckpointManager(tmp_path)
    handle = manager.save_async(STATE, 1)
    arena = weakref.ref(manager._saver._stager.arena)
    manager.close()
    gc.collect()
    assert handle.done() and arena() is None


def test_a_handle_does_not_say_staged_while_a_change_would_still_fail_the_save(manager, jobs, monkeypatch):
    model = make_model()
    manager.guard(torch.optim.SGD(model.parameters(), lr=0.1))
    let_go, said = Watch.let_go, []

    def look(watch: Watch, numbers: Collection[int]) -> list[int]:
        said.append(handle.staged())
        return let_go(watch, numbers)

    monkeypatch.setattr(Watch, "let_go", look)
    handle = manager.save_async({"model": model}, 1)
    jobs.release()
    handle.result(60)
    assert said == [False] and handle.staged()
