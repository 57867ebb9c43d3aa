"""Late saves and optimizers that are used in unusual ways: no step changes what a save still has to read."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager

import pytest
import torch
from torch.optim.optimizer import (
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import dtruntime_torch as dt
from dtruntime_torch.checkpoint.door import DOOR, Door
from tests.checkpoint.late_jobs import LateJobs
from tests.late_saves import (
    SaveOnce,
    assert_saved,
    backward,
    copy_of,
    fused,
    jobs,
    make_model,
    manager,
    trained,
)

__all__ = ["jobs", "manager"]


def test_a_save_from_a_hook_in_front_of_a_step_holds_what_was_there_before(manager, jobs):
    model, optimizer = trained()
    save = SaveOnce(manager, model)
    optimizer.register_step_pre_hook(save)
    optimizer.step()
    jobs.release()
    save.assert_saved()


@pytest.mark.parametrize("make", [fused, torch.optim.LBFGS])
def test_a_save_from_a_closure_holds_what_was_there_before(make, manager, jobs):
    model, _ = trained()
    optimizer = make(model.parameters())
    save = SaveOnce(manager, model)

    def closure() -> torch.Tensor:
        backward(model)
        save()
        return torch.tensor(1.0)

    optimizer.step(closure)
    jobs.release()
    save.assert_saved()


def test_what_is_deferred_is_not_late_in_the_middle_of_a_step_that_changes_it(manager, jobs):
    model, optimizer = trained()
    manager.defer(model.parameters())
    save = SaveOnce(manager, model)
    optimizer.register_step_pre_hook(save)
    optimizer.step()
    jobs.release()
    save.assert_saved()


def count_early(manager: dt.CheckpointManager, jobs: LateJobs, model: torch.nn.Module, step: int = 1) -> int:
    """Begins a save; says how many of its tensors were copied before the call returned."""
    asked = len(jobs.asked)
    manager.save_async({"model": model}, step)
    return len(jobs.asked) - asked


def test_after_a_step_what_it_changed_is_late_again(manager, jobs):
    model, optimizer = trained()
    optimizer.step()
    assert count_early(manager, jobs, model) == 1, "only the bias is small"


def test_after_a_step_that_raised_the_next_makes_late_again_what_it_changes(manager, jobs):
    model, optimizer = trained()
    # A base class with hooks of its own, which the steps of this optimizer do not call.
    torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])

    def closure() -> float:
        raise ValueError

    with pytest.raises(ValueError):
        optimizer.step(closure)
    optimizer.step()
    assert count_early(manager, jobs, model) == 1


def test_a_step_through_a_transposed_view_of_a_weight_waits(manager, jobs):
    model, _ = trained()
    view = torch.nn.Parameter(model[0].weight.data.t())
    view.grad = torch.ones_like(view)
    optimizer = fused([view])
    expected = copy_of(model.state_dict())
    handle = manager.save_async({"model": model}, 1)
    optimizer.step()
    jobs.release()
    assert_saved(manager, handle, expected)


def test_a_step_waits_for_what_is_deferred_and_owned(manager, jobs):
    model, optimizer = trained()
    manager.defer(model.parameters())
    expected = copy_of(model.state_dict())
    handle = manager.save_async({"model": model}, 1)
    optimizer.step()
    jobs.release()
    assert_saved(manager, handle, expected)


def test_a_step_of_an_optimizer_that_was_never_seen_waits_for_what_is_deferred(manager, jobs):
    model = make_model()
    manager.defer(model.parameters())
    backward(model)
    expected = copy_of(model.state_dict())
    handle = manager.save_async({"model": model}, 1)
    fused(model.parameters()).step()
    jobs.release()
    assert_saved(manager, handle, expected)


def test_a_step_does_not_wait_for_what_is_deferred_and_no_optimizer_owns(manager, jobs):
    _, optimizer = trained()
    average = make_model()
    manager.defer(average.parameters())
    handle = manager.save_async({"average": average}, 1)
    asked = len(jobs.asked)
    optimizer.step()
    assert len(jobs.asked) == asked
    jobs.release()
    handle.result(60)


class AllEqual(torch.optim.AdamW):
    """An optimizer that is a value: it has no hash."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AllEqual)


