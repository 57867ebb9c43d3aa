"""How a benchmark measures: ours and a peer in turns, in one process, and the medians of both.

The disk and the memory of a shared machine are fast one second and slow the next, so a figure alone says little and a
ratio of two figures from different runs says less. Each file `bench_*.py` has a function `cases()` that yields
`Case`s; run as a program it prints one JSON line a case. `pytest benchmarks --benchmark-save=NAME` measures `ours` of the
same cases, for a comparison of two versions. `make bench` runs them all and writes docs/BENCHMARKS.md.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dtruntime_torch.gpucheck.comparison import compare, gigabytes_per_second, in_turns

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
UNITS = {"wall": "GB/s", "cpu": "CPU s/GiB", "written": "MiB"}
REPETITIONS = 21


@dataclass(frozen=True)
class Case:
    """One metric: the same work done by ours and by a peer.

    Args:
        metric: its name, `what/how`, as "digest/256MiB/avx2".
        ours: does the work once.
        peer: does it once by other means.
        peer_name: what the peer is, as "PyPI xxhash".
        nbytes: bytes of the work.
        goal: the ratio to reach, or None if it is only reported.
        clock: "wall" reports GB/s (1e9 bytes), "cpu" reports CPU seconds of the process per GiB, "written" the bytes
            that the work returns, in MiB.
        before: called untimed before each run of either, as to remove a file.
    """

    metric: str
    ours: Callable[[], object]
    peer: Callable[[], object]
    peer_name: str
    nbytes: int
    goal: float | None = None
    clock: Literal["wall", "cpu", "written"] = "wall"
    before: Callable[[], object] = lambda: None


def measure(case: Case, repetitions: int) -> dict[str, object]:
    """Runs both in turns, after one run of each that is not counted.

    Args:
        case: what to run.
        repetitions: how often, at least once.

    Returns:
        What is printed: the fields of `dtruntime_torch.gpucheck.comparison.Comparison`.
    """
    works = {"ours": case.ours, "peer": case.peer}
    taken = in_turns(works, lambda work: _take(case, work), repetitions)
    figures = {
        "wall": gigabytes_per_second(case.nbytes),
        "cpu": _seconds_per_gib(case.nbytes),
        "written": _mebibytes,
    }
    return compare(
        case.metric,
        taken["ours"],
        taken["peer"],
        peer_name=case.peer_name,
        unit=UNITS[case.clock],
        figure=figures[case.clock],
        goal=case.goal,
    ).as_json()


def modules() -> list[str]:
    """The names of the benchmarks, as `python -m` takes them."""
    return [f"benchmarks.{path.stem}" for path in sorted(Path(__file__).parent.glob("bench_*.py"))]


def all_cases() -> Iterator[Case]:
    """The cases of all benchmarks."""
    for name in modules():
        yield from importlib.import_module(name).cases()


def main(cases: Callable[[], Iterable[Case]], arguments: Sequence[str] | None = None) -> None:
    """Runs a benchmark as a program: one JSON line a case.

    Args:
        cases: the function of the module that yields them.
        arguments: instead of those of the command line.
    """
    parser = argparse.ArgumentParser(description="ours and a peer in turns; one JSON line a metric")
    parser.add_argument(
        "--repetitions", type=_at_least_one, default=REPETITIONS, help="runs of each; default: %(default)s"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="metrics whose name contains this")
    options = parser.parse_args(arguments)
    for case in cases():
        if options.only in case.metric:
            print(json.dumps(measure(case, options.repetitions)), flush=True)


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return number


def _take(case: Case, work: Callable[[], object]) -> float:
    case.before()
    if case.clock == "written":
        written = work()
        assert isinstance(written, int)
        return written
    now = CLOCKS[case.clock]
    start = now()
    work()
    return now() - start


def _mebibytes(nbytes: float) -> float:
    return nbytes / (1 << 20)


def _seconds_per_gib(nbytes: int) -> Callable[[float], float]:
    return lambda seconds: seconds / (nbytes / (1 << 30))
