"""What the tests of cleaning stand on: a storage in memory whose calls can be made to fail."""

from __future__ import annotations

import pytest

from dtruntime_torch.storage import MemoryBackend
from dtruntime_torch.testing.faulty_backend import FaultyBackend
from tests.checkpoint.lineages import Shelf


@pytest.fixture
def backend():
    return FaultyBackend(MemoryBackend())


@pytest.fixture
def shelf(backend):
    return Shelf(backend)
