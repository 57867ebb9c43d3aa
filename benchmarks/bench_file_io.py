"""Files of 256 MiB: ours against plain system calls and the writers and readers that torch users have.

Written is memory that is there already: ours an arena, as a save has filled it, the peers tensors of the same size.
So the peers' figures contain their own format, ours contains none: an arena is the image of its file. All are synced
before the clock stops. Read is into memory that was there before and has been touched, as when a state is restored
in place; before each read from the disk the page cache lets go of the file.

The disk is that of `tempfile.gettempdir()`: set TMPDIR to measure another one.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from benchmarks.harness import Case, main
from dtruntime_torch import _C

NBYTES = 256 << 20
TENSORS = 16
PLACES = {"disk": None, "tmpfs": "/dev/shm"}
CLOCKS: tuple[Literal["wall", "cpu"], ...] = ("wall", "cpu")
WHOLE = [(0, 0, NBYTES)]


@cache
def folder(place: str) -> Path:
    """A folder there, until the process ends."""
    made = Path(tempfile.mkdtemp(dir=PLACES[place], prefix="bench_file_io-"))
    atexit.register(shutil.rmtree, made)
    return made


@cache
def arena() -> _C.Arena:
    """Memory whose bytes do not compress, all of it touched."""
    made = _C.Arena(NBYTES)
    torch.frombuffer(made, dtype=torch.int64).random_(generator=torch.Generator().manual_seed(0))
    return made


@cache
def state() -> dict[str, torch.Tensor]:
    """Tensors of the same size, each with memory of its own."""
    numbers = torch.frombuffer(arena(), dtype=torch.float32).chunk(TENSORS)
    return {f"layers.{i}.weight": part.clone().reshape(1024, -1) for i, part in enumerate(numbers)}


def sync(path: Path) -> None:
    """Makes a file durable that something else wrote."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def write_ours(path: Path) -> None:
    """Past the page cache where that works, synced."""
    _C.write_extents(path, arena(), WHOLE)


def write_plain(path: Path) -> None:
    """One thread that writes the same memory from front to back."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    left = memoryview(arena())
    while left:
        left = left[os.write(descriptor, left) :]
    os.fsync(descriptor)
    os.close(descriptor)


def write_torch(path: Path) -> None:
    """A zip file, each tensor pickled by reference."""
    torch.save(state(), path)
    sync(path)


def write_safetensors(path: Path) -> None:
    """A header and the tensors one after another."""
    safetensors.torch.save_file(state(), path)
    sync(path)


def write_dcp(path: Path) -> None:
    """A folder with one file of this rank and one of metadata; it syncs both itself."""
    save(state(), storage_writer=FileSystemWriter(path), no_dist=True)


def read_ours(path: Path) -> None:
    """Past the page cache where that works."""
    _C.read_extents(path, arena(), WHOLE)


def read_plain(path: Path) -> None:
    """One thread that reads to the same memory from front to back."""
    with open(path, "rb", buffering=0) as file:
        left = memoryview(arena())
        while left:
            left = left[file.readinto(left) or len(left) :]


def read_safetensors(path: Path) -> None:
    """Maps the file and copies each tensor to where it belongs, as `load_state_dict` does."""
    for name, tensor in safetensors.torch.load_file(path.with_suffix(".safetensors")).items():
        state()[name].copy_(tensor)


WRITERS: dict[str, Callable[[Path], None]] = {
    "write and fsync": write_plain,
    "torch.save, then fsync": write_torch,
    "safetensors.torch.save_file, then fsync": write_safetensors,
    "dcp.save, FileSystemWriter that syncs": write_dcp,
}
READERS: dict[str, Callable[[Path], None]] = {
    "readinto": read_plain,
    "safetensors.torch.load_file, then copy_": read_safetensors,
}


def remove(path: Path) -> None:
    """Leaves nothing of the run before, whoever made it."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def make_cold(path: Path) -> None:
    """Makes the files that are read, once, and takes them out of the page cache."""
    other = path.with_suffix(".safetensors")
    if not other.exists():
        write_ours(path)
        write_safetensors(other)
    for file in (path, other):
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def at(work: Callable[[Path], None], place: str, name: str) -> Callable[[], None]:
    """`work` on a file of its place, whose folder is made when it first runs."""
    return lambda: work(folder(place) / name)


def cases() -> Iterator[Case]:
    """Each writer and reader as the peer, on each place, by each clock."""
    for place in PLACES:
        for clock in CLOCKS:
            for kind, ours, peers, before in (
                ("write", write_ours, WRITERS, remove),
                ("read", read_ours, READERS, make_cold),
            ):
                for peer_name, peer in peers.items():
                    yield Case(
                        metric=f"file_io/{kind}/{place}/{clock}/{peer_name.split(',')[0]}",
                        ours=at(ours, place, kind),
                        peer=at(peer, place, kind),
                        before=at(before, place, kind),
                        peer_name=peer_name,
                        nbytes=NBYTES,
                        clock=clock,
                    )


if __name__ == "__main__":
    main(cases)
