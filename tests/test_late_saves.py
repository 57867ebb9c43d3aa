"""Saves whose copies are not over when the call returns: the snapshot is the state at that moment all the same."""

from __future__ import annotations

import copy
import gc
import os
import weakref
from collections.abc import Callable, Iterable

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.optim.optimizer import _global_optimizer_pre_hooks

import dtruntime_torch as dt
from dtruntime_torch.checkpoint.door import DOOR
from dtruntime_torch.errors import InvalidArgument
from tests.late_saves import SIZE, assert_saved, backward, copy_of, jobs, make_model, manager, state_of

__all__ = ["jobs", "manager"]

Make = Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "Adadelta": torch.optim.Adadelta,
    "Adafactor": torch.optim.Adafactor,
    "Adagrad": torch.optim.Adagrad,
    "Adam": torch.optim.Adam,
    "Adam amsgrad": lambda parameters: torch.optim.Adam(parameters, amsgrad=True),
    "Adamax": torch.optim.Adamax,
    "AdamW": torch.optim.AdamW,
    "AdamW foreach": lambda parameters: torch.optim.AdamW(parameters, foreach=True),
    "AdamW fused": lambda parameters: torch.optim.AdamW(parameters, fused=True),
    "ASGD": torch.optim.ASGD,
    "LBFGS": lambda parameters: torch.optim.LBFGS(parameters, max_iter=2),
    "Muon": lambda parameters: torch.optim.Muon([one for one in parameters if one.dim() == 2]),
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
    "RMSprop": torch.optim.RMSprop,
    "Rprop": torch.optim.Rprop,
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "SGD fused": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, fused=True),
}


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, seed: int = 1) -> None:
    """One step of any optimizer."""

    def closure() -> float:
        optimizer.zero_grad()
        backward(model, seed)
        return 1.0

    if isinstance(optimizer, torch.optim.LBFGS):
        optimizer.step(closure)
    else:
        closure()
        optimizer.step()


def save(
    manager: dt.CheckpointManager, model: torch.nn.Module, number: int = 1, **more: object
) -> tuple[dt.SaveHandle, dict[str, torch.Tensor]]:
    """Begins a save; gives what the model holds at that moment."""
    expected = copy_of(model.state_dict())
    return manager.save_async({"model": model, **more}, number), expected


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_of_any_optimizer_waits_for_what_it_changes(name, manager, jobs):
    model = make_model()
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    step(model, optimizer)
    handle, expected = save(manager, model, optimizer=optimizer)
    of_optimizer = state_of(model, optimizer)
    asked = len(jobs.asked)
    step(model, optimizer, seed=2)
    assert len(jobs.asked) > asked, "nothing was late"
    assert not torch.equal(model[0].weight, expected["0.weight"])
    jobs.release()
    assert_saved(manager, handle, expected)
    found = copy_of({"state": manager.load_checkpoint(step=1)["optimizer"]["state"]})
    assert [key for key in of_optimizer if not torch.equal(found[key], of_optimizer[key])] == []


def test_every_optimizer_of_torch_is_tried():
    there = {
        name
        for name in torch.optim.__all__
        if isinstance(found := getattr(torch.optim, name), type)
        and issubclass(found, torch.optim.Optimizer)
        and found is not torch.optim.Optimizer
    }
    # Sparse gradients need a model of their own; see below.
    assert there - {name.split()[0] for name in OPTIMIZERS} == {"SparseAdam"}


def test_a_step_on_sparse_gradients_waits(manager, jobs):
    model = torch.nn.Embedding(SIZE, SIZE, sparse=True)
    optimizer = torch.optim.SparseAdam(list(model.parameters()))

    def on_rows(*rows: int) -> None:
        optimizer.zero_grad()
        model(torch.tensor(rows)).square().sum().backward()
        optimizer.step()

    on_rows(1, 2)
    handle, expected = save(manager, model)
    on_rows(2, 3)
    jobs.release()
    assert_saved(manager, handle, expected)


@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_compiled_step_waits(fullgraph, manager, jobs):
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    compiled = torch.compile(optimizer.step, backend="eager", fullgraph=fullgraph)
    for seed in (1, 2):
        backward(model, seed)
        compiled()
        handle, expected = save(manager, model, seed)
        backward(model, 3)
        compiled()
    jobs.release()
    assert_saved(manager, handle, expected)


def test_a_step_inside_of_a_compiled_function_waits(manager, jobs):
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())

    @torch.compile(backend="eager")
    def train() -> None:
        optimizer.step()

    backward(model)
    train()
    handle, expected = save(manager, model)
    train()
    jobs.release()
    assert_saved(manager, handle, expected)


