"""Ranks for the tests of `barrier` and `membership`: threads on one HashStore, and processes on a TCPStore.

As a program, `python meeting_ranks.py SCENARIO RANK WORLD_SIZE PORT` is one rank; it prints what came of it as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from dtruntime_torch.barrier import Barrier
from dtruntime_torch.errors import BarrierTimeout, CommitConflict, InvalidArgument
from dtruntime_torch.membership import HashStore, Membership, join

R = TypeVar("R")

TCPStore = dist.TCPStore  # type: ignore[attr-defined]  # public, but torch's module does not list it

# Seconds: for what must not happen; for ranks that start together to meet; for one rank that waits in vain.
LONG, SHORT, BRIEF = 60.0, 1.0, 0.1


def barriers(store: Store, world_size: int, timeout: float = LONG, prefix: str = "run") -> list[Barrier]:
    """One for each rank."""
    return [Barrier(PrefixStore(prefix, store), rank, world_size, timeout) for rank in range(world_size)]


def together(ranks: Sequence[Barrier], act: Callable[[Barrier], R]) -> list[R | BaseException]:
    """Runs `act` for each of them in a thread of its own, all at once; returns what it returned or raised."""
    start = threading.Barrier(len(ranks))

    def run(rank: Barrier) -> R:
        start.wait(LONG)
        return act(rank)

    with ThreadPoolExecutor(len(ranks)) as threads:
        futures = [threads.submit(run, rank) for rank in ranks]
        return [future.exception() or future.result() for future in futures]


def joined(values: Sequence[bytes]) -> bytes:
    """What a leader may make of the values."""
    return b" ".join(values)


@contextmanager
def store_keeper() -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that keeps a TCPStore, and its port."""
    program = (
        "import sys, torch.distributed as dist\n"
        "store = dist.TCPStore('127.0.0.1', 0, None, True, wait_for_workers=False)\n"
        "print(store.port, flush=True)\n"
        "sys.stdin.read()\n"
    )
    keeper = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert keeper.stdout is not None
        yield keeper, int(keeper.stdout.readline())
    finally:
        keeper.kill()
        keeper.communicate()


def connect(port: int) -> Store:
    """A client of the TCPStore there."""
    return TCPStore("127.0.0.1", port, None, False, timedelta(seconds=LONG))


def launch(scenario: str, rank: int, world_size: int, port: int) -> subprocess.Popen[str]:
    """Starts a rank as a process."""
    here = Path(__file__)
    return subprocess.Popen(
        [sys.executable, str(here), scenario, str(rank), str(world_size), str(port)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(here.parents[1])},
        stdout=subprocess.PIPE,
        text=True,
    )


def outcome(process: subprocess.Popen[str]) -> object:
    """Waits for a rank and returns what it printed."""
    output, _ = process.communicate(timeout=LONG)
    assert process.returncode == 0, output
    return json.loads(output)


def everything(barrier: Barrier, hasty: Barrier) -> dict[str, object]:
    """Meetings that work, one whose act fails, one that the last rank misses, one that rank 0 misses."""
    world_size = barrier.world_size
    values = [barrier.meet(f"meeting/{i}", f"{barrier.rank}.{i}".encode(), joined).decode() for i in range(3)]
    told = barrier.announce("told", lambda: b"\x00\xff" + b"news" * 50_000)
    found: dict[str, object] = {"values": values, "told": len(told)}
    try:
        barrier.meet("failing", b"", _refuse)
    except CommitConflict as error:
        found["failing"] = str(error)
    if barrier.rank != world_size - 1:
        found["without the last"] = _missed(hasty, "without the last")
    barrier.meet("between", b"", joined)
    if barrier.rank != 0:
        found["without the leader"] = _missed(hasty, "without the leader")
    barrier.meet("end", b"", joined)
    return found


def _refuse(values: Sequence[bytes]) -> bytes:
    raise CommitConflict("somebody was here first")


def _missed(barrier: Barrier, key: str) -> list[object]:
    try:
        barrier.meet(key, b"", joined)
    except BarrierTimeout as error:
        return [list(error.missing), error.decided, str(error)]
    return []


def joining(rank: int, world_size: int, store: Store) -> dict[str, object]:
    """Joins with all ranks, again with all, with the last two over a Store of their own."""
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    try:
        members, again = join(timeout=LONG), join(timeout=LONG)
        some = dist.new_group([world_size - 2, world_size - 1])
        return {
            "all": _seen(members),
            "again": again.run_id,
            "alone": _seen(join(store=HashStore())),
            "some": _seen_or_refused(some, PrefixStore("theirs", store)),
        }
    finally:
        dist.destroy_process_group()


def _seen(members: Membership) -> list[object]:
    met = members.barrier.meet("all", b"%d" % members.rank, joined).decode()
    return [members.rank, members.world_size, members.run_id, met]


def _seen_or_refused(group: dist.ProcessGroup, store: Store) -> list[object]:
    try:
        members = join(group, store, LONG)
    except InvalidArgument as error:
        return [str(error)]
    return [*_seen(members), members.barrier.announce("told", lambda: b"").decode()]


def main(scenario: str, rank: int, world_size: int, port: int) -> None:
    """Is one rank."""
    if scenario == "joining":
        sys.stdout.write(json.dumps(joining(rank, world_size, connect(port))))
        return
    store = PrefixStore("run", connect(port))
    barrier = Barrier(store, rank, world_size, LONG)
    if scenario == "everything":
        sys.stdout.write(json.dumps(everything(barrier, Barrier(store, rank, world_size, 2.0))))
    elif scenario == "dies once it has arrived":
        barrier.meet("last", b"my part", joined, interrupt=lambda: os._exit(0))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
