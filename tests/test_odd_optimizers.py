"""Late saves and optimizers that hardly anybody has: no step changes what a save still has to read, and none fails."""

from __future__ import annotations

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.optim.optimizer import register_optimizer_step_post_hook

import dtruntime_torch as dt
from dtruntime_torch.checkpoint.staging.stager import Staging
from dtruntime_torch.errors import SaveFailed
from tests.late_saves import SaveOnce, assert_saved, backward, copy_of, jobs, make_model, manager, trained

__all__ = ["jobs", "manager"]


def test_a_save_behind_the_step_of_a_base_class_reads_nothing_late(manager, jobs):
    torch.optim.SGD(
        [torch.nn.Parameter(torch.zeros(1))], lr=0.1
    )  # torch gives a class its hooks with its first instance

    class Decaying(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            for parameter in self.param_groups[0]["params"]:
                parameter.data.mul_(0.5)

    model = make_model()
    optimizer = Decaying(model.parameters(), lr=0.1)
    backward(model)
    optimizer.step()
    save = SaveOnce(manager, model)
    handle = register_optimizer_step_post_hook(save)
    optimizer.step()
    handle.remove()
    jobs.release()
    save.assert_saved()


def test_after_a_step_that_raised_the_next_one_leaves_everything_late_again(manager, jobs):
    class Failing(torch.optim.SGD):
        fails = False

        def step(self, closure=None):
            super().step(closure)
            if self.fails:
                raise ValueError("no")

    model = make_model()
    optimizer = Failing(model.parameters(), lr=0.1)
    backward(model)
    optimizer.fails = True
    with pytest.raises(ValueError, match="no"):
        optimizer.step()
    optimizer.fails = False
    optimizer.step()
    expected = copy_of(model.state_dict())
    handle = manager.save_async({"model": model}, 1)
    assert not handle.staged()
    optimizer.step()
    jobs.release()
    assert_saved(manager, handle, expected)


class Opaque(torch.Tensor):
    """Has no memory that anybody could ask for."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Opaque:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)  # type: ignore[attr-defined, no-any-return]

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), options=None):
        raw = [one.inner if isinstance(one, Opaque) else one for one in arguments]
        result = function(*raw, **(options or {}))
        if function.__name__.partition(".")[0].endswith("_"):
            return arguments[0]
        return Opaque(result) if isinstance(result, torch.Tensor) else result


def test_a_step_of_an_optimizer_whose_memory_is_not_known_waits_for_everything(manager, jobs):
    model, _ = trained()
    opaque = torch.nn.Parameter(Opaque(torch.zeros(3)))
    handle, expected = manager.save_async({"model": model}, 1), copy_of(model.state_dict())
    asked = len(jobs.asked)
    torch.optim.SGD([opaque], lr=0.1, foreach=False).step()
    assert len(jobs.asked) > asked
    model[0].weight.data.zero_()
    jobs.release()
    assert_saved(manager, handle, expected)


def test_a_save_beside_an_optimizer_whose_memory_is_not_known_goes_well(manager, jobs):
    opaque = torch.nn.Parameter(Opaque(torch.zeros(3)))
    other = torch.optim.SGD([opaque], lr=0.1, foreach=False)
    other.step()
    model, optimizer = trained()
    handle, expected = manager.save_async({"model": model}, 1), copy_of(model.state_dict())
    optimizer.step()
    jobs.release()
    assert_saved(manager, handle, expected)
    assert other.param_groups


def test_a_step_that_cannot_wait_goes_on_and_that_save_fails(manager, jobs, monkeypatch):
    model, optimizer = trained()
    handle = manager.save_async({"model": model}, 1)

    def refuse(self, *_: object) -> None:
        raise SaveFailed("the device does not answer")

    with monkeypatch.context() as patch:
        patch.setattr(Staging, "before_overwrite", refuse)
        optimizer.step()
    jobs.release()
    with pytest.raises(
        SaveFailed, match="the step of an optimizer could not wait for this save.*does not answer"
    ):
        handle.result(60)
    assert manager.latest() is None


def test_a_load_through_dcp_waits_for_what_it_fills(manager, jobs, tmp_path):
    model, _ = trained()
    dcp.save(model.state_dict(), storage_writer=dt.StorageWriter(tmp_path / "dcp"), no_dist=True)
    model[0].weight.data.add_(1)
    handle, expected = manager.save_async({"model": model}, 1), copy_of(model.state_dict())
    dcp.load(model.state_dict(), storage_reader=dt.StorageReader(tmp_path / "dcp"), no_dist=True)
    assert not torch.equal(model[0].weight, expected["0.weight"])
    jobs.release()
    assert_saved(manager, handle, expected)
