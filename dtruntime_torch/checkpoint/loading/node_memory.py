"""Memory that the ranks of one node share, for the bytes that more than one of them needs.

Each rank makes the memory of its own share under a name, all attach, and the names go at once: from then on the memory
goes with the last who has it, whoever dies. Where shared memory is refused, or is too small, as /dev/shm often is in a
container, the ranks of that node go on without.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from dtruntime_torch import _C
from dtruntime_torch.barrier import Barrier, declining

logger = logging.getLogger(__name__)

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_FOLDER = "/dev/shm"


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
        arenas[barrier.rank].unlink()
    reasons = {rank: reason for rank, reason in refused.items() if rank in names}
    if not reasons:
        return arenas
    if barrier.rank == min(ranks):
        logger.warning(
            "no memory is shared by ranks %s, so that each reads for itself: %s", list(ranks), reasons
        )
    return None


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
