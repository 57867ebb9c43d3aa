"""Saves of 1 GiB by 1 and 2 ranks: ours has digests, no peer has; ours and DCP sync, the other peers are synced after them.

"save" are saves that return when all is done: the time until the data is durable ("wall"), the CPU seconds of all
processes ("cpu"), and the memory of all processes at its most beyond what there was before they could save ("memory").
"save_async" are saves beside a loop that trains: how long the call keeps the loop ("call"), and how much longer the steps
up to the end of the save take than as many without one ("stall"; under 1 ms counts as 1 ms); "wall", "cpu" and "memory"
are those of a save while nothing else runs. torch.save, safetensors and torch_checkpointing do not sync what they write;
here it is synced after them, before the clock stops. DCP's "shared stager" keeps its memory from save to
save; "in a thread" it also copies in the background, for which the loop waits before the optimizer's step.

Older checkpoints are deleted between the runs. A rank trains matrices by SGD, in one thread: beside 1 rank a core is free, beside 2 there is none. Each has its own half
of the tensors. Of two ranks the slower counts.

The disk is that of `tempfile.gettempdir()`: set TMPDIR to measure another one. Without torch_checkpointing its cases are
left out: `pip install '.[bench]'`.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks import savers
from benchmarks.harness import Case, Clock, main, tried
from benchmarks.raw_writes import BareWrite, DirectWrites
from benchmarks.saving_rank import Setting
from benchmarks.turns import Turns
from benchmarks.way import Way
from benchmarks.workloads import Matrices

NBYTES = 1 << 30
NBYTES_TRIED = 32 << 20
RANKS = (1, 2)
PLACES = {"disk": None, "tmpfs": "/dev/shm"}
# What a call may take longer than that of torch_checkpointing, in seconds.
ALLOWED = 1e-3

CLOCKS: dict[str, Clock] = {
    "call": "told time",
    "stall": "told time",
    "wall": "told wall",
    "cpu": "told cpu",
    "memory": "written",
}
# What is told, and by which order: benchmarks/saving_rank.py.
ORDERS = {
    "call": ("call", "window"),
    "stall": ("stall", "window"),
    "wall": ("total", "alone"),
    "cpu": ("cpu", "alone"),
    "memory": ("memory", "alone"),
}
AT_ONCE: tuple[tuple[type[Way], str], ...] = (
    (BareWrite, "one write and fsync"),
    (DirectWrites, "O_DIRECT writes"),
    (savers.TorchSave, "torch.save, then fsync"),
    (savers.Safetensors, "safetensors save_file, then fsync"),
    (savers.DCP, "dcp.save, 1 thread"),
    (savers.DCPFourThreads, "dcp.save, 4 threads"),
    (savers.TorchCheckpointingAtOnce, "torch_checkpointing, then fsync"),
)
ASYNC: tuple[tuple[type[Way], str], ...] = (
    (savers.DCPAsync, "dcp.async_save"),
    (savers.DCPAsyncReused, "dcp.async_save, shared stager and process"),
    (savers.DCPAsyncBackground, "dcp.async_save, shared stager in a thread and process"),
    (savers.TorchCheckpointing, "torch_checkpointing, then fsync"),
)
# By peer and metric: the ratio to reach.
GOALS: dict[tuple[type[Way], str], float] = {
    (savers.DCPAsync, "call"): 20,
    (savers.DCPAsyncReused, "call"): 5,
    (savers.DCPAsyncBackground, "call"): 5,
    (savers.TorchCheckpointing, "call"): 1,
    **{(way, "stall"): 1.0 for way, _ in ASYNC},
}
# Only of one place each: the peer is what that place gives.
GOALS_AT: dict[tuple[type[Way], str, str], float] = {
    (BareWrite, "wall", "tmpfs"): round(1 / 1.2, 3),
    (BareWrite, "cpu", "tmpfs"): round(1 / 1.5, 3),
    (DirectWrites, "wall", "disk"): 0.95,
}


def cases() -> Iterator[Case]:
    """Each peer beside ours, on each place, by 1 and 2 ranks."""
    for place, ranks in places_and_ranks():
        for kind, ours, peers in (
            ("save", savers.OursAtOnce, AT_ONCE),
            ("save_async", savers.Ours, ASYNC),
        ):
            for peer, name in peers:
                # tmpfs has no O_DIRECT to speak of: what is written is in memory either way.
                if savers.installed(peer) and (peer, place) != (DirectWrites, "tmpfs"):
                    yield from _beside(kind, ours, peer, name, place, ranks)


def places_and_ranks() -> list[tuple[str, int]]:
    """Each place with each number of ranks; where this is only tried, each of both once."""
    every = [(place, ranks) for place in PLACES for ranks in RANKS]
    return tried(every, every[1:3])


def _beside(kind: str, ours: type[Way], peer: type[Way], name: str, place: str, ranks: int) -> Iterator[Case]:
    nbytes = tried(NBYTES, NBYTES_TRIED)
    workload = Matrices(nbytes)
    turns = Turns(*(Setting(way, workload, ranks, PLACES[place]) for way in (ours, peer)))
    for metric, (figure, order) in ORDERS.items():
        if (order == "window" and kind == "save") or (metric == "memory" and place == "disk"):
            continue
        allowed = ALLOWED if (metric, peer) == ("call", savers.TorchCheckpointing) else 0.0
        yield Case(
            metric=f"{kind}/{ranks} rank{'s' * (ranks > 1)}/{place}/{metric}/{name.partition(', then')[0]}",
            ours=turns.figure("ours", figure, order),
            peer=turns.figure("peer", figure, order, plus=allowed),
            peer_name=name + (f"; its time + {ALLOWED * 1e3:g} ms" if allowed else ""),
            nbytes=nbytes,
            goal=GOALS.get((peer, metric), GOALS_AT.get((peer, metric, place))),
            clock=CLOCKS[metric],
        )


if __name__ == "__main__":
    main(cases)
