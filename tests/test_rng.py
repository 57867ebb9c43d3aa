"""The generators of a process as one stateful object."""

from __future__ import annotations

import random

import numpy as np
import torch

from dtruntime_torch.checkpoint.flatten import flatten_state
from dtruntime_torch.rng import RngState


def draw() -> list[float]:
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(()).item()]


def test_all_generators_are_put_back():
    # One draw of a Gaussian leaves a second one cached, in Python and in NumPy.
    draw()
    state = RngState().state_dict()
    expected = draw()
    draw()
    RngState().load_state_dict(state)
    assert draw() == expected


def test_its_state_can_be_stored():
    assert {spec.fqn for spec in flatten_state({"rng": RngState()}, 0).specs.tensors} >= {
        "rng.torch",
        "rng.numpy.key",
    }


def test_one_seed_seeds_all_of_them():
    draws = []
    for _ in range(2):
        RngState().seed(2**63 - 1)
        draws.append(draw())
    assert draws[0] == draws[1]
