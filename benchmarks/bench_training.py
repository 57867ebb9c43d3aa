"""Training with a save every 10 steps: ours with digests, DCP's without, torch_checkpointing's without and not synced.

The model is that of the demo, larger. Its state has 490 MiB on each rank, and the batch is so small that most of a step is what AdamW and the gradients take from
memory: a few times as long as copying the state. A rank computes in one thread: beside 1 rank a core is free; beside 2
there is none, and each CPU second of a save is one that the training lacks. A run are 10 steps without a save, then 10
with one at the beginning and the wait for its end behind the last. "step" is the mean time of a step, "slowdown" the share
that it is longer with a save (under 0.1% counts as 0.1%).

The disk is that of `tempfile.gettempdir()`: set TMPDIR to measure another one.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks import savers
from benchmarks.bench_save import PLACES, places_and_ranks
from benchmarks.harness import Case, main, tried
from benchmarks.saving_rank import Setting
from benchmarks.turns import Turns
from benchmarks.way import Way
from benchmarks.workloads import LanguageModel

WIDTH, LAYERS = 768, 6
WIDTH_TRIED, LAYERS_TRIED = 128, 2
EVERY = 10
EVERY_TRIED = 2
PEERS: tuple[tuple[type[Way], str], ...] = (
    (savers.DCPAsync, "dcp.async_save"),
    (savers.TorchCheckpointing, "torch_checkpointing"),
)
# Slowed by less than 2%.
GOAL = round(1 / 1.02, 3)


def cases() -> Iterator[Case]:
    """The slowdown beside the peers', and the time of a step beside that without saves."""
    workload = LanguageModel(tried(WIDTH, WIDTH_TRIED), tried(LAYERS, LAYERS_TRIED))
    every = tried(EVERY, EVERY_TRIED)
    for place, ranks in places_and_ranks():
        name = f"training/{ranks} rank{'s' * (ranks > 1)}/{place}"
        ours = Setting(savers.Ours, workload, ranks, PLACES[place])
        for peer, peer_name in PEERS:
            if not savers.installed(peer):
                continue
            turns = Turns(ours, Setting(peer, workload, ranks, PLACES[place]))
            yield Case(
                metric=f"{name}/slowdown/{peer_name}",
                ours=turns.figure("ours", "slowdown", "loop", every),
                peer=turns.figure("peer", "slowdown", "loop", every),
                peer_name=peer_name,
                nbytes=0,
                clock="told percent",
            )
            if peer is savers.DCPAsync:
                # Of the same runs of ours.
                yield Case(
                    metric=f"{name}/step/no saves",
                    ours=turns.figure("ours", "step", "loop", every),
                    peer=turns.figure("ours", "usual", "loop", every),
                    peer_name="no saves",
                    nbytes=0,
                    goal=GOAL if ranks == 1 else None,
                    clock="told time",
                )


if __name__ == "__main__":
    main(cases)
