"""A sector that the device cannot read is damage, named as such; one that it reads at last is none."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from typing_extensions import Buffer

import dtruntime_torch as dt
from dtruntime_torch import RetryPolicy
from dtruntime_torch.checkpoint.cleaning.cleaner import Cleaner
from dtruntime_torch.checkpoint.info import CheckpointInfo
from dtruntime_torch.checkpoint.names import Attempt
from dtruntime_torch.checkpoint.verify import find_commit, verify
from dtruntime_torch.errors import CorruptCheckpoint, DTRuntimeError, StorageError
from dtruntime_torch.storage import LocalBackend, MemoryBackend, rereads, run_sync
from dtruntime_torch.storage.system_calls import SystemCalls
from dtruntime_torch.testing.faulty_backend import FaultyBackend, not_done, unreadable
from tests.checkpoint.thread_ranks import Rank, make_ranks, together

CHUNK = 4096  # of thread_ranks
FILES = [
    "*/step-00000002/*.safetensors",
    "*/step-00000002/*/shard*.json",
    "*/step-00000002/*/manifest.json",
    "*/commits/*2.json",
]


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rereads, "REREADS", RetryPolicy(attempts=3, initial=0.0))


def state(step: float) -> dict[str, torch.Tensor]:
    return {"w": torch.arange(3000.0) + step, "b": torch.full((10,), float(step))}


def saved(backend: FaultyBackend, ranks: int = 2) -> list[Rank]:
    """Two checkpoints of as many ranks."""
    made = make_ranks(ranks, backend)
    for step in (1, 2):
        results = together(*[partial(rank.save, state(step), step) for rank in made])
        assert all(isinstance(result, CheckpointInfo) for result in results), results
    return made


def path_of(backend: FaultyBackend, suffix: str) -> str:
    """The only file of step 2 that ends so."""
    (path,) = [e.path for e in run_sync(backend.list("")) if "00000002" in e.path and e.path.endswith(suffix)]
    return path


def place_of(backend: FaultyBackend, path: str, fqn: str) -> int:
    """Where a tensor begins in a file, as stock safetensors has it."""
    data = bytes(run_sync(backend.read(path)))
    length = 8 + int.from_bytes(data[:8], "little")
    begin: int = json.loads(data[8:length])[fqn]["data_offsets"][0]
    return length + begin


def load_all(
    ranks: list[Rank], step: int | None = None
) -> tuple[list[object], list[dict[str, torch.Tensor]]]:
    states = [state(0.0) for _ in ranks]
    return together(*[partial(r.load, s, step) for r, s in zip(ranks, states, strict=True)]), states


def is_state(found: dict[str, torch.Tensor], step: float) -> bool:
    return all(torch.equal(found[name], tensor) for name, tensor in state(step).items())


@pytest.mark.parametrize("pattern", FILES)
def test_what_cannot_be_read_sends_all_ranks_to_the_step_before(backend: FaultyBackend, pattern: str) -> None:
    ranks = saved(backend)
    backend.when("read*", pattern, unreadable(1), nth=None)
    with pytest.warns(RuntimeWarning, match=r"could not read it \(EIO\).*it is passed over"):
        results, states = load_all(ranks)
    assert [result.step for result in results if isinstance(result, CheckpointInfo)] == [1, 1], results
    assert all(is_state(found, 1) for found in states)


@pytest.mark.parametrize("pattern", FILES)
def test_over_a_network_it_is_an_outage_and_no_load_falls_back(backend: FaultyBackend, pattern: str) -> None:
    ranks = saved(backend, 1)
    backend.settle_seconds = 90.0
    backend.when("read*", pattern, unreadable(1), nth=None)
    (result,), (found,) = load_all(ranks)
    assert isinstance(result, StorageError) and not isinstance(result, CorruptCheckpoint), result
    assert is_state(found, 0)


@pytest.mark.parametrize("pattern", FILES)
def test_a_step_that_cannot_be_read_is_corrupt_where_it_was_asked_for(
    backend: FaultyBackend, pattern: str
) -> None:
    ranks = saved(backend)
    backend.when("read*", pattern, unreadable(1), nth=None)
    results, states = load_all(ranks, step=2)
    assert all(isinstance(result, CorruptCheckpoint) for result in results), results
    assert all("EIO" in str(result) for result in results)
    assert all(is_state(found, 0) for found in states)


@pytest.mark.parametrize("pattern", FILES)
@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_hiccup_costs_no_work(backend: FaultyBackend, pattern: str, nth: int) -> None:
    ranks = saved(backend)
    for again in (nth, nth + 1):
        backend.when("read*", pattern, unreadable(), nth=again)
    results, states = load_all(ranks)
    assert [result.step for result in results if isinstance(result, CheckpointInfo)] == [2, 2], results
    assert all(is_state(found, 2) for found in states)


@pytest.mark.parametrize("code", [errno.ESTALE, errno.ETIMEDOUT, errno.ENOMEM, errno.EACCES, None])
@pytest.mark.parametrize("pattern", FILES)
def test_what_is_not_of_the_device_stays_an_error(
    backend: FaultyBackend, pattern: str, code: int | None
) -> None:
    ranks = saved(backend)
    error = StorageError("the storage has a bad day")
    error.errno = code
    backend.when("read*", pattern, not_done(error), nth=None)
    results, states = load_all(ranks)
    assert all(isinstance(result, DTRuntimeError) for result in results)
    assert not any(isinstance(result, CorruptCheckpoint) for result in results)
    assert all("bad day" in str(result) for result in results)
    assert all(is_state(found, 0) for found in states)


def test_verify_names_the_chunk_that_cannot_be_read_and_checks_the_others() -> None:
    backend = FaultyBackend(MemoryBackend())
    with dt.CheckpointManager(backend, chunk_bytes=CHUNK) as manager:
        manager.save(state(2), 2)
        path = path_of(backend, ".safetensors")
        start = place_of(backend, path, "w") + CHUNK
        backend.when("read_range", path, unreadable(start + 7, start + 8), nth=None)
        done: list[tuple[int, int]] = []
        key = run_sync(find_commit(backend, "model"))
        (found,) = run_sync(verify(backend, "model", key, lambda *progress: done.append(progress))).damage
        assert (found.file, found.tensor, found.start, found.stop) == (path, "w", start, start + CHUNK)
        assert len(found.expected) == 32 and "EIO" in found.actual
    nbytes = sum(tensor.nbytes for tensor in state(2).values())
    assert done[-1] == (nbytes, nbytes)


@pytest.mark.parametrize("suffix", ["-of-00001.json", "manifest.json", "00000002.json"])
def test_verify_names_a_record_that_cannot_be_read(suffix: str) -> None:
    backend = FaultyBackend(MemoryBackend())
    with dt.CheckpointManager(backend) as manager:
        manager.save(state(2), 2)
        path = path_of(backend, suffix)
        length = run_sync(backend.size(path))
        backend.when("read", path, unreadable(3, 4), nth=None)
        (found,) = manager.verify(2).damage
    assert (found.file, found.tensor, found.start, found.stop) == (path, None, 0, length)
    assert "EIO" in found.actual


def test_a_header_that_cannot_be_read_is_damage() -> None:
    backend = FaultyBackend(MemoryBackend())
    with dt.CheckpointManager(backend) as manager:
        manager.save(state(2), 2)
        backend.when("read_range", "*.safetensors", unreadable(0, 8), nth=None)
        (found,) = manager.verify(2).damage
        assert (found.tensor, found.start) == (None, 0) and "EIO" in found.actual


def test_patience_is_spent_once_on_each_file() -> None:
    """A disk that has died would else ask for it at every chunk."""
    backend = FaultyBackend(MemoryBackend())
    with dt.CheckpointManager(backend, chunk_bytes=CHUNK) as manager:
        manager.save({"w": torch.zeros(100 * CHUNK // 4)}, 2)
        backend.when("read_range", "*.safetensors", unreadable(), nth=None)
        backend.calls.clear()
        report = manager.verify(2)
    assert len([found for found in report.damage if found.tensor == "w"]) == 100
    reads = [path for operation, path in backend.calls if operation == "read_range"]
    assert len(reads) == rereads.REREADS.attempts + 1 + 100  # the header; all together; each chunk


def test_nothing_is_deleted_while_a_manifest_cannot_be_read_and_it_can_be_dropped() -> None:
    backend = FaultyBackend(MemoryBackend())
    with dt.CheckpointManager(backend, keep_last_n=None) as manager:
        manager.save(state(1), 1)
        manager.save(state(2), 2)
    backend.when("read", "*/step-00000001/*/manifest.json", unreadable(), nth=None)
    with dt.CheckpointManager(backend, keep_last_n=1) as manager:
        report = manager.prune()
    assert report.commits == () and any("EIO" in why and "dtruntime drop" in why for why in report.blocked)
    run_sync(Cleaner(backend, "model").drop(Attempt(1, 1, 1)))
    assert not [entry.path for entry in run_sync(backend.list("model/step-00000001/"))]


class BadSector(SystemCalls):
    """A disk that cannot read one byte of one file."""

    AT = 1_500_000

    def __init__(self, inode: int) -> None:
        self._inode = inode

    def read_file(self, path: str, offset: int, length: int) -> Buffer:
        self._meet(path, offset, length)
        return super().read_file(path, offset, length)

    def read_into(self, path: str, offset: int, target: memoryview, direct: bool) -> None:
        self._meet(path, offset, target.nbytes)
        super().read_into(path, offset, target, direct)

    def read_and_digest(
        self, path: str, offsets: Sequence[int], into: Sequence[memoryview], chunk_bytes: int
    ) -> bytes:
        for offset, target in zip(offsets, into, strict=True):
            self._meet(path, offset, target.nbytes)
        return super().read_and_digest(path, offsets, into, chunk_bytes)

    def _meet(self, path: str, offset: int, length: int) -> None:
        if os.stat(path).st_ino == self._inode and offset <= self.AT < offset + length:
            raise OSError(errno.EIO, "Input/output error")


def test_on_a_local_disk_a_bad_sector_is_damage_too(tmp_path: Path) -> None:
    with dt.CheckpointManager(tmp_path) as manager:
        for step in (1, 2):
            manager.save({"w": torch.arange(1_000_000.0) + step}, step)
    (bad,) = tmp_path.glob("model/step-00000002/*/*.safetensors")
    target = {"w": torch.zeros(1_000_000)}
    disk = LocalBackend(tmp_path, calls=BadSector(bad.stat().st_ino))
    with dt.CheckpointManager(disk) as manager:
        with pytest.raises(CorruptCheckpoint) as caught:
            manager.load(target, step=2)
        (found,) = caught.value.damage
        assert found.tensor == "w" and found.start <= BadSector.AT < found.stop <= found.start + (1 << 20)
        assert manager.verify(2).damage == (found,)
        with pytest.warns(RuntimeWarning, match="passed over"):
            assert manager.load(target).step == 1
    assert torch.equal(target["w"], torch.arange(1_000_000.0) + 1)
