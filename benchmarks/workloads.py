"""What is saved, and the training step that changes it: a real one, with its optimizer from torch.optim.

Each rank holds tensors of its own, under names of its own, as with pipeline or expert parallelism: so all ways to save
have the same bytes to write, whatever they know of shards. A rank computes in one thread, as a loop that drives a device
leaves the other cores alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

Guard = Callable[[], AbstractContextManager[object]]
WIDTH = 1024
ROWS = 16
TOKENS = 8


@dataclass(frozen=True)
class Training:
    """A loop.

    Args:
        state: all tensors that it trains, by name: not copies.
        compute: forward and backward.
        optimizer: None where nothing is trained.
    """

    state: dict[str, Tensor]
    compute: Callable[[], None] = lambda: None
    optimizer: torch.optim.Optimizer | None = None

    def step(self, guard: Guard = nullcontext) -> None:
        """A training step.

        Args:
            guard: what the way to save wants around the optimizer's step.
        """
        self.compute()
        if self.optimizer is not None:
            with guard():
                self.optimizer.step()
            # Kept, for to give memory back and to take it again would be most of the noise.
            self.optimizer.zero_grad(set_to_none=False)


class Workload(Protocol):
    """What some ranks train and save; equal ones are the same."""

    def __call__(self, rank: int, ranks: int) -> Training:
        """Makes one rank's share."""


@dataclass(frozen=True)
class Matrices:
    """Square matrices, each with a momentum as large, that are trained by SGD.

    Args:
        nbytes: of all of that, on all ranks together.
    """

    nbytes: int

    def __call__(self, rank: int, ranks: int) -> Training:
        """Makes one rank's share."""
        generator = torch.Generator().manual_seed(rank)
        weights = [
            torch.nn.Parameter(torch.empty(WIDTH, WIDTH).normal_(generator=generator))
            for _ in range(self.nbytes // ranks // (2 * 4 * WIDTH * WIDTH))
        ]
        inputs = torch.empty(ROWS, WIDTH).normal_(generator=generator)
        optimizer = torch.optim.SGD(weights, lr=1e-6, momentum=0.9)

        def compute() -> None:
            for weight in weights:
                (inputs @ weight).square().mean().backward()  # type: ignore[no-untyped-call]

        names = {f"rank{rank}.layers.{number}.weight": weight for number, weight in enumerate(weights)}
        return _trained(names, compute, optimizer)


@dataclass(frozen=True)
class LanguageModel:
    """The model of the demo, larger, that is trained by AdamW on so few tokens that a step is short.

    Args:
        width: of its layers; a multiple of 64.
        layers: how many, on each rank.
    """

    width: int
    layers: int

    def __call__(self, rank: int, ranks: int) -> Training:
        """Makes one rank's share."""
        demo = importlib.import_module("examples.train_lm")
        torch.manual_seed(rank)
        model = demo.LanguageModel(self.width, self.width // 64, self.layers)
        tokens = torch.randint(256, (1, TOKENS + 1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

        def compute() -> None:
            logits = model(tokens[:, :-1])
            cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()  # type: ignore[no-untyped-call]

        names = {f"rank{rank}.{name}": parameter for name, parameter in model.named_parameters()}
        return _trained(names, compute, optimizer)


@dataclass(frozen=True)
class SmallTensors:
    """Many tensors that nothing trains.

    Args:
        count: how many, on all ranks together.
        nbytes: of each.
    """

    count: int
    nbytes: int

    def __call__(self, rank: int, ranks: int) -> Training:
        """Makes one rank's share."""
        generator = torch.Generator().manual_seed(rank)
        whole = torch.empty(self.count // ranks, self.nbytes // 4).normal_(generator=generator)
        return Training({f"rank{rank}.experts.{i}.bias": row.clone() for i, row in enumerate(whole)})


def _trained(
    parameters: dict[str, torch.nn.Parameter], compute: Callable[[], None], optimizer: torch.optim.Optimizer
) -> Training:
    """Takes a first step, after which the optimizer has its state, and the state is complete."""
    Training({}, compute, optimizer).step()
    state = {name: parameter.detach() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        state |= {f"{name}.{key}": value for key, value in optimizer.state[parameter].items()}
    return Training(state, compute, optimizer)
