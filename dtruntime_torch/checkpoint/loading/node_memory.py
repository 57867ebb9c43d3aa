"""Memory that the ranks of one node share, for the bytes that more than one of them needs.

Each rank makes the memory of its own share under a name, all attach, and the names go at once: from then on the memory
goes with the last who has it, whoever dies. Who makes a name holds a lock on it; where all were killed before the names
went, nobody holds them any more, and the next load that shares memory on this node removes them. Where shared memory is refused, or is too small, as /dev/shm often is in a
container, the ranks of that node go on without.
"""

from __future__ import annotations

import fcntl
import functools
import json
import logging
import os
import re
import socket
import stat
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from dtruntime_torch import _C
from dtruntime_torch.barrier import Barrier, declining

logger = logging.getLogger(__name__)

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_FOLDER = "/dev/shm"
_OURS = re.compile(r"dtruntime-[0-9a-f]{32}-.+")  # of the run ids of any incarnation


@functools.cache
def this_node() -> str:
    """What is the same for processes that can share memory: the running system, its name, and its /dev/shm."""
    boot = _BOOT_ID.read_text(encoding="ascii").strip() if _BOOT_ID.exists() else ""
    folder = os.stat(_FOLDER).st_dev if os.path.isdir(_FOLDER) else 0
    return f"{boot} {socket.gethostname()} {folder}"


def share_memory(
    barrier: Barrier, key: str, tag: str, ranks: Sequence[int], nbytes: int
) -> dict[int, _C.Arena] | None:
    """Makes memory for each rank of this node, to which all of them have access.

    All ranks of the barrier call it, whether their node shares anything or not.

    Args:
        barrier: where all ranks meet.
        key: of these meetings.
        tag: begins the names; of this load and no other.
        ranks: of this node, this one among them; none if it shares nothing.
        nbytes: how much this rank makes.

    Returns:
        Rank -> its memory, without a name; None if this node has to do without.

    Raises:
        BarrierTimeout: ranks did not come in time. No name stays behind.
    """
    names = {rank: f"{tag}-{rank}" for rank in ranks}
    arenas: dict[int, _C.Arena] = {}
    try:
        with declining(barrier, f"{key}/made"):
            if barrier.rank == min(ranks, default=-1):
                remove_unheld(tag)
            refusal = _make(names, barrier.rank, nbytes, arenas) if ranks else ""
        refused = _gather(barrier, f"{key}/made", refusal)
        with declining(barrier, f"{key}/attached"):
            refusal = _attach(names, arenas) if ranks and refused.keys().isdisjoint(ranks) else refusal
        refused = _gather(barrier, f"{key}/attached", refusal)
    except BaseException:
        # Whoever made a name may be dead.
        for name in names.values():
            with suppress(OSError):
                _C.Arena.attach(name).unlink()
        raise
    if barrier.rank in arenas:
        with suppress(FileNotFoundError):  # somebody cleaned up here; who attached before has the memory
            arenas[barrier.rank].unlink()
    reasons = {rank: reason for rank, reason in refused.items() if rank in names}
    if not reasons:
        return arenas
    if barrier.rank == min(ranks):
        logger.warning(
            "no memory is shared by ranks %s, so that each reads for itself: %s", list(ranks), reasons
        )
    return None


def remove_unheld(tag: str) -> None:
    """Removes the names that loads left whose ranks were all killed, as far as that is allowed; never raises.

    Args:
        tag: begins names that stay: their makers may not hold them yet. A name of another load that is removed in that
            moment costs it the sharing, and nothing else.
    """
    try:
        listed = os.listdir(_FOLDER)
    except OSError:
        return
    for name in listed:
        if _OURS.fullmatch(name) and not name.startswith(f"{tag}-"):
            with suppress(OSError):
                _remove_if_unheld(f"{_FOLDER}/{name}")


def _remove_if_unheld(path: str) -> None:
    """Removes a regular file of this user on which nobody has a lock.

    Raises:
        OSError: it is held, is a link, has gone, or may not be opened.
    """
    # O_NONBLOCK: a pipe of that name must not make us wait.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode) or about.st_uid != os.geteuid():
            return
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # A name is used once, so what it names now is what was locked, unless somebody else removed it meanwhile.
        if os.path.samestat(about, os.lstat(path)):
            os.unlink(path)
            logger.info("removed %s, which a load left whose ranks were killed", path)
    finally:
        os.close(descriptor)


def _make(names: Mapping[int, str], rank: int, nbytes: int, arenas: dict[int, _C.Arena]) -> str:
    try:
        arenas[rank] = _C.Arena(max(1, nbytes), name=names[rank])
    except (OSError, MemoryError) as error:
        return str(error) or type(error).__name__
    return ""


def _attach(names: Mapping[int, str], arenas: dict[int, _C.Arena]) -> str:
    try:
        for rank, name in names.items():
            if rank not in arenas:
                arenas[rank] = _C.Arena.attach(name)
    except (OSError, MemoryError) as error:
        return str(error) or type(error).__name__
    return ""


def _gather(barrier: Barrier, key: str, refusal: str) -> dict[int, str]:
    """Which ranks cannot, and why; the same on all."""

    def act(values: Sequence[bytes]) -> bytes:
        return json.dumps({rank: value.decode() for rank, value in enumerate(values) if value}).encode()

    return {
        int(rank): reason for rank, reason in json.loads(barrier.meet(key, refusal.encode(), act)).items()
    }
