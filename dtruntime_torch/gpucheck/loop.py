"""A training loop: what a save is made of, and what it must not disturb."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from dtruntime_torch.checkpoint.flatten import flatten_state
from dtruntime_torch.gpucheck.device import Bench
from dtruntime_torch.gpucheck.sizes import Sizes


class Loop:
    """A model like a small transformer, an optimizer, and the same batch again and again.

    Attributes:
        nbytes: of the state that is saved.
    """

    def __init__(self, bench: Bench, sizes: Sizes) -> None:
        torch.manual_seed(15)
        layers = [
            nn.TransformerEncoderLayer(
                sizes.width, sizes.width // 64, 4 * sizes.width, dropout=0.0, batch_first=True
            )
            for _ in range(sizes.layers)
        ]
        self._model = nn.Sequential(*layers).to(bench.torch_device)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-4)
        self._batch = torch.randn(sizes.samples, sizes.tokens, sizes.width, device=bench.torch_device)
        # The optimizer makes its state in its first step.
        self.step()
        self.nbytes = sum(tensor.nbytes for tensor in self.tensors())

    def state(self) -> dict[str, object]:
        """As one gives it to a manager."""
        return {"model": self._model, "optimizer": self._optimizer}

    def state_dict(self) -> dict[str, object]:
        """As one gives it to DCP."""
        return {"model": self._model.state_dict(), "optimizer": self._optimizer.state_dict()}

    def tensors(self) -> list[torch.Tensor]:
        """All that is saved, by itself."""
        return list(flatten_state(self.state(), rank=0).tensors.values())

    def before_overwrite(self, call: Callable[[], object]) -> RemovableHandle:
        """Calls it before each step of the optimizer, which is what overwrites the state."""

        def hook(*_: object) -> None:
            # Whatever it returned would be taken for arguments of the step.
            call()

        return self._optimizer.register_step_pre_hook(hook)

    def step(self) -> None:
        """One step of training; it goes on when this returns."""
        self._optimizer.zero_grad()
        self._model(self._batch).square().mean().backward()
        self._optimizer.step()
