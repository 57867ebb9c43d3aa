"""`CudaBench` without a GPU: it calls torch.cuda by the signatures of the torch that is installed, and in the right order."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from unittest.mock import create_autospec

import pytest
import torch

from dtruntime_torch.gpucheck import cuda_device

DEFAULT_STREAM = 7


class Graph:
    """A torch.cuda.CUDAGraph of what the stand-in is told."""

    def __init__(self) -> None:
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1


@pytest.fixture
def cuda(monkeypatch):
    """What each name of torch.cuda was called with, checked against its real signature; two devices, the first current."""
    real = torch.cuda
    named = ["current_device", "get_device_name", "device_count", "mem_get_info", "current_stream"]
    named += ["stream", "synchronize", "Stream", "Event", "graph", "CUDAGraph"]
    fake = SimpleNamespace(**{name: create_autospec(getattr(real, name)) for name in named})
    fake.current_device.return_value = 0
    fake.device_count.return_value = 2
    fake.get_device_name.return_value = "a GPU"
    fake.mem_get_info.return_value = (5, 9)
    fake.current_stream.return_value = SimpleNamespace(cuda_stream=DEFAULT_STREAM)
    fake.CUDAGraph.side_effect = Graph

    capturing = []

    @contextmanager
    def graph(captured):
        capturing.append(captured)
        yield
        capturing.pop()

    fake.graph.side_effect = graph
    fake.capturing = capturing
    monkeypatch.setattr(torch, "cuda", fake)
    monkeypatch.setattr(torch, "rand", lambda size, dtype, device: torch.zeros(1, dtype=dtype))
    return fake


def test_the_other_device_is_the_next_one_and_there_is_none_where_there_is_one(cuda):
    bench = cuda_device.CudaBench()
    assert bench.other_device() == torch.device("cuda", 1)
    cuda.current_device.return_value = 1
    assert cuda_device.CudaBench().other_device() == torch.device("cuda", 0)
    cuda.device_count.return_value = 1
    cuda.current_device.return_value = 0
    assert cuda_device.CudaBench().other_device() is None


def test_the_current_device_is_asked_for_anew(cuda):
    bench = cuda_device.CudaBench()
    cuda.current_device.return_value = 1
    assert (bench.index, bench.current_index()) == (0, 1)


def test_work_is_captured_into_the_graph_that_is_replayed(cuda):
    bench = cuda_device.CudaBench()
    result = torch.zeros(1)
    seen = []
    replay, found = bench.capture(lambda: seen.extend(cuda.capturing) or result)
    assert found is result and cuda.capturing == []
    (graph,) = seen
    replay()
    assert graph.replays == 1


def test_all_else_fits_the_signatures_too(cuda):
    bench = cuda_device.CudaBench()
    assert (bench.name, bench.free_bytes(), bench.stream()) == ("a GPU", 5, DEFAULT_STREAM)
    bench.on_side_stream()
    cuda.stream.assert_called_once_with(cuda.Stream.return_value)
    bench.record()
    cuda.Event.assert_called_once_with(enable_timing=True)
    bench.synchronize()
    cuda.synchronize.assert_called_once_with(0)


def test_its_managers_keep_the_newest_checkpoint_only(tmp_path):
    # Where there is no GPU the bench itself cannot be made.
    with cuda_device.CudaBench.manager(None, tmp_path) as manager:
        for step in (1, 2):
            manager.save({"weight": torch.zeros(3)}, step)
        assert [info.step for info in manager.list()] == [2]