def test_a_function_that_is_compiled_whole_and_steps_is_refused_with_what_to_do(manager):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters())
    backward(model)
    with pytest.raises(Exception, match="consistency='immediate'"):
        torch.compile(lambda: optimizer.step(), backend="eager", fullgraph=True)()


def test_a_scaled_step_waits(manager, jobs):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1)

    def scaled_step() -> None:
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(2, SIZE)).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()

    scaled_step()
    handle, expected = save(manager, model, scaler=scaler)
    scale = scaler.get_scale()
    scaled_step()
    jobs.release()
    assert_saved(manager, handle, expected)
    assert manager.load_checkpoint(step=1)["scaler"]["scale"] == scale != scaler.get_scale()


def test_micro_batches_wait_for_nothing_and_their_step_does(manager, jobs):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step(model, optimizer)
    handle, expected = save(manager, model)
    asked = len(jobs.asked)
    for seed in range(3):
        backward(model, seed)
    assert len(jobs.asked) == asked
    optimizer.step()
    assert len(jobs.asked) > asked
    jobs.release()
    assert_saved(manager, handle, expected)


def test_an_optimizer_in_the_backward_pass_waits_for_its_own_parameter_alone(manager, jobs):
    model = make_model(layers=3)
    waited: list[list[int]] = []
    optimizers = {one: torch.optim.SGD([one], lr=0.1) for one in model.parameters()}

    def step_one(parameter: torch.nn.Parameter) -> None:
        asked = len(jobs.asked)
        optimizers[parameter].step()
        waited.append(jobs.asked[asked:])
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step_one)
    backward(model)
    handle, expected = save(manager, model)
    waited.clear()
    backward(model, 2)
    late = [numbers for numbers in waited if numbers]
    assert sorted(map(len, late)) == [1, 1, 1] and len({numbers[0] for numbers in late}) == 3
    jobs.release()
    assert_saved(manager, handle, expected)


def test_of_several_optimizers_each_waits_for_what_it_owns_when_it_steps(manager, jobs):
    one, other = make_model(seed=1), make_model(seed=2)
    models = torch.nn.ModuleList([one, other])
    first, second = (torch.optim.SGD(model.parameters(), lr=0.1) for model in (one, other))
    step(one, first)
    step(other, second)
    handle, expected = save(manager, models)
    # What it did not own when the save was begun.
    first.add_param_group({"params": [other[0].weight]})
    backward(one)
    backward(other)
    first.step()
    assert not torch.equal(other[0].weight, expected["1.0.weight"])
    jobs.release()
    assert_saved(manager, handle, expected)


def test_a_new_optimizer_of_the_same_parameters_waits(manager, jobs):
    model, unrelated = make_model(), make_model()
    step(model, torch.optim.SGD(model.parameters(), lr=0.1))
    kept = torch.optim.SGD(unrelated.parameters(), lr=0.1)
    step(unrelated, kept)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step(model, optimizer)
    handle, expected = save(manager, model)
    successor = torch.optim.AdamW(model.parameters())
    step(model, successor)
    jobs.release()
    assert_saved(manager, handle, expected)


def test_the_step_that_a_getter_of_torch_makes_on_a_fresh_optimizer_waits(manager, jobs):
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    manager.guard(optimizer)
    handle, expected = save(manager, model)
    asked = len(jobs.asked)
    get_optimizer_state_dict(model, optimizer)
    assert len(jobs.asked) > asked
    step(model, optimizer)
    jobs.release()
    assert_saved(manager, handle, expected)


def test_an_optimizer_that_was_never_seen_leaves_nothing_late(manager, jobs):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle, expected = save(manager, model, optimizer=optimizer)
    with torch.no_grad():
        model[0].weight.zero_()
    jobs.release()
    assert_saved(manager, handle, expected)


def test_only_an_optimizer_can_be_guarded(manager):
    with pytest.raises(InvalidArgument, match="this is a Linear"):
        manager.guard(torch.nn.Linear(1, 1))


def test_what_no_optimizer_owns_may_change_at_once(manager, jobs):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step(model, optimizer)
    norm = torch.nn.BatchNorm1d(1 << 14)
    average = copy.deepcopy(model)
    queue, values = torch.zeros(SIZE, SIZE), {"best": torch.ones(3)}
    state = {"model": model, "norm": norm, "average": average, "queue": queue, "values": values}
    expected = copy_of(
        {"norm": norm.state_dict(), "average": average.state_dict(), "queue": queue, "values": values}
    )
    handle = manager.save_async(state, 1)
    norm(torch.randn(2, 1 << 14))
    with torch.no_grad():
        for kept, trained in zip(average.parameters(), model.parameters(), strict=True):
            kept.lerp_(trained + 1, 0.5)
    queue.add_(1)
    values["best"].zero_()
    jobs.release()
    info = handle.result(60)
    found = copy_of(manager.load_checkpoint(step=info.step))
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []


