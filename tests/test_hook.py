"""CheckpointHook on one process: what it saves and when, and that a loop goes on bit for bit."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import dtruntime_torch as dt
from dtruntime_torch.errors import CheckpointMismatch, CorruptCheckpoint, InvalidArgument
from tests.late_saves import assert_saved, backward, copy_of, jobs, make_model

__all__ = ["jobs"]


class Average:
    """An exponential moving average of the weights, as users write it."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.weights = [p.detach().clone() for p in model.parameters()]

    def update(self, model: torch.nn.Module) -> None:
        for mine, current in zip(self.weights, model.parameters(), strict=True):
            mine.lerp_(current.detach(), 0.5)

    def state_dict(self) -> dict[str, object]:
        return {"weights": self.weights}

    def load_state_dict(self, state: dict[str, object]) -> None:
        self.weights = state["weights"]  # type: ignore[assignment]


class Loop:
    """A training loop with all that a hook saves."""

    def __init__(
        self, backend: dt.StorageBackend, workers: int = 0, every: int = 2, **options: object
    ) -> None:
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(11)
        self.model = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 50)
        self.average = Average(self.model)
        data = torch.arange(20.0)
        self.sampler = dt.ElasticDistributedSampler(data, num_replicas=1, rank=0)
        self.loader: DataLoader[torch.Tensor] = DataLoader(data, 4, sampler=self.sampler, num_workers=workers)
        self.hook = dt.CheckpointHook(
            dt.CheckpointManager(backend),
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            sampler=self.sampler,
            every_n_steps=every,
            extra={"average": self.average},
            **options,
        )

    def run(self, stop: int) -> list[object]:
        seen: list[object] = []
        step = self.hook.restore()
        for epoch in range(self.sampler.epoch, 100):
            self.sampler.set_epoch(epoch)
            for batch in self.hook.track(self.loader):
                self.optimizer.zero_grad()
                self.model(batch[:, None]).square().mean().backward()
                self.optimizer.step()
                self.scheduler.step()
                self.average.update(self.model)
                seen.append((batch.tolist(), random.random(), np.random.rand(), torch.rand(()).item()))
                self.hook.step()
                step += 1
                if step == stop:
                    self.hook.manager.close()
                    return seen
        raise AssertionError("the loop ended early")

    def weights(self) -> list[list[float]]:
        return [p.detach().flatten().tolist() for p in [*self.model.parameters(), *self.average.weights]]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("killed_at", [2, 4, 5, 7, 10])
def test_an_interrupted_loop_goes_on_bit_for_bit(workers, killed_at):
    straight = Loop(dt.MemoryBackend(), workers)
    expected = straight.run(12)
    backend = dt.MemoryBackend()
    Loop(backend, workers).run(killed_at)
    resumed = Loop(backend, workers)
    saved = killed_at - killed_at % 2
    assert resumed.run(12) == expected[saved:]
    assert resumed.weights() == straight.weights()


def test_restore_of_nothing_is_step_zero():
    assert Loop(dt.MemoryBackend()).hook.restore() == 0


def test_a_restore_of_all_or_nothing_leaves_what_is_there_when_the_bytes_are_damaged(tmp_path):
    model = torch.nn.Linear(8, 8, bias=False)
    with dt.CheckpointManager(tmp_path) as manager:
        hook = dt.CheckpointHook(manager, model=model, optimizer=torch.optim.SGD(model.parameters(), 0.1))
        info = hook.save().result()
        (data,) = (tmp_path / info.path).glob("*.safetensors")
        weight = model.weight.detach().numpy().tobytes()
        data.write_bytes(data.read_bytes().replace(weight, bytes(len(weight))))
        torch.nn.init.constant_(model.weight, 7.0)
        with pytest.raises(CorruptCheckpoint), pytest.warns(RuntimeWarning):
            hook.restore(all_or_nothing=True)
    assert torch.equal(model.weight, torch.full((8, 8), 7.0))


def test_it_saves_every_n_steps():
    backend = dt.MemoryBackend()
    Loop(backend, every=3).run(8)
    assert [info.step for info in dt.CheckpointManager(backend).list()] == [3, 6]


def test_it_tells_what_saving_cost():
    loop = Loop(dt.MemoryBackend())
    loop.run(4)
    assert loop.hook.last_save is not None and loop.hook.last_save.result().step == 4
    assert loop.hook.stall_seconds >= loop.hook.last_save.metrics.stall_seconds > 0


def test_what_is_told_at_each_save_chooses_the_best():
    backend, losses = dt.MemoryBackend(), iter([0.5, 0.1, 0.9, 0.7])
    model = torch.nn.Linear(1, 1)
    manager = dt.CheckpointManager(backend, keep_last_n=1, keep_best=dt.KeepBest("loss"))
    hook = dt.CheckpointHook(
        manager,
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        every_n_steps=1,
        metadata=lambda: {"loss": next(losses)},
    )
    for _ in range(4):
        hook.step()
    manager.close()
    assert [(info.step, info.metadata) for info in manager.list()] == [(2, {"loss": 0.1}), (4, {"loss": 0.7})]


def test_metadata_that_is_no_function_is_refused():
    with pytest.raises(InvalidArgument, match="metadata"):
        Loop(dt.MemoryBackend(), metadata={"loss": 1})


