"""One rank that trains and saves: a process that does what it is told and answers with what it took."""

from __future__ import annotations

import gc
import logging
import os
import resource
import shutil
import signal
import statistics
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.way import Pending, Way
from benchmarks.workloads import Workload

Figures = dict[str, float]
# Steps before a save and after it, that tell how long a step takes without.
STEADY = 3
# A staging that goes on behind the call ends at the first optimizer's step.
AT_LEAST = 2
# What nothing can be told from: the clock, and steps that are not alike.
SHORTEST_STALL = 1e-3
SMALLEST_SLOWDOWN = 1e-3


@dataclass(frozen=True)
class Setting:
    """What some ranks do.

    Args:
        way: how they save.
        workload: makes what they train.
        ranks: how many there are.
        place: a folder to make theirs in; None for that of temporary files.
    """

    way: type[Way]
    workload: Workload
    ranks: int
    place: str | None


class SavingRank:
    """What can be told to a rank."""

    def __init__(self, setting: Setting, rank: int, folder: Path) -> None:
        self._setting = setting
        self._rank = rank
        self._folder = folder
        self._training = setting.workload(rank, setting.ranks)
        self._way: Way
        self._steps = count(1)

    def open(self) -> Figures:
        """Makes what saves, which may take memory and start processes from now on."""
        self._way = self._setting.way(self._folder, self._training.state, self._rank)
        return {}

    def tidy(self) -> Figures:
        """Before each of what follows: no run has to clean up behind the one before it."""
        self._way.tidy()
        gc.collect()
        return {}

    def alone(self) -> Figures:
        """A save while nothing else is done: "call", and "total" until it is durable, in seconds."""
        began = time.perf_counter()
        pending = self._save()
        call = time.perf_counter() - began
        pending.wait()
        pending.settle()
        return {"call": call, "total": time.perf_counter() - began}

    def window(self) -> Figures:
        """A save in a loop that goes on: "call", and the true "stall" of that loop.

        The loop trains until the save has ended, and what that took beyond as many steps without a save is the stall:
        the call, the waiting in the guard, and what was lost to whatever went on beside it.
        """
        usual = [self._timed_step() for _ in range(STEADY)]
        dist.barrier()
        began = time.perf_counter()
        pending = self._save()
        call = time.perf_counter() - began
        steps = 0
        while steps < AT_LEAST or not pending.done():
            self._train(1)
            steps += 1
        taken = time.perf_counter() - began
        pending.wait()
        pending.settle()
        dist.barrier()
        usual += [self._timed_step() for _ in range(STEADY)]
        return {"call": call, "stall": max(SHORTEST_STALL, taken - steps * statistics.median(usual))}

    def loop(self, steps: int) -> Figures:
        """Trains without a save and then with one, which has to end within as many steps: the next would wait for it.

        Args:
            steps: of either.

        Returns:
            "usual" and "step", mean seconds of a step without and with, and "slowdown", the share that it took longer.
        """
        dist.barrier()
        began = time.perf_counter()
        self._train(steps)
        usual = time.perf_counter() - began
        dist.barrier()
        began = time.perf_counter()
        pending = self._save()
        self._train(steps)
        pending.wait()
        saving = time.perf_counter() - began
        pending.settle()
        slowdown = max(SMALLEST_SLOWDOWN, saving / usual - 1)
        return {"usual": usual / steps, "step": saving / steps, "slowdown": slowdown}

    def close(self) -> Figures:
        """The last."""
        self._way.close()
        return {}

    def _save(self) -> Pending:
        return self._way.start(next(self._steps))

    def _train(self, steps: int) -> None:
        for _ in range(steps):
            self._training.step(self._way.guard)

    def _timed_step(self) -> float:
        began = time.perf_counter()
        self._train(1)
        return time.perf_counter() - began


def serve(setting: Setting, rank: int, port: int, folder: Path, orders: Connection) -> None:
    """A rank: answers to orders, each the name of a method and its arguments, until there is nothing more.

    An answer is what the method gave, or the text of what it raised.
    """
    # Its own session, in which also what a way to save starts can be found, and ended.
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What fails is told as an answer. DCP's process logs each save to the one, and the other is for figures.
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    # Shared memory takes descriptors, and there are more than most processes need.
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    # DCP's process that writes finds its peers by these.
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "LOCAL_RANK": str(rank)}
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"tcp://127.0.0.1:{port}",
            rank=rank,
            world_size=setting.ranks,
            timeout=timedelta(seconds=300),
        )
        _obey(SavingRank(setting, rank, folder), orders)
    except Exception:
        with suppress(OSError):
            orders.send(traceback.format_exc())
    finally:
        # Only if whoever gave the orders has not done it, as when it was killed.
        shutil.rmtree(folder, ignore_errors=True)
        os.killpg(0, signal.SIGKILL)


def _obey(rank: SavingRank, orders: Connection) -> None:
    orders.send({})
    with suppress(EOFError):
        while (order := orders.recv()) is not None:
            name, arguments = order
            method: Callable[..., Figures] = getattr(rank, name)
            orders.send(method(*arguments))
