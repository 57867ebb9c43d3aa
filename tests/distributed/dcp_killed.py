"""Two pairs of ranks save by DCP, and in each pair one is killed where it hurts; run by `test_dcp_killed.py`."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

import dtruntime_torch as dt
from dtruntime_torch.storage import LocalBackend


def state_of(value: float, mesh: DeviceMesh) -> dict[str, Any]:
    whole = torch.full((5, 1000), value)
    return {"w": distribute_tensor(whole, mesh, [Shard(0)]), "value": value}


class KilledWhileWriting(LocalBackend):
    """Ends with the data written and its records not."""

    async def write(self, path: str, data: Any) -> None:
        if path.endswith(".json"):
            os.kill(os.getpid(), signal.SIGKILL)
        await super().write(path, data)


class KilledBeforeTheCommit(LocalBackend):
    async def create(self, path: str, data: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    folder, rank = Path(sys.argv[2]), int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=os.environ["INIT_METHOD"], rank=rank, world_size=4)
    meshes = [DeviceMesh("cpu", [0, 1]), DeviceMesh("cpu", [2, 3])]
    mesh, writing = meshes[rank // 2], rank < 2
    place = folder / ("writing" if writing else "committing")
    group = mesh.get_group()
    backend = LocalBackend(place)
    if writing:
        dcp_save(state_of(1.0, mesh), storage_writer=dt.StorageWriter(place), process_group=group)
        backend = KilledWhileWriting(place) if rank == 1 else backend
    elif rank == 2:
        backend = KilledBeforeTheCommit(place)
    try:
        writer = dt.StorageWriter(backend, overwrite=writing)
        dcp_save(state_of(2.0, mesh), storage_writer=writer, process_group=group)
    except BaseException as error:  # DCP's own is no Exception
        sys.stdout.write(f"failed: {type(error).__name__}\n")
        sys.stdout.flush()
    os._exit(0)  # there is nobody left to say goodbye to


if __name__ == "__main__":
    main()
