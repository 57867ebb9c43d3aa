"""Loads of 512 MiB into a model that is there: ours, digests checked, against the loads that torch users have.

"one": a process alone. "two": two processes that hold the same model, as under DDP; their peers read the whole file in
each. "rows": two ranks saved shards of rows and load the same, as with FSDP2 that goes on. "joined": they saved shards of
rows, one process loads whole tensors. "columns": they saved shards of rows and load shards of columns, the worst case. On the
disk the page cache lets go of all files before each load; on tmpfs there is no other storage below.

The disk is that of `tempfile.gettempdir()`: set TMPDIR to measure another one.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial
from multiprocessing.connection import Connection
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import dtruntime_torch as dt
from benchmarks.harness import Case, main
from benchmarks.ranks import free_port

NBYTES = 512 << 20
TENSORS = 16
ROWS = 1024
PLACES = {"disk": None, "tmpfs": "/dev/shm"}
GOAL = 1.5

State = dict[str, torch.Tensor]


@cache
def folder(place: str) -> Path:
    """A folder there, until the process ends."""
    made = Path(tempfile.mkdtemp(dir=PLACES[place], prefix="bench_load-"))
    atexit.register(shutil.rmtree, made)
    return made


def make_model(seed: int) -> torch.nn.Module:
    """Parameters of the same size whose bytes do not compress."""
    generator = torch.Generator().manual_seed(seed)
    model = torch.nn.Module()
    for number in range(TENSORS):
        data = torch.empty(ROWS, NBYTES // TENSORS // ROWS // 4).normal_(generator=generator)
        model.register_parameter(f"weight{number}", torch.nn.Parameter(data))
    return model


def make_shards(seed: int, dim: int) -> State:
    """The same as DTensors, cut along a dimension."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = make_model(seed).state_dict()
    return {name: distribute_tensor(tensor, mesh, [Shard(dim)]) for name, tensor in whole.items()}


def save_whole(path: Path) -> None:
    """A model in the format of each peer, and ours, by this process alone."""
    model = make_model(0)
    torch.save(model.state_dict(), path / "whole.pt")
    safetensors.torch.save_file(model.state_dict(), path / "whole.safetensors")
    dcp_save(model.state_dict(), checkpoint_id=path / "whole.dcp", no_dist=True)
    with dt.CheckpointManager(path / "whole.dt") as manager:
        manager.save({"model": model}, 1)


def save_shards(path: Path) -> None:
    """Rows on each rank; on all of them."""
    shards = make_shards(0, 0)
    dcp_save({"model": shards}, checkpoint_id=path / "rows.dcp")
    with dt.CheckpointManager(path / "rows.dt") as manager:
        manager.save({"model": shards}, 1)


class Loads:
    """What a process loads into, and how: each method once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._managers: dict[str, dt.CheckpointManager] = {}

    @cache  # noqa: B019  # one to three of these live as long as the process
    def model(self) -> torch.nn.Module:
        """What is filled."""
        return make_model(1)

    @cache  # noqa: B019
    def columns(self) -> State:
        """What is filled with other shards than were saved."""
        return make_shards(1, 1)

    def plain_read(self) -> None:
        """Reads the bytes that ours reads, and that is all: what the machine gives."""
        (path,) = (self._path / "whole.dt").rglob("*.safetensors")
        with open(path, "rb", buffering=0) as file:
            for parameter in self.model().parameters():
                file.readinto(parameter.detach().numpy().data)

    @cache  # noqa: B019
    def rows(self) -> State:
        """What is filled with the shards that were saved."""
        return make_shards(1, 0)

    def torch_load(self) -> None:
        """Maps the file."""
        self.model().load_state_dict(torch.load(self._path / "whole.pt", mmap=True))

    def safetensors_load(self) -> None:
        """Maps the file, too."""
        self.model().load_state_dict(safetensors.torch.load_file(self._path / "whole.safetensors"))

    def dcp_whole(self) -> None:
        """In place; under a process group each rank reads for itself."""
        dcp_load(
            dict(self.model().state_dict()),
            checkpoint_id=self._path / "whole.dcp",
            no_dist=not dist.is_initialized(),
        )

    def dcp_joined(self) -> None:
        """In place, from shards."""
        dcp_load(
            {"model": dict(self.model().state_dict())}, checkpoint_id=self._path / "rows.dcp", no_dist=True
        )

    def dcp_rows(self) -> None:
        """In place, the shards that were saved."""
        dcp_load({"model": self.rows()}, checkpoint_id=self._path / "rows.dcp")

    def dcp_columns(self) -> None:
        """In place, shards from other shards."""
        dcp_load({"model": self.columns()}, checkpoint_id=self._path / "rows.dcp")

    def ours_whole(self) -> None:
        """In place."""
        self._manager("whole.dt").load({"model": self.model()})

    def ours_joined(self) -> None:
        """In place, from shards."""
        self._manager("rows.dt").load({"model": self.model()})

    def ours_rows(self) -> None:
        """In place, the shards that were saved."""
        self._manager("rows.dt").load({"model": self.rows()})

    def ours_columns(self) -> None:
        """In place, shards from other shards."""
        self._manager("rows.dt").load({"model": self.columns()})

    def _manager(self, name: str) -> dt.CheckpointManager:
        if name not in self._managers:
            self._managers[name] = dt.CheckpointManager(self._path / name)
        return self._managers[name]


def serve(rank: int, port: int, path: Path, orders: Connection) -> None:
    """A rank: saves its shards, then does what it is told until there is nothing more."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    save_shards(path)
    loads = Loads(path)
    orders.send("ready")
    while (order := orders.recv()) is not None:
        getattr(loads, order)()
        orders.send("done")
    dist.destroy_process_group()


