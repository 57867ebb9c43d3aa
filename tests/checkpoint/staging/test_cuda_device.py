"""`CudaDevice` without a GPU: what it asks of torch, by the signatures of the torch that is installed."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import create_autospec

import pytest
import torch

from dtruntime_torch import _C
from dtruntime_torch.checkpoint.staging import device as device_module
from dtruntime_torch.checkpoint.staging.device import CudaDevice, CudaEvent


@pytest.fixture
def cuda(monkeypatch):
    names = ["Stream", "current_stream", "stream", "is_initialized", "is_current_stream_capturing", "device"]
    fake = SimpleNamespace(**{name: create_autospec(getattr(torch.cuda, name)) for name in names})
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


@pytest.fixture
def capture(cuda):
    """A graph that is being captured on the current stream of the device that is current."""
    cuda.is_current_stream_capturing.return_value = True
    return cuda


def test_a_capture_is_one_on_the_current_stream_of_its_device(capture):
    assert CudaDevice(2).capturing()
    capture.device.assert_called_once_with(2)
    capture.is_current_stream_capturing.return_value = False
    assert not CudaDevice(2).capturing()


def test_where_cuda_is_not_in_use_nothing_is_captured_and_cuda_not_asked(capture):
    capture.is_initialized.return_value = False
    assert not CudaDevice(2).capturing()
    capture.device.assert_not_called()
    capture.is_current_stream_capturing.assert_not_called()


@pytest.fixture
def modes(monkeypatch):
    """The modes that the driver was given for this thread; at first it is in mode 0."""
    seen = [0]

    def exchange(pointer):
        mode = pointer._obj
        before, seen[:] = seen[-1], [*seen, mode.value]
        mode.value = before

    monkeypatch.setattr(device_module, "_exchange_capture_mode", lambda: exchange)
    return seen


@pytest.mark.parametrize("ask", ["query", "synchronize"])
def test_an_event_is_asked_in_relaxed_mode_so_that_no_capture_is_spoiled(ask, modes):
    during = []
    event = CudaEvent(SimpleNamespace(**{ask: lambda: during.append(modes[-1])}))
    getattr(event, ask)()
    assert during == [device_module.CAPTURE_MODE_RELAXED] and modes == [0, 2, 0]


def test_the_mode_is_put_back_also_if_the_device_failed(modes):
    def fail():
        raise RuntimeError("CUDA error")

    with pytest.raises(RuntimeError, match="CUDA error"):
        CudaEvent(SimpleNamespace(synchronize=fail)).synchronize()
    assert modes == [0, 2, 0]


def test_where_the_driver_has_no_modes_events_are_asked_as_they_are(monkeypatch):
    monkeypatch.setattr(device_module, "_exchange_capture_mode", lambda: None)
    assert CudaEvent(SimpleNamespace(query=lambda: True)).query() is True


def no_driver():
    raise RuntimeError("CUDA driver version is insufficient for CUDA runtime version")


@pytest.mark.parametrize(("count", "has"), [(lambda: 3, True), (lambda: 2, False), (no_driver, False)])
def test_it_has_kernels_where_the_native_module_finds_the_device(cuda, monkeypatch, count, has):
    monkeypatch.setattr(_C, "cuda_device_count", count)
    device_module._kernels_reach.cache_clear()
    try:
        assert CudaDevice(2).has_kernels() is has
    finally:
        device_module._kernels_reach.cache_clear()
