"""Processes that train and save when they are told, and what all of them took; none outlives this one."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import shutil
import signal
import socket
import tempfile
import time
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path

from benchmarks import processes
from benchmarks.saving_rank import Figures, Setting, serve

# Seconds for an answer: many times what the slowest takes. Then all of them are ended, and so is the benchmark.
PATIENCE = 180.0
LOOK_EVERY = 0.01
MIB = float(1 << 20)


def free_port() -> int:
    """A port for the Store of the ranks, as torchrun finds one."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


class Ranks:
    """The ranks of one setting, ready once they are made.

    Raises:
        RuntimeError: a rank failed, with its traceback, or did not answer. As for `do`.
    """

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._at_work = True
        self._folder = Path(tempfile.mkdtemp(dir=setting.place, prefix=f"bench_save-{setting.way.__name__}-"))
        # Torch is imported once, for all of them.
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload(
            ["benchmarks.savers", "benchmarks.raw_writes", "benchmarks.saving_rank"]
        )
        port = free_port()
        pipes = [server.Pipe() for _ in range(setting.ranks)]
        self._orders = [ours for ours, _ in pipes]
        self._processes = [
            server.Process(target=serve, args=(setting, rank, port, self._folder, theirs))
            for rank, (_, theirs) in enumerate(pipes)
        ]
        atexit.register(self.end)
        for process in self._processes:
            process.start()
        for _, theirs in pipes:
            theirs.close()
        self._answers()
        self._before = processes.memory(self._all())
        self.do("open")

    def do(self, what: str, *arguments: int, watched: bool = False) -> Figures:
        """Has all ranks do it, and waits for all.

        Args:
            what: a method of `SavingRank`.
            arguments: of it.
            watched: whether to look at their memory meanwhile, which slows them down.

        Returns:
            Of each figure the largest of all ranks; "cpu", seconds of all their processes; if watched, "memory",
            bytes that these held at their most beyond what they had before they could save.
        """
        before = processes.cpu_seconds(self._all())
        self._at_work = True
        for order in self._orders:
            order.send((what, arguments))
        figures = self._answers(watched)
        after = processes.cpu_seconds(self._all())
        figures["cpu"] = sum(after.values()) - sum(before.values())
        return figures

    def end(self) -> None:
        """Ends them, with all that they have started, and deletes what they have saved."""
        atexit.unregister(self.end)
        if not self._at_work:
            with suppress(RuntimeError, OSError):
                self.do("close")
        for process in self._processes:
            if process.pid is not None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.kill()
                process.join()
        for order in self._orders:
            order.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _all(self) -> list[int]:
        return processes.members(process.pid for process in self._processes if process.pid is not None)

    def _answers(self, watched: bool = False) -> Figures:
        figures: Figures = {}
        peak = 0
        waiting: list[Connection] = list(self._orders)
        deadline = time.monotonic() + PATIENCE
        while waiting:
            for order in wait(waiting, LOOK_EVERY if watched else PATIENCE):
                assert isinstance(order, Connection)
                waiting.remove(order)
                for name, value in self._answer(order).items():
                    figures[name] = max(figures.get(name, value), value)
            if watched:
                peak = max(peak, processes.memory(self._all()))
            if waiting and time.monotonic() > deadline:
                raise RuntimeError(f"{self._setting} did not answer within {PATIENCE:g} s")
        self._at_work = False
        if watched:
            figures["memory"] = max(MIB, peak - self._before)
        return figures

    def _answer(self, order: Connection) -> Figures:
        try:
            answer = order.recv()
        except EOFError:
            answer = "it ended without a word"
        if isinstance(answer, str):
            raise RuntimeError(f"a rank of {self._setting} failed: {answer}")
        figures: Figures = answer
        return figures
