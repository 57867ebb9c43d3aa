"""Small models that are trained in one way each: a step is short beside the copies of what is saved of them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import nn

from dtruntime_torch.gpucheck.device import Bench

LAYERS = 3
ROWS = 4  # of the batch

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


class Trainee(Protocol):
    """What is trained.

    Attributes:
        state: what is saved of it.
    """

    state: dict[str, object]

    def train(self) -> None:
        """One step of training; it goes on when this returns."""


class Model:
    """What all have: layers, and the same batch again and again.

    Args:
        bench: where.
        nbytes: of the parameters, about.
    """

    def __init__(self, bench: Bench, nbytes: int) -> None:
        side = math.isqrt(nbytes // 4 // LAYERS)
        torch.manual_seed(16)
        self.model = nn.Sequential(*(nn.Linear(side, side) for _ in range(LAYERS))).to(bench.torch_device)
        self._batch = torch.randn(ROWS, side, device=bench.torch_device)
        self.state: dict[str, object] = {"model": self.model}

    def loss(self) -> torch.Tensor:
        """Of the batch."""
        output: torch.Tensor = self.model(self._batch)
        return output.square().mean()


class Stepped(Model):
    """An optimizer steps when the gradients are there.

    Args:
        bench, nbytes: as for `Model`.
        make: makes the optimizer.
    """

    def __init__(self, bench: Bench, nbytes: int, make: MakeOptimizer) -> None:
        super().__init__(bench, nbytes)
        self.optimizer = make(self.model.parameters())
        self.state["optimizer"] = self.optimizer

    def train(self) -> None:
        """As `Trainee.train`."""
        self.optimizer.zero_grad()
        torch.autograd.backward(self.loss())
        self.optimizer.step()

    def last_late(self) -> tuple[str, torch.Tensor]:
        """The tensor of the optimizer that comes last in a save, and its name there."""
        name, parameter = list(self.model.named_parameters())[-2]
        what, tensor = list(self.optimizer.state[parameter].items())[-1]
        return f"optimizer.state.{name}.{what}", tensor


class InBackward(Model):
    """Each parameter has an optimizer, which steps as soon as the gradient is there."""

    def __init__(self, bench: Bench, nbytes: int) -> None:
        super().__init__(bench, nbytes)
        self._own = {one: sgd([one]) for one in self.model.parameters()}
        for number, (one, optimizer) in enumerate(self._own.items()):
            one.register_post_accumulate_grad_hook(self._step_one)  # type: ignore[no-untyped-call]
            self.state[f"optimizer{number}"] = optimizer

    def train(self) -> None:
        """As `Trainee.train`."""
        torch.autograd.backward(self.loss())

    def _step_one(self, parameter: torch.Tensor) -> None:
        assert isinstance(parameter, nn.Parameter)
        self._own[parameter].step()
        parameter.grad = None


class Scaled(Stepped):
    """The loss is scaled, by another factor in each step; the scaler is saved, too."""

    def __init__(self, bench: Bench, nbytes: int) -> None:
        super().__init__(bench, nbytes, sgd)
        self._scaler = torch.amp.GradScaler(bench.torch_device.type, init_scale=4.0, growth_interval=1)
        self.state["scaler"] = self._scaler

    def train(self) -> None:
        """As `Trainee.train`."""
        self.optimizer.zero_grad()
        torch.autograd.backward(self._scaler.scale(self.loss()))
        self._scaler.step(self.optimizer)
        self._scaler.update()


class Averaged(Stepped):
    """Before anything else it moves an average of the weights, and a buffer, by hand and without asking."""

    def __init__(self, bench: Bench, nbytes: int) -> None:
        super().__init__(bench, nbytes, adamw_foreach)
        self._average = copy.deepcopy(self.model)
        self._seen = torch.zeros_like(next(self.model.parameters()).detach())
        self.model.register_buffer("seen", self._seen)
        self.state["average"] = self._average

    def train(self) -> None:
        """As `Trainee.train`."""
        self._seen.add_(1)
        with torch.no_grad():
            for kept, trained in zip(self._average.parameters(), self.model.parameters(), strict=True):
                kept.lerp_(trained, 0.5)
        super().train()


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """With momentum: without it there would be no state."""
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def adamw_foreach(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """What torch takes on a device by itself."""
    return torch.optim.AdamW(parameters, foreach=True)


def adamw_fused(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Its kernels change tensors without torch counting that."""
    return torch.optim.AdamW(parameters, fused=True)


def adamw_capturable(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Its step may be captured in a graph."""
    return torch.optim.AdamW(parameters, capturable=True)
