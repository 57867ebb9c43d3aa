"""Several scenarios in one start of the ranks, which takes longer than most of them do; each stays a test of its own."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

# The process groups of the first ranks: a manager on one knows no more than it would if they were all.
GROUPS: dict[int, dist.ProcessGroup] = {}
# The first ranks in a row, and an even number of them in two.
MESHES: dict[tuple[int, ...], DeviceMesh] = {}


def make_worlds(ranks: int) -> None:
    """Makes the groups and meshes of all smaller numbers of ranks; called by all ranks alike."""
    for first in range(1, ranks + 1):
        GROUPS[first] = dist.new_group(list(range(first)))
        MESHES[first,] = DeviceMesh("cpu", list(range(first)))
        if first % 2 == 0:
            rows = torch.arange(first).reshape(2, first // 2)
            MESHES[2, first // 2] = DeviceMesh("cpu", rows, mesh_dim_names=("replicate", "shard"))


def run_in_turn(scenarios: Mapping[str, Callable[[Path], None]], folder: Path, rank: int) -> None:
    """Runs each in a folder of its own name; what became of it is in a file beside, for this rank."""
    for name, scenario in scenarios.items():
        try:
            scenario(folder / name)
            outcome = "ok"
        except BaseException:
            outcome = traceback.format_exc()
        _outcome(folder, name, rank).write_text(outcome)
        if outcome != "ok":
            # The other ranks are somewhere else: nothing can be done together any more.
            os._exit(1)


def check_outcome(folder: Path, scenario: str, ranks: int) -> None:
    """Fails unless the scenario ended well on every rank."""
    files = [_outcome(folder, scenario, rank) for rank in range(ranks)]
    results = [file.read_text() if file.exists() else "did not get here" for file in files]
    assert results == ["ok"] * ranks, "\n".join(results)


def main(scenarios: Mapping[str, Callable[[Path], None]]) -> None:
    """A program of scenarios: `NAME FOLDER` runs one in that folder, `NAME,NAME... FOLDER` several in turn."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(
        "gloo", init_method=os.environ.get("INIT_METHOD", "env://"), rank=rank, world_size=ranks
    )
    names, folder = sys.argv[1].split(","), Path(sys.argv[2])
    if len(names) == 1:
        scenarios[names[0]](folder)
    else:
        make_worlds(ranks)
        run_in_turn({name: scenarios[name] for name in names}, folder, rank)
    dist.barrier()
    dist.destroy_process_group()


def _outcome(folder: Path, scenario: str, rank: int) -> Path:
    return folder / f"{scenario}-{rank}.outcome"
