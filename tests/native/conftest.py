"""What several tests of the native module need."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from dtruntime_torch import _C
from tests.native.copy_jobs import LONG
from tests.native.shared_memory import file_of


@pytest.fixture
def name() -> Iterator[str]:
    """A name for shared memory that nothing bears, before the test and after it."""
    unique = f"dtruntime-test-{os.getpid()}-{os.urandom(4).hex()}"
    yield unique
    file_of(unique).unlink(missing_ok=True)


@pytest.fixture(scope="module")
def long_source() -> _C.Arena:
    return _C.Arena(LONG)  # all of it the one page of zeros: reading it takes no memory
