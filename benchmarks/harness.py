"""How a benchmark measures: ours and a peer in turns, in one process, and the medians of both.

The disk and the memory of a shared machine are fast one second and slow the next, so a figure alone says little and a
ratio of two figures from different runs says less. Each file `bench_*.py` has a function `cases()` that yields
`Case`s; run as a program it prints one JSON line a case. `pytest benchmarks --benchmark-save=NAME` measures `ours` of the
same cases, for a comparison of two versions.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


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
        clock: "wall" reports GB/s (1e9 bytes), "cpu" reports CPU seconds of the process per GiB.
        before: called untimed before each run of either, as to remove a file.
    """

    metric: str
    ours: Callable[[], object]
    peer: Callable[[], object]
    peer_name: str
    nbytes: int
    goal: float | None = None
    clock: Literal["wall", "cpu"] = "wall"
    before: Callable[[], object] = lambda: None


def measure(case: Case, repetitions: int) -> dict[str, object]:
    """Runs both in turns, after one run of each that is not counted.

    Returns:
        What is printed. `ratio` is above 1 where ours is better: the median of the ratios of neighbouring runs. Spread is
        that of the quartiles of these ratios.
    """
    seconds: dict[str, list[float]] = {"ours": [], "peer": []}
    for repetition in range(-1, repetitions):
        for side in ("ours", "peer"):
            case.before()
            taken = _time(getattr(case, side), case.clock)
            if repetition >= 0:
                seconds[side].append(taken)
    ratios = [peer / ours for ours, peer in zip(seconds["ours"], seconds["peer"], strict=True)]
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    return {
        "metric": case.metric,
        "unit": "GB/s" if case.clock == "wall" else "CPU s/GiB",
        "ours": _figure(case, statistics.median(seconds["ours"])),
        "peer": _figure(case, statistics.median(seconds["peer"])),
        "peer_name": case.peer_name,
        "ratio": round(statistics.median(ratios), 3),
        "spread": [round(quartiles[0], 3), round(quartiles[2], 3)],
        "goal": case.goal,
        "repetitions": repetitions,
    }


def main(cases: Callable[[], Iterable[Case]]) -> None:
    """Runs a benchmark as a program: one JSON line a case.

    Args:
        cases: the function of the module that yields them.
    """
    parser = argparse.ArgumentParser(description="ours and a peer in turns; one JSON line a metric")
    parser.add_argument("--repetitions", type=int, default=21)
    parser.add_argument("--only", default="", help="metrics whose name contains this")
    options = parser.parse_args()
    for case in cases():
        if options.only in case.metric:
            print(json.dumps(measure(case, options.repetitions)), flush=True)


def _time(work: Callable[[], object], clock: str) -> float:
    now = CLOCKS[clock]
    start = now()
    work()
    return now() - start


def _figure(case: Case, seconds: float) -> float:
    if case.clock == "wall":
        return round(case.nbytes / seconds / 1e9, 3)
    return round(seconds / (case.nbytes / (1 << 30)), 4)
