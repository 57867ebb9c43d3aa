"""Names in /dev/shm that a killed load left are removed by the next one; those of the living stay, and so does all else."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from dtruntime_torch import _C
from dtruntime_torch.checkpoint.info import CheckpointInfo
from dtruntime_torch.checkpoint.loading import node_memory
from dtruntime_torch.storage import LocalBackend, MemoryBackend
from dtruntime_torch.storage.backend import StorageBackend
from tests.checkpoint.thread_ranks import make_ranks, together

SHARED = Path("/dev/shm")

# Two ranks load, and their process is killed when both have made their memory and one is about to attach.
KILLED = """
import os, signal, sys, torch
from functools import partial
from dtruntime_torch.checkpoint.loading import node_memory
from tests.checkpoint import thread_ranks
from tests.checkpoint.loading.test_shared_names import SharingBackend
thread_ranks.RUN_ID = sys.argv[2]
node_memory._attach = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
ranks = thread_ranks.make_ranks(2, SharingBackend(sys.argv[1]))
thread_ranks.together(*[partial(rank.load, {"w": torch.zeros(5000)}) for rank in ranks])
"""

# Makes a name as a load does, and keeps it until it is told to end.
LIVING = """
import sys
from dtruntime_torch import _C
arena = _C.Arena(10_000, name=sys.argv[1])
memoryview(arena)[:4] = b"live"
print("made", flush=True)
sys.stdin.read()
"""


class SharingBackend(LocalBackend):
    """A folder as other storage: what several ranks need they read into memory that they share."""

    read_chunks = None  # type: ignore[assignment]


@pytest.fixture
def run_id() -> Iterator[str]:
    """Of an incarnation of which no other test knows; what is left of it goes at the end."""
    drawn = os.urandom(16).hex()
    yield drawn
    for left in SHARED.glob(f"dtruntime-{drawn}-*"):
        if left.is_dir() and not left.is_symlink():
            left.rmdir()
        else:
            left.unlink()


def names(run_id: str) -> list[str]:
    return sorted(path.name for path in SHARED.glob(f"dtruntime-{run_id}-*"))


def save(backend: StorageBackend) -> None:
    results = together(*[partial(rank.save, {"w": torch.ones(5000)}, 1) for rank in make_ranks(2, backend)])
    assert all(isinstance(result, CheckpointInfo) for result in results), results


def load(backend: StorageBackend) -> None:
    """As a job of two ranks that is started next on this node."""
    states = [{"w": torch.zeros(5000)} for _ in range(2)]
    results = together(*[partial(r.load, s) for r, s in zip(make_ranks(2, backend), states, strict=True)])
    assert all(isinstance(result, CheckpointInfo) for result in results), results
    assert all(torch.equal(state["w"], torch.ones(5000)) for state in states)


def test_what_a_killed_load_left_is_removed_by_the_next_one(tmp_path: Path, run_id: str) -> None:
    save(SharingBackend(tmp_path))
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), run_id], timeout=100)
    assert killed.returncode == -signal.SIGKILL
    assert [name.rpartition("-")[2] for name in names(run_id)] == ["0", "1"]
    load(SharingBackend(tmp_path))
    assert names(run_id) == []


def test_the_memory_of_a_living_process_is_not_removed_until_it_is_killed(run_id: str) -> None:
    backend, name = MemoryBackend(), f"dtruntime-{run_id}-load-1-0-0"
    save(backend)
    maker = subprocess.Popen(
        [sys.executable, "-c", LIVING, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert maker.stdout is not None and maker.stdout.readline() == b"made\n"
        load(backend)
        assert bytes(_C.Arena.attach(name))[:4] == b"live"
    finally:
        maker.kill()
        maker.communicate(timeout=60)
    assert names(run_id) == [name]
    load(backend)
    assert names(run_id) == []


def test_only_files_of_loads_that_are_ours_are_removed(run_id: str, tmp_path: Path) -> None:
    aside = tmp_path / "aside"
    aside.write_bytes(b"kept")
    begin = f"dtruntime-{run_id}"
    (SHARED / f"{begin}-link").symlink_to(aside)
    (SHARED / f"{begin}-folder").mkdir()
    os.mkfifo(SHARED / f"{begin}-pipe")
    (SHARED / f"{begin}-gone").write_bytes(b"left")
    (SHARED / f"{begin}-mine-0").write_bytes(b"not held yet")
    others = SHARED / f"another-{begin}-0"
    others.write_bytes(b"of somebody else")
    try:
        if os.geteuid() == 0:
            (SHARED / f"{begin}-user").write_bytes(b"of another user")
            os.chown(SHARED / f"{begin}-user", 12345, -1)
        before = set(names(run_id))
        node_memory.remove_unheld(f"{begin}-mine")
        assert before - set(names(run_id)) == {f"{begin}-gone"}
        assert others.exists() and aside.read_bytes() == b"kept"
    finally:
        others.unlink()


def test_who_makes_shared_memory_holds_it_as_long_as_it_lives(run_id: str) -> None:
    name = f"dtruntime-{run_id}-0"
    arena = _C.Arena(10_000, name=name)
    attached = _C.Arena.attach(name)
    with open(SHARED / name, "rb") as file:
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        del arena
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    attached.unlink()


@pytest.mark.parametrize("before", ["_make", "_attach"])
def test_a_load_whose_names_were_removed_goes_on(before: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = MemoryBackend()
    save(backend)
    real = getattr(node_memory, before)

    def swept(named: dict[int, str], *more: object) -> str:
        refusal: str = real(named, *more)
        for name in named.values():
            (SHARED / name).unlink(missing_ok=True)
        return refusal

    monkeypatch.setattr(node_memory, before, swept)
    load(backend)
