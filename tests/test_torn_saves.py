"""State that changes behind the door's back while a save still reads it: that save fails and says what changed."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch

import dtruntime_torch as dt
from dtruntime_torch.checkpoint.door import DOOR
from dtruntime_torch.errors import CheckpointNotFound, SaveFailed
from tests.checkpoint.late_jobs import LateJobs
from tests.late_saves import SIZE, assert_saved, backward, copy_of, jobs, make_model, manager

__all__ = ["jobs", "manager"]


def trained() -> tuple[torch.nn.Sequential, torch.optim.Optimizer]:
    """A model whose optimizer has stepped."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    backward(model)
    optimizer.step()
    return model, optimizer


def by_hand(weight: torch.nn.Parameter) -> None:
    with torch.no_grad():
        weight.sub_(0.1)


def by_data(weight: torch.nn.Parameter) -> None:
    weight.data.sub_(0.1)


def by_fused_kernel(weight: torch.nn.Parameter) -> None:
    torch._fused_sgd_(
        [weight.detach()],
        [torch.ones_like(weight)],
        [],
        weight_decay=0.0,
        momentum=0.0,
        lr=0.1,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=True,
    )


def by_first_step_of_sam(weight: torch.nn.Parameter) -> None:
    """It climbs along the gradient before the loss is taken again, and no optimizer steps."""
    with torch.no_grad():
        assert weight.grad is not None
        weight.add_(weight.grad, alpha=0.05)


def fail(manager: dt.CheckpointManager, jobs: LateJobs, change: Callable[[torch.nn.Parameter], None]) -> str:
    """Changes a weight between the call and the copy; returns how the save failed."""
    model, _ = trained()
    handle = manager.save_async({"model": model}, 1)
    weight = next(model.parameters())
    before = weight.detach().clone()
    change(weight)
    assert not torch.equal(before, weight)
    jobs.release()
    with pytest.raises(SaveFailed) as raised:
        handle.result(60)
    with pytest.raises(CheckpointNotFound):
        manager.load_checkpoint()
    return str(raised.value)


@pytest.mark.parametrize("change", [by_hand, by_first_step_of_sam])
def test_a_change_that_torch_counts_fails_the_save_and_names_the_tensor(change, manager, jobs):
    assert "model.0.weight changed while a save read it" in fail(manager, jobs, change)


@pytest.mark.parametrize("change", [by_hand, by_data, by_fused_kernel, by_first_step_of_sam])
def test_paranoid_saves_find_every_change_and_name_the_tensor(change, tmp_path, jobs):
    with dt.CheckpointManager(tmp_path, paranoid=True, timeout=30) as manager:
        assert "model.0.weight changed while a save read it" in fail(manager, jobs, change)


@pytest.mark.parametrize("change", [by_data, by_fused_kernel])
def test_a_change_that_torch_does_not_count_is_none_to_its_counter(change):
    # Why `paranoid` is there: if this fails, torch counts what it did not.
    model, _ = trained()
    version = model[0].weight._version
    change(model[0].weight)
    assert model[0].weight._version == version


def test_a_paranoid_save_of_what_did_not_change_succeeds(tmp_path, jobs):
    model, optimizer = trained()
    with dt.CheckpointManager(tmp_path, paranoid=True, timeout=30) as manager:
        expected = copy_of(model.state_dict())
        handle = manager.save_async({"model": model}, 1)
        optimizer.step()
        jobs.release()
        assert_saved(manager, handle, expected)


def test_a_lookup_that_renormalises_an_embedding_fails_the_save(manager, jobs):
    table = torch.nn.Embedding(SIZE, SIZE, max_norm=0.1)
    optimizer = torch.optim.SGD(table.parameters(), lr=0.1)
    table(torch.tensor([1])).sum().backward()
    optimizer.step()
    handle = manager.save_async({"model": table}, 1)
    table(torch.tensor([2]))
    jobs.release()
    with pytest.raises(SaveFailed, match="model.weight changed while a save read it"):
        handle.result(60)


def test_a_change_before_a_step_fails_the_save_though_the_step_waited(manager, jobs):
    model, optimizer = trained()
    handle = manager.save_async({"model": model}, 1)
    by_hand(model[0].weight)
    optimizer.step()
    jobs.release()
    with pytest.raises(SaveFailed, match="model.0.weight changed"):
        handle.result(60)


def test_changes_after_all_is_staged_are_none(manager, jobs):
    model, _ = trained()
    expected = copy_of(model.state_dict())
    jobs.release()
    handle = manager.save_async({"model": model}, 1)
    handle.result(60)
    by_hand(model[0].weight)
    assert_saved(manager, handle, expected)


def test_after_a_tear_nothing_is_late_any_more_and_a_warning_says_so_once(manager, jobs):
    fail(manager, jobs, by_hand)
    model, _ = trained()
    with pytest.warns(RuntimeWarning) as warned:
        handle = manager.save_async({"model": model}, 2)
    assert any("saves now wait until all is staged" in str(one.message) for one in warned)
    assert handle.staged()
    handle.result(60)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert manager.save_async({"model": model}, 3).staged()


def test_after_a_step_was_captured_in_a_graph_nothing_is_late_any_more(manager, jobs, monkeypatch):
    model, optimizer = trained()
    monkeypatch.setattr(DOOR, "bypassed", False)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        optimizer.step()
    jobs.release()
    with pytest.warns(RuntimeWarning, match="a CUDA graph holds the step of an optimizer"):
        assert manager.save_async({"model": model}, 1).staged()


def test_a_step_that_waited_long_enough_goes_on_and_that_save_fails(tmp_path, jobs):
    model, optimizer = trained()
    jobs.least_timeout = 1.0
    with dt.CheckpointManager(tmp_path, door_timeout=0.05, timeout=30) as manager:
        handle = manager.save_async({"model": model}, 1)
        before = model[0].weight.detach().clone()
        optimizer.step()
        assert not torch.equal(before, model[0].weight)
        jobs.release()
        with pytest.raises(
            SaveFailed, match=r"the step of an optimizer waited 0.05 s for this save, which is given up"
        ):
            handle.result(60)
        manager.save({"model": model}, 2)
        assert [info.step for info in manager.list()] == [2]
