"""How a benchmark measures: ours and a peer in turns, in one run, and the medians of both.

The disk and the memory of a shared machine are fast one second and slow the next, so a figure alone says little and a
ratio of two figures from different runs says less. Each file `bench_*.py` has a function `cases()` that yields
`Case`s; run as a program it prints one JSON line a case. `pytest benchmarks --benchmark-save=NAME` measures `ours` of the
same cases, for a comparison of two versions. `make bench` runs them all and writes docs/BENCHMARKS.md.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from dtruntime_torch.gpucheck.comparison import compare, gigabytes_per_second, in_turns

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
Clock = Literal["wall", "cpu", "written", "told wall", "told cpu", "told time", "told percent"]
UNITS: dict[Clock, str] = {
    "wall": "GB/s",
    "cpu": "CPU s/GiB",
    "written": "MiB",
    "told wall": "GB/s",
    "told cpu": "CPU s/GiB",
    "told time": "ms",
    "told percent": "%",
}
REPETITIONS = 21
Size = TypeVar("Size")
# Set in the environment, it says that the benchmarks are only tried: those that start processes take little data then.
TRIED = "DTRUNTIME_BENCH_TRIED"


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
        clock: "wall" reports GB/s (1e9 bytes), "cpu" reports CPU seconds of the process per GiB. The others report what
            the work returns, which is above 0: "written" bytes, in MiB; "told wall" and "told cpu" seconds, as the
            first two do; "told time" seconds, in ms; "told percent" a share, in percent.
        before: called untimed before each run of either, as to remove a file.
    """

    metric: str
    ours: Callable[[], object]
    peer: Callable[[], object]
    peer_name: str
    nbytes: int
    goal: float | None = None
    clock: Clock = "wall"
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
    rate, cost = gigabytes_per_second(case.nbytes), _seconds_per_gib(case.nbytes)
    figures: dict[Clock, Callable[[float], float]] = {
        "wall": rate,
        "cpu": cost,
        "written": lambda nbytes: nbytes / (1 << 20),
        "told wall": rate,
        "told cpu": cost,
        "told time": lambda seconds: seconds * 1e3,
        "told percent": lambda share: share * 100,
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


def tried(full: Size, small: Size) -> Size:
    """How large or how many something is: small where the benchmarks are only tried, as by `make bench ARGS=--quick`."""
    return small if TRIED in os.environ else full


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
    end_as_by_exception()
    for case in cases():
        if options.only in case.metric:
            print(json.dumps(measure(case, options.repetitions)), flush=True)


def end_as_by_exception() -> None:
    """Lets SIGTERM end this program as an exception does, so that its processes and files go with it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return number


def _take(case: Case, work: Callable[[], object]) -> float:
    case.before()
    if case.clock not in CLOCKS:
        told = work()
        assert isinstance(told, (int, float))
        return told
    now = CLOCKS[case.clock]
    start = now()
    work()
    return now() - start


def _seconds_per_gib(nbytes: int) -> Callable[[float], float]:
    return lambda seconds: seconds / (nbytes / (1 << 30))