def test_steps_of_optimizers_that_compare_equal_and_have_no_hash_wait(manager, jobs):
    models = torch.nn.ModuleList([make_model(seed=1), make_model(seed=2)])
    optimizers = [AllEqual(model.parameters(), fused=True) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        backward(model)
        optimizer.step()
    expected = copy_of(models.state_dict())
    handle = manager.save_async({"model": models}, 1)
    for optimizer in optimizers:
        optimizer.step()
    jobs.release()
    assert_saved(manager, handle, expected)


class Elsewhere(torch.optim.SGD):
    """An optimizer whose state is no mapping."""

    def __init__(self, parameters: object) -> None:
        super().__init__(parameters, lr=0.1)  # type: ignore[arg-type]
        self.state = [torch.zeros(3)]  # type: ignore[assignment]

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.sub_(1)


def test_an_optimizer_whose_state_is_no_mapping_steps_and_waits(manager, jobs):
    model, _ = trained()
    optimizer = Elsewhere(model.parameters())
    optimizer.step()
    expected = copy_of(model.state_dict())
    handle = manager.save_async({"model": model}, 1)
    optimizer.step()
    jobs.release()
    assert_saved(manager, handle, expected)


class Interrupted:
    """A lock that is interrupted by a signal, as it were, when it has been taken."""

    def __init__(self, lock: AbstractContextManager[object], handler: Callable[[], object]) -> None:
        self.lock = lock
        self.handler: Callable[[], object] | None = handler

    def __enter__(self) -> None:
        self.lock.__enter__()
        handler, self.handler = self.handler, None
        if handler is not None:
            handler()

    def __exit__(self, *error: object) -> None:
        self.lock.__exit__(*error)  # type: ignore[arg-type]


def test_a_signal_handler_that_interrupts_a_step_at_the_door_may_save(manager, jobs, monkeypatch):
    model, optimizer = trained()
    save = SaveOnce(manager, model)
    monkeypatch.setattr(DOOR, "_lock", Interrupted(DOOR._lock, save))
    # A thread that hangs does not keep the test from failing.
    step = threading.Thread(target=optimizer.step, daemon=True)
    step.start()
    step.join(60)
    assert not step.is_alive()
    jobs.release()
    save.assert_saved()


class Around(torch.optim.Optimizer):
    """A wrapper around an optimizer, which torch knows nothing of, and which adds to its step."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner

    @property
    def state(self) -> object:  # type: ignore[override]
        return self.inner.state

    @property
    def param_groups(self) -> list[dict[str, list[torch.Tensor]]]:  # type: ignore[override]
        return self.inner.param_groups

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            parameter.data.mul_(0.9)
        self.inner.step()


def test_a_guarded_wrapper_whose_step_calls_no_hooks_leaves_nothing_late(manager, jobs):
    model = make_model()
    optimizer = Around(fused(model.parameters()))
    manager.guard(optimizer)
    backward(model)
    expected = copy_of(model.state_dict())
    handle = manager.save_async({"model": model}, 1)
    optimizer.step()
    jobs.release()
    assert_saved(manager, handle, expected)


def test_a_load_by_another_manager_waits_for_what_it_fills(manager, jobs, tmp_path):
    model, optimizer = trained()
    with dt.CheckpointManager(tmp_path / "other") as other:
        other.save({"model": model}, 1)
        optimizer.step()
        expected = copy_of(model.state_dict())
        handle = manager.save_async({"model": model}, 1)
        other.load({"model": model})
        assert not torch.equal(model[0].weight, expected["0.weight"])
        jobs.release()
        assert_saved(manager, handle, expected)


@pytest.fixture
def hooks() -> Iterator[None]:
    """Afterwards torch has the global hooks of optimizers that it had before."""
    kept = [(hooks, dict(hooks)) for hooks in (_global_optimizer_pre_hooks, _global_optimizer_post_hooks)]
    yield
    for hooks, before in kept:
        hooks.clear()
        hooks.update(before)


class Told:
    """A reader that notes when it is asked."""

    reads_others = False

    def __init__(self, calls: list[str]) -> None:
        self.calls = calls

    def before_step(self, storages: Collection[int] | None) -> None:
        self.calls.append("reader")

    def before_update(self) -> None:
        self.calls.append("reader")


def test_who_reads_is_asked_before_a_hook_that_was_there_first(hooks):
    _, optimizer = trained()
    calls: list[str] = []
    register_optimizer_step_pre_hook(lambda *_: calls.append("hook"))
    door, reader = Door(), Told(calls)
    door.stand()
    door.hold(reader)
    optimizer.step()
    assert calls == ["reader", "hook"]


def test_a_step_is_over_before_a_hook_behind_it_that_was_there_first(hooks):
    _, optimizer = trained()
    door = Door()
    changing: list[int] = []
    register_optimizer_step_post_hook(lambda *_: changing.append(len(door.changing().storages)))
    door.stand()
    optimizer.step()
    assert changing == [0]
