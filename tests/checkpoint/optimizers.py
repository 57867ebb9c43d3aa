"""Every optimizer of torch that runs on the CPU, with a model and batches to train."""

from __future__ import annotations

from collections.abc import Callable

import torch

Make = Callable[[torch.nn.Module], torch.optim.Optimizer]


class Embedded(torch.nn.Module):
    """Gives sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(5, 3, sparse=True)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.table((batch * 100).long().abs() % 5)


def _two_groups(model: torch.nn.Module) -> list[dict[str, object]]:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": others, "lr": 0.02}]


OPTIMIZERS: dict[str, Make] = {
    "ASGD": lambda m: torch.optim.ASGD(m.parameters()),
    "Adadelta": lambda m: torch.optim.Adadelta(m.parameters()),
    "Adafactor": lambda m: torch.optim.Adafactor(m.parameters()),
    "Adagrad": lambda m: torch.optim.Adagrad(m.parameters()),
    "Adam": lambda m: torch.optim.Adam(m.parameters()),
    "Adam amsgrad": lambda m: torch.optim.Adam(m.parameters(), amsgrad=True, foreach=True),
    "Adam fused": lambda m: torch.optim.Adam(m.parameters(), fused=True),
    "Adam tensor lr": lambda m: torch.optim.Adam(m.parameters(), lr=torch.tensor(0.01), foreach=False),
    "AdamW": lambda m: torch.optim.AdamW(m.parameters()),
    "AdamW fused": lambda m: torch.optim.AdamW(m.parameters(), fused=True),
    "AdamW named": lambda m: torch.optim.AdamW(m.named_parameters()),
    "AdamW two groups": lambda m: torch.optim.AdamW(_two_groups(m)),
    "Adamax": lambda m: torch.optim.Adamax(m.parameters()),
    "LBFGS": lambda m: torch.optim.LBFGS(m.parameters(), lr=0.1, max_iter=3, history_size=4),
    "LBFGS line search": lambda m: torch.optim.LBFGS(
        m.parameters(), max_iter=3, line_search_fn="strong_wolfe"
    ),
    "Muon": lambda m: torch.optim.Muon([p for p in m.parameters() if p.dim() == 2]),
    "NAdam": lambda m: torch.optim.NAdam(m.parameters()),
    "RAdam": lambda m: torch.optim.RAdam(m.parameters()),
    "RMSprop": lambda m: torch.optim.RMSprop(m.parameters(), momentum=0.5, centered=True),
    "Rprop": lambda m: torch.optim.Rprop(m.parameters()),
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.1),
    "SGD momentum": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, nesterov=True),
    "SparseAdam": lambda m: torch.optim.SparseAdam(m.parameters()),
}


def make_model(kind: str) -> torch.nn.Module:
    """A model whose gradients suit that optimizer."""
    if kind == "SparseAdam":
        return Embedded()
    return torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.ReLU(), torch.nn.Linear(4, 2)
    )


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> None:
    """Takes steps on batches that the seed gives."""
    threads = torch.get_num_threads()
    # Several would wait for each other, on a busy machine for longer than anything here computes.
    torch.set_num_threads(1)
    try:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            _step(model, optimizer, torch.randn(6, 3, generator=generator))
    finally:
        torch.set_num_threads(threads)


def _step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: torch.Tensor) -> None:
    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value: torch.Tensor = model(batch).square().mean()
        value.backward()  # type: ignore[no-untyped-call]  # torch has no types there
        return value

    if isinstance(optimizer, torch.optim.LBFGS):
        optimizer.step(loss)  # type: ignore[arg-type]  # it says float and takes tensors
    else:
        loss()
        optimizer.step()
