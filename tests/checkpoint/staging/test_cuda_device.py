"""`CudaDevice` without a GPU: what it asks of torch, by the signatures of the torch that is installed."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import create_autospec

import pytest
import torch

from dtruntime_torch import _C
from dtruntime_torch.checkpoint.staging.device import CudaDevice


@pytest.fixture
def cuda(monkeypatch):
    fake = SimpleNamespace(
        **{
            name: create_autospec(getattr(torch.cuda, name))
            for name in ("Stream", "current_stream", "stream")
        }
    )
    fake.current_stream.return_value = SimpleNamespace(cuda_stream=77)
    monkeypatch.setattr(torch, "cuda", fake)
    return fake


def test_native_calls_go_to_its_device_and_to_the_stream_that_is_current_there(cuda):
    device = CudaDevice(2)
    assert (device.native, device.index, device.torch_device) == (_C, 2, torch.device("cuda", 2))
    with device.on_side():
        assert device.stream() == 77
    cuda.stream.assert_called_once_with(cuda.Stream.return_value)
    cuda.current_stream.assert_called_once_with(2)


@pytest.mark.parametrize("pinned", [False, True])
def test_its_kernels_write_pinned_arenas_only(cuda, pinned):
    assert CudaDevice(0).can_write(SimpleNamespace(pinned=pinned)) is pinned


def test_memory_that_it_shares_is_pinned_and_the_hosts_whatever_the_default_device(cuda, monkeypatch):
    empty = create_autospec(torch.zeros)
    monkeypatch.setattr(torch, "empty", empty)
    assert CudaDevice(0).host_memory(48) is empty.return_value
    empty.assert_called_once_with(48, dtype=torch.uint8, device="cpu", pin_memory=True)
