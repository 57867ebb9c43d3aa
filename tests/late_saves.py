"""What the tests of late copies share: a loop whose copies are as late as can be, and what was saved."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import dtruntime_torch as dt
from tests.checkpoint.late_jobs import LateJobs, late_copies

SIZE = 128
"""A weight of so many rows and columns is large enough to be late."""


@pytest.fixture
def jobs() -> Iterator[LateJobs]:
    """Copies get nowhere in the background until they are released."""
    with late_copies() as made:
        yield made


@pytest.fixture
def manager(tmp_path) -> Iterator[dt.CheckpointManager]:
    """Saves into a folder of its own."""
    with dt.CheckpointManager(tmp_path, keep_last_n=None) as made:
        yield made


def make_model(layers: int = 1, seed: int = 0) -> torch.nn.Sequential:
    """Linear layers whose weights are large enough."""
    torch.manual_seed(seed)
    return torch.nn.Sequential(*(torch.nn.Linear(SIZE, SIZE) for _ in range(layers)))


def backward(model: torch.nn.Module, seed: int = 1) -> None:
    """Makes gradients."""
    generator = torch.Generator().manual_seed(seed)
    model(torch.randn(4, SIZE, generator=generator)).square().mean().backward()


def copy_of(state: dict[str, object]) -> dict[str, torch.Tensor]:
    """The tensors of a nested state dict, by their path, as they are now."""
    found: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        if isinstance(value, torch.Tensor):
            found[str(key)] = value.detach().clone()
        elif isinstance(value, dict):
            found.update({f"{key}.{name}": tensor for name, tensor in copy_of(value).items()})
    return found


def assert_saved(
    manager: dt.CheckpointManager,
    handle: dt.SaveHandle,
    expected: dict[str, torch.Tensor],
    name: str = "model",
) -> None:
    """What was saved under a name is what was expected, bit for bit."""
    info = handle.result(60)
    found = copy_of(manager.load_checkpoint(step=info.step)[name])
    assert found.keys() == expected.keys()
    differing = [key for key in found if not torch.equal(found[key], expected[key])]
    assert differing == []


def state_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The tensors of an optimizer's state by the names that a checkpoint gives them, as they are now."""
    named = {name: optimizer.state[one] for name, one in model.named_parameters() if one in optimizer.state}
    return copy_of({"state": named})


def fused(parameters: object) -> torch.optim.Optimizer:
    """Its steps change memory without torch counting that."""
    return torch.optim.AdamW(parameters, fused=True)  # type: ignore[arg-type]


def trained() -> tuple[torch.nn.Sequential, torch.optim.Optimizer]:
    """A model whose optimizer has stepped."""
    model = make_model()
    optimizer = fused(model.parameters())
    backward(model)
    optimizer.step()
    return model, optimizer


class SaveOnce:
    """Saves when it is called first, as a hook or a closure of a step."""

    def __init__(self, manager: dt.CheckpointManager, model: torch.nn.Module) -> None:
        self.manager = manager
        self.model = model
        self.handle: dt.SaveHandle | None = None
        self.expected: dict[str, torch.Tensor] = {}

    def __call__(self, *_: object) -> None:
        if self.handle is None:
            self.expected = copy_of(self.model.state_dict())
            self.handle = self.manager.save_async({"model": self.model}, 1)

    def assert_saved(self) -> None:
        assert self.handle is not None
        assert any(not torch.equal(now, self.expected[key]) for key, now in self.model.state_dict().items())
        assert_saved(self.manager, self.handle, self.expected)
