"""What a watch notices of host memory that is still to be copied."""

from __future__ import annotations

import pytest
import torch

from dtruntime_torch.checkpoint.staging.watch import Watch


@pytest.mark.parametrize("nbytes", [0, 1 << 20])
def test_memory_that_a_storage_gave_back_is_a_change(nbytes):
    weight = torch.zeros(4096)
    watch = Watch({3: weight, 5: torch.zeros(4)}, chunk_bytes=4096)
    weight.untyped_storage().resize_(nbytes)
    watch.let_go([3, 5])
    assert watch.moved == [3]


def test_another_storage_under_the_same_parameter_is_none():
    weight = torch.nn.Parameter(torch.zeros(4096))
    watch = Watch({3: weight.detach()}, chunk_bytes=4096)
    weight.data = torch.ones(4096)
    watch.let_go([3])
    assert watch.moved == []


def test_a_tensor_of_inference_mode_is_watched_too():
    with torch.inference_mode():
        weight = torch.zeros(4096)
    watch = Watch({3: weight, 5: torch.zeros(4)}, chunk_bytes=4096)
    weight.untyped_storage().resize_(0)
    watch.let_go([3, 5])
    assert watch.moved == [3]


def test_a_change_after_somebody_let_go_is_none():
    weight = torch.zeros(4096)
    watch = Watch({3: weight}, chunk_bytes=4096)
    watch.let_go([3])
    weight.add_(1)
    watch.let_go([3])
    assert watch.moved == []
