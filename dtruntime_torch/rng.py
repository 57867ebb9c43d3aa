"""The random number generators of this process, as one stateful object: Python, NumPy, torch, every device."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


class RngState:
    """Reads and sets the global generators; wrapped in `PerRank` it is part of a checkpoint.

    Attributes:
        loaded: the state that was loaded last, or None.
    """

    def __init__(self) -> None:
        self.loaded: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The state of all generators, as values that a checkpoint can hold."""
        numpy = np.random.get_state(legacy=False)
        return {
            "python": random.getstate(),
            "numpy": {
                "bit_generator": numpy["bit_generator"],
                "key": torch.from_numpy(numpy["state"]["key"].copy()),
                "pos": int(numpy["state"]["pos"]),
                "has_gauss": int(numpy["has_gauss"]),
                "gauss": float(numpy["gauss"]),
            },
            "torch": torch.get_rng_state(),
            "devices": {name: _device_states(name) for name in _device_types()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Sets all generators. Devices that this machine lacks are left out."""
        random.setstate(state["python"])
        numpy = state["numpy"]
        np.random.set_state(
            {
                "bit_generator": numpy["bit_generator"],
                "state": {"key": numpy["key"].numpy(), "pos": numpy["pos"]},
                "has_gauss": numpy["has_gauss"],
                "gauss": numpy["gauss"],
            }
        )
        torch.set_rng_state(state["torch"])
        for name in _device_types():
            for index, device_state in enumerate(state["devices"].get(name, [])):
                if index < torch.get_device_module(name).device_count():
                    torch.get_device_module(name).set_rng_state(device_state, index)
        self.loaded = state

    def seed(self, value: int) -> None:
        """Seeds all generators with one number."""
        random.seed(value)
        np.random.seed(value % 2**32)
        torch.manual_seed(value)


def _device_types() -> list[str]:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return [] if accelerator is None else [accelerator.type]


def _device_states(name: str) -> list[torch.Tensor]:
    module = torch.get_device_module(name)
    return [module.get_rng_state(index) for index in range(module.device_count())]