def test_several_optimizers_are_saved_by_their_place():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9) for layer in model]
    model(torch.ones(1, 2)).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    manager = dt.CheckpointManager(dt.MemoryBackend())
    hook = dt.CheckpointHook(manager, model=model, optimizer=optimizers, every_n_steps=1)
    hook.step()
    fresh = [torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9) for layer in model]
    assert dt.CheckpointHook(manager, model=model, optimizer=fresh).restore() == 1
    for old, new in zip(optimizers, fresh, strict=True):
        for parameter in old.param_groups[0]["params"]:
            momenta = [optimizer.state[parameter]["momentum_buffer"] for optimizer in (old, new)]
            assert torch.equal(*momenta)


def test_a_loop_without_a_scheduler_does_not_take_a_checkpoint_that_has_one():
    backend = dt.MemoryBackend()
    loop = Loop(backend)
    loop.run(2)
    hook = dt.CheckpointHook(dt.CheckpointManager(backend), model=loop.model, optimizer=loop.optimizer)
    with pytest.raises(CheckpointMismatch, match="scheduler"):
        hook.restore()


def test_a_loader_that_does_not_draw_from_the_sampler_is_refused():
    loop = Loop(dt.MemoryBackend())
    with pytest.raises(InvalidArgument, match="sampler"):
        next(loop.hook.track(DataLoader(torch.arange(4))))


@pytest.mark.parametrize("name", ["model", "optimizer", "rng", "sampler"])
def test_extra_may_not_use_the_names_of_the_hook(name):
    loop = Loop(dt.MemoryBackend())
    with pytest.raises(InvalidArgument, match=name):
        dt.CheckpointHook(
            loop.hook.manager,
            model=loop.model,
            optimizer=loop.optimizer,
            sampler=loop.sampler,
            extra={name: 1},
        )


@pytest.mark.parametrize("every", [0, -1, 2.5, True])
def test_every_n_steps_is_at_least_one(every):
    with pytest.raises(InvalidArgument, match="every_n_steps"):
        Loop(dt.MemoryBackend(), every=every)


def test_a_sampler_of_another_dataset_is_refused_before_anything_is_changed():
    backend = dt.MemoryBackend()
    Loop(backend).run(2)
    loop = Loop(backend)
    before = loop.weights()
    loop.sampler = dt.ElasticDistributedSampler(range(19), num_replicas=1, rank=0)
    hook = dt.CheckpointHook(
        loop.hook.manager,
        model=loop.model,
        optimizer=loop.optimizer,
        scheduler=loop.scheduler,
        sampler=loop.sampler,
        extra={"average": loop.average},
    )
    with pytest.raises(InvalidArgument, match="dataset's length is 20"):
        hook.restore()
    assert loop.weights() == before


@pytest.mark.parametrize("at", ["before the first epoch", "between two epochs"])
def test_a_save_outside_of_an_epoch_goes_on_bit_for_bit(at):
    def draw_epoch(loop: Loop) -> list[float]:
        return [torch.rand(()).item() for _ in loop.hook.track(loop.loader)]

    backend = dt.MemoryBackend()
    loop = Loop(backend)
    if at == "between two epochs":
        draw_epoch(loop)
        loop.sampler.set_epoch(1)
    loop.hook.save().result()
    expected = draw_epoch(loop)
    resumed = Loop(backend)
    resumed.hook.restore()
    assert draw_epoch(resumed) == expected


def make_late_loop(
    folder: Path, **options: Any
) -> tuple[dt.CheckpointHook, torch.nn.Module, torch.optim.Optimizer]:
    """A hook that saves at each step a model that is large enough to be late."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    manager = dt.CheckpointManager(folder, timeout=60, **options)
    return dt.CheckpointHook(manager, model=model, optimizer=optimizer, every_n_steps=1), model, optimizer


def test_a_save_before_the_first_step_is_late_for_the_hook_guards_its_optimizers(tmp_path, jobs):
    hook, model, optimizer = make_late_loop(tmp_path)
    backward(model)
    expected = copy_of(model.state_dict())
    handle = hook.save()
    asked = len(jobs.asked)
    optimizer.step()
    assert len(jobs.asked) > asked
    jobs.release()
    assert_saved(hook.manager, handle, expected)


def test_the_first_save_of_a_loop_is_late_and_the_step_after_it_waits(tmp_path, jobs):
    hook, model, optimizer = make_late_loop(tmp_path)
    backward(model)
    optimizer.step()
    expected = copy_of(model.state_dict())
    hook.step()
    asked = len(jobs.asked)
    optimizer.step()
    assert len(jobs.asked) > asked
    assert not torch.equal(model.get_parameter("0.weight"), expected["0.weight"])
    jobs.release()
    assert hook.last_save is not None
    assert_saved(hook.manager, hook.last_save, expected)


def test_stall_seconds_count_steps_that_waited(tmp_path, jobs):
    hook, model, optimizer = make_late_loop(tmp_path)
    backward(model)
    hook.step()
    assert hook.last_save is not None and hook.stall_seconds == hook.last_save.metrics.call_seconds
    optimizer.step()
    first = hook.last_save.metrics
    assert hook.door_seconds == first.door_seconds > 0
    jobs.release()
    hook.step()
    last = hook.last_save.metrics
    assert hook.stall_seconds == pytest.approx(first.stall_seconds + last.stall_seconds)
    hook.manager.close()


def test_stall_seconds_count_the_steps_that_wait_while_saves_are_skipped(tmp_path, jobs):
    hook, model, optimizer = make_late_loop(tmp_path, on_busy="skip")
    backward(model)
    first = hook.save()
    skipped = hook.save()
    optimizer.step()
    assert skipped.done() and first.metrics.door_seconds > 0
    assert hook.door_seconds == first.metrics.door_seconds
    assert hook.call_seconds == first.metrics.call_seconds + skipped.metrics.call_seconds
    jobs.release()
    hook.manager.close()
