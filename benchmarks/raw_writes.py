"""What the machine gives: the bytes of a state, written and synced and nothing else."""

from __future__ import annotations

import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.way import AT_ONCE, Pending, Way

PIECE = 8 << 20
THREADS = 4
BLOCK = 4096


class BareWrite(Way):
    """One thread that writes one tensor after another to one file."""

    def start(self, step: int) -> Pending:
        descriptor = os.open(self.file_at(step), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        for tensor in self.state.values():
            left = _bytes_of(tensor)
            while left:
                left = left[os.write(descriptor, left) :]
        os.fsync(descriptor)
        os.close(descriptor)
        return AT_ONCE


class DirectWrites(Way):
    """Four threads that write pieces past the page cache, out of memory that is aligned for it and holds the bytes."""

    def __init__(self, folder: Path, state: dict[str, Tensor], rank: int) -> None:
        super().__init__(folder, state, rank)
        nbytes = sum(tensor.nbytes for tensor in state.values())
        self._memory = mmap.mmap(-1, -(-nbytes // BLOCK) * BLOCK)
        offset = 0
        for tensor in state.values():
            self._memory[offset : offset + tensor.nbytes] = _bytes_of(tensor)
            offset += tensor.nbytes
        self._threads = ThreadPoolExecutor(THREADS)

    def start(self, step: int) -> Pending:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_DIRECT
        descriptor = os.open(self.file_at(step), flags, 0o666)
        memory = memoryview(self._memory)
        os.posix_fallocate(descriptor, 0, len(memory))

        def write(offset: int) -> None:
            left = memory[offset : offset + PIECE]
            while left:
                written = os.pwrite(descriptor, left, offset)
                left, offset = left[written:], offset + written

        list(self._threads.map(write, range(0, len(memory), PIECE)))
        os.fsync(descriptor)
        os.close(descriptor)
        return AT_ONCE

    def close(self) -> None:
        self._threads.shutdown()


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data
