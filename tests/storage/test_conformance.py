from __future__ import annotations

import errno
from pathlib import Path

import pytest

from dtruntime_torch.storage import LocalBackend, MemoryBackend
from dtruntime_torch.storage.system_calls import SystemCalls
from dtruntime_torch.testing.faulty_backend import FaultyBackend
from dtruntime_torch.testing.storage_conformance import StorageConformance


class NoLinks(SystemCalls):
    """A file system without hard links, as FUSE and SMB often are."""

    def link(self, source: str, target: str) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")


class TestLocalBackend(StorageConformance):
    @pytest.fixture
    def backend(self, tmp_path: Path) -> LocalBackend:
        return LocalBackend(tmp_path / "not" / "yet" / "there")


class TestLocalBackendWithoutLinks(StorageConformance):
    @pytest.fixture
    def backend(self, tmp_path: Path) -> LocalBackend:
        return LocalBackend(tmp_path, calls=NoLinks())


class TestMemoryBackend(StorageConformance):
    @pytest.fixture
    def backend(self) -> MemoryBackend:
        return MemoryBackend()


class TestFaultyBackendWithoutRules(StorageConformance):
    @pytest.fixture
    def backend(self) -> FaultyBackend:
        return FaultyBackend(MemoryBackend())


class TestFaultyBackendWithoutRulesThatReadsChunks(StorageConformance):
    @pytest.fixture
    def backend(self, tmp_path: Path) -> FaultyBackend:
        return FaultyBackend(LocalBackend(tmp_path))