def test_what_was_deferred_is_late_and_before_update_waits_for_it(manager, jobs):
    average = make_model()
    manager.defer(average.parameters())
    handle, expected = save(manager, average)
    asked = len(jobs.asked)
    manager.before_update()
    assert len(jobs.asked) > asked
    with torch.no_grad():
        average[0].weight.zero_()
    jobs.release()
    assert_saved(manager, handle, expected)


def test_what_was_deferred_and_died_does_not_make_its_successor_late(manager, jobs):
    manager.defer([torch.zeros(SIZE, SIZE) for _ in range(3)])
    successors = {str(number): torch.ones(SIZE, SIZE) for number in range(6)}
    handle = manager.save_async({"model": successors}, 1)
    expected = copy_of(successors)
    for tensor in successors.values():
        tensor.zero_()
    jobs.release()
    assert_saved(manager, handle, expected)


def test_only_tensors_can_be_deferred(manager):
    with pytest.raises(InvalidArgument, match="this is a Linear"):
        manager.defer([torch.nn.Linear(1, 1)])


def test_before_update_without_a_save_returns(manager):
    manager.before_update()


@pytest.mark.parametrize("by", ["consistency", "save"])
def test_nothing_is_late_in_an_immediate_save(by, tmp_path, jobs):
    model = make_model()
    step(model, torch.optim.SGD(model.parameters(), lr=0.1))
    jobs.release()
    consistency = "immediate" if by == "consistency" else "optimizer"
    with dt.CheckpointManager(tmp_path, consistency=consistency, timeout=30) as manager:
        if by == "consistency":
            handle, expected = save(manager, model)
            assert handle.staged()
            with torch.no_grad():
                model[0].weight.zero_()
            assert_saved(manager, handle, expected)
        else:
            manager.save({"model": model}, 1)
    assert jobs.asked == [0, 1]


def test_a_handle_tells_when_all_is_staged(manager, jobs):
    model = make_model()
    step(model, torch.optim.SGD(model.parameters(), lr=0.1))
    handle, _ = save(manager, model)
    assert not handle.staged()
    jobs.release()
    handle.result(60)
    assert handle.staged()


def test_a_load_waits_for_what_is_still_copied(manager, jobs):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step(model, optimizer)
    manager.save({"model": model}, 1)
    step(model, optimizer)
    handle, expected = save(manager, model, 2)
    handle.add_done_callback(lambda _: order.append("saved"))
    order: list[str] = []
    jobs.release()
    manager.load({"model": model}, step=1)
    order.append("loaded")
    assert order == ["saved", "loaded"]
    assert_saved(manager, handle, expected)


def test_two_managers_are_both_waited_for(tmp_path, jobs):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step(model, optimizer)
    with (
        dt.CheckpointManager(tmp_path / "one", timeout=30) as one,
        dt.CheckpointManager(tmp_path / "two", timeout=30) as two,
    ):
        saves = [(manager, *save(manager, model)) for manager in (one, two)]
        step(model, optimizer)
        jobs.release()
        for manager, handle, expected in saves:
            assert_saved(manager, handle, expected)


def test_the_door_stands_once_for_all_managers(tmp_path):
    managers = [dt.CheckpointManager(tmp_path) for _ in range(3)]
    DOOR.stand()
    ours = [hook for hook in _global_optimizer_pre_hooks.values() if getattr(hook, "__self__", None) is DOOR]
    assert len(ours) == 1
    for made in managers:
        made.close()


def test_a_forked_child_waits_for_nothing(manager, jobs):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step(model, optimizer)
    handle, expected = save(manager, model)
    child = os.fork()
    if child == 0:
        asked = len(jobs.asked)
        optimizer.step()
        os._exit(len(jobs.asked) - asked)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    jobs.release()
    assert_saved(manager, handle, expected)


def test_the_wait_of_a_step_is_part_of_what_the_save_cost(manager, jobs):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step(model, optimizer)
    handle, _ = save(manager, model)
    assert handle.metrics.door_seconds == 0
    step(model, optimizer)
    assert handle.metrics.door_seconds > 0
    assert handle.metrics.stall_seconds == handle.metrics.call_seconds + handle.metrics.door_seconds
    jobs.release()
    handle.result(60)
    assert handle.metrics.staging_seconds > 0
    assert handle.metrics.staged_bytes == sum(tensor.nbytes for tensor in model.state_dict().values())


def test_a_closed_manager_keeps_nothing_of_what_it_staged(tmp_path):
    model = make_model()
    step(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with dt.CheckpointManager(tmp_path) as manager:
        handle, _ = save(manager, model)
        handle.result(60)
        arena = weakref.ref(manager._saver._stager.arena)
        assert arena() is not None
    gc.collect()
    assert arena() is None and handle.staged()
