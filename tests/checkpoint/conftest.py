"""What the tests of the commit stand on: a backend whose calls can be made to fail, and a clock of their own."""

from __future__ import annotations

import pytest

from dtruntime_torch.storage import LocalBackend, MemoryBackend
from dtruntime_torch.storage.backend import reads_chunks
from dtruntime_torch.testing.faulty_backend import FaultyBackend
from tests.checkpoint.commits import Time


@pytest.fixture(params=["memory", "local"])
def inner(request, tmp_path):
    return MemoryBackend() if request.param == "memory" else LocalBackend(tmp_path)


@pytest.fixture
def backend(inner):
    return FaultyBackend(inner)


@pytest.fixture
def data_read(backend):
    """The call that brings the bytes of tensors from there: straight into place, or beside it."""
    return "read_range" if reads_chunks(backend) is None else "read_chunks"


@pytest.fixture
def time():
    return Time()
