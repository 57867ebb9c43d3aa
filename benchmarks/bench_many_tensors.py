"""Saves of 10,000 tensors of 4 KiB by one rank to tmpfs: the call, and all until the data is durable; only ours has digests.

What is written is little, so this is what each tensor costs. Of the peers only DCP syncs by itself: the others are synced
after them, before the clock stops. While they save, nothing else runs.

Peers that share memory with a process that writes take descriptors for each tensor: they, and ours beside them, save as
many tensors as the limit of open files allows. The number stands in the metric's name.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator

from benchmarks import savers
from benchmarks.bench_save import ASYNC, AT_ONCE
from benchmarks.harness import Case, main, tried
from benchmarks.raw_writes import DirectWrites
from benchmarks.saving_rank import Setting
from benchmarks.turns import Turns
from benchmarks.way import Way
from benchmarks.workloads import SmallTensors

TENSORS = 10_000
TENSORS_TRIED = 200
TENSOR_BYTES = 4096
PLACE = "/dev/shm"
SHARING = (savers.DCPAsyncReused, savers.TorchCheckpointing)


def cases() -> Iterator[Case]:
    """Each peer beside ours."""
    for kind, ours, peers, figures in (
        ("save", savers.OursAtOnce, AT_ONCE, ("total",)),
        ("save_async", savers.Ours, ASYNC, ("call", "total")),
    ):
        for peer, name in peers:
            if peer is DirectWrites or not savers.installed(peer):
                continue
            workload = SmallTensors(tensors_for(peer), TENSOR_BYTES)
            turns = Turns(*(Setting(way, workload, 1, PLACE) for way in (ours, peer)))
            for figure in figures:
                yield Case(
                    metric=f"many_tensors/{workload.count}/{kind}/{figure}/{name.partition(', then')[0]}",
                    ours=turns.figure("ours", figure, "alone"),
                    peer=turns.figure("peer", figure, "alone"),
                    peer_name=name,
                    nbytes=workload.count * TENSOR_BYTES,
                    clock="told time",
                )


def tensors_for(way: type[Way]) -> int:
    """How many tensors a way to save can take here."""
    count = tried(TENSORS, TENSORS_TRIED)
    if issubclass(way, SHARING) and way is not savers.TorchCheckpointingAtOnce:
        # Two descriptors for each while they are handed to the process that writes, and as many again for what else there is.
        return min(count, resource.getrlimit(resource.RLIMIT_NOFILE)[1] // 4)
    return count


if __name__ == "__main__":
    main(cases)