class Ranks:
    """Two processes that load when they are told."""

    def __init__(self, path: Path) -> None:
        spawn = multiprocessing.get_context("spawn")
        pipes = [spawn.Pipe() for _ in range(2)]
        port = free_port()
        self._orders = [ours for ours, _ in pipes]
        self._processes = [
            spawn.Process(target=serve, args=(rank, port, path, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self._processes:
            process.start()
        for order in self._orders:
            order.recv()

    def do(self, what: str) -> None:
        """Has both do it, and waits for both."""
        for order in self._orders:
            order.send(what)
        for order in self._orders:
            order.recv()

    def end(self) -> None:
        """Lets them end."""
        for order in self._orders:
            order.send(None)
        for process in self._processes:
            process.join()


@cache
def loads_of(place: str) -> Loads:
    """A process alone, once there is something to load."""
    ranks_of(place)
    return Loads(folder(place))


@cache
def ranks_of(place: str) -> Ranks:
    """Two ranks, once there is something to load."""
    warnings.simplefilter("ignore")
    save_whole(folder(place))
    ranks = Ranks(folder(place))
    os.sync()
    atexit.register(ranks.end)
    return ranks


def make_cold(place: str) -> None:
    """Takes all files out of the page cache, where there is something below it."""
    ranks_of(place)
    for path in folder(place).rglob("*") if place == "disk" else ():
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def alone(place: str, what: str) -> Callable[[], None]:
    """A load of this process."""
    return lambda: getattr(loads_of(place), what)()


def by_two(place: str, what: str) -> Callable[[], None]:
    """A load of two processes."""
    return lambda: ranks_of(place).do(what)


PLAIN_READ = "a plain read, unchecked"
WAYS = (
    ("one", alone, "ours_whole", "plain_read", PLAIN_READ),
    ("one", alone, "ours_whole", "torch_load", "torch.load(mmap=True), load_state_dict"),
    ("one", alone, "ours_whole", "safetensors_load", "safetensors load_file, load_state_dict"),
    ("one", alone, "ours_whole", "dcp_whole", "dcp.load"),
    ("two", by_two, "ours_whole", "torch_load", "torch.load(mmap=True), load_state_dict, in each"),
    ("two", by_two, "ours_whole", "safetensors_load", "safetensors load_file, load_state_dict, in each"),
    ("two", by_two, "ours_whole", "dcp_whole", "dcp.load"),
    ("rows", by_two, "ours_rows", "dcp_rows", "dcp.load"),
    ("joined", alone, "ours_joined", "dcp_joined", "dcp.load"),
    ("columns", by_two, "ours_columns", "dcp_columns", "dcp.load"),
)


def cases() -> Iterator[Case]:
    """Each way to load and each peer, on each place."""
    for place in PLACES:
        for kind, by, ours, peer, peer_name in WAYS:
            yield Case(
                metric=f"load/{kind}/{place}/{peer_name.split(',')[0]}",
                ours=by(place, ours),
                peer=by(place, peer),
                before=partial(make_cold, place),
                peer_name=peer_name,
                nbytes=NBYTES,
                goal=None if peer_name == PLAIN_READ else GOAL,
            )


if __name__ == "__main__":
    main(cases)
