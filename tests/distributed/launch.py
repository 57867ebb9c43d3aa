"""Runs a scenario of `scenarios.py` on several ranks, as a user would with torchrun."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

SCENARIOS = Path(__file__).with_name("scenarios.py")
ROOT = SCENARIOS.parents[2]


def torchrun(
    scenario: str, folder: Path, ranks: int, *, timeout: float = 180, program: Path = SCENARIOS
) -> str:
    """Runs it under torchrun; every rank must end well.

    Returns:
        What the ranks printed.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, str(program), scenario, str(folder)],
        env=environment,
        cwd=ROOT,
        timeout=timeout,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    return done.stdout


def in_turn(scenarios: Sequence[str], folder: Path, ranks: int, *, program: Path = SCENARIOS) -> None:
    """Runs several in one start; `check_outcome` tells of each how it ended."""
    # A rank that fails says so in its file, and takes the others down with it.
    with contextlib.suppress(AssertionError):
        torchrun(",".join(scenarios), folder, ranks, program=program)


def separately(
    scenario: str, folder: Path, ranks: int, *, timeout: float = 180, program: Path = SCENARIOS
) -> list[tuple[int, str]]:
    """Runs it as processes that nobody supervises, so that one may die and the others go on.

    Returns:
        Of each rank its exit status and what it printed.
    """
    store = folder / "store"
    processes = [
        subprocess.Popen(
            [sys.executable, str(program), scenario, str(folder)],
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(ROOT),
                "RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "INIT_METHOD": f"file://{store}",
            },
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        return [
            (process.wait(timeout), process.stdout.read() if process.stdout else "") for process in processes
        ]
    finally:
        for process in processes:
            process.kill()
