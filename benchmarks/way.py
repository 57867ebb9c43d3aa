"""What a benchmark wants of a way to save, ours or a peer's."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple

from torch import Tensor


class Pending(NamedTuple):
    """A save that was started: whether it has ended, waiting for that, and what it lacks then to be durable."""

    done: Callable[[], bool]
    wait: Callable[[], object]
    settle: Callable[[], object] = lambda: None


AT_ONCE = Pending(lambda: True, lambda: None)


class Way:
    """A way to save one state, on one rank. What is not overridden suits one that saves before it returns.

    Args:
        folder: of all ranks, for this way alone.
        state: the tensors to save.
        rank: this one.
    """

    def __init__(self, folder: Path, state: dict[str, Tensor], rank: int) -> None:
        self.folder = folder
        self.state = state
        self.rank = rank

    def start(self, step: int) -> Pending:
        """Begins to save."""
        raise NotImplementedError

    def guard(self) -> AbstractContextManager[object]:
        """What belongs around the optimizer's step."""
        return nullcontext()

    def tidy(self) -> None:
        """Deletes what was saved, so that the clock does not see it."""
        if self.rank == 0:
            for path in self.folder.iterdir():
                shutil.rmtree(path)

    def close(self) -> None:
        """Ends what it has started."""

    def at(self, step: int) -> Path:
        """Where a save goes to that is one folder."""
        return self.folder / f"step-{step}"

    def file_at(self, step: int) -> Path:
        """Where this rank's file goes to, by one that writes a file for each rank."""
        self.at(step).mkdir(exist_ok=True)
        return self.at(step) / f"rank-{self.rank}"


def sync_file(path: Path) -> None:
    """Makes a file durable that something else wrote."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def sync_files(folder: Path) -> None:
    """Makes all files durable that lie somewhere in a folder."""
    for path in folder.rglob("*"):
        if path.is_file():
            sync_file(path)
