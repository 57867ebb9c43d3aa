"""How benchmarks measure: in turns, by the clock that a case asks for, and what one of them prints."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import harness
from benchmarks.harness import Case, all_cases, main, measure, modules

ROOT = Path(__file__).resolve().parents[1]
GIB = 1 << 30


class FakeClock:
    """Stands still but for the work that says how long it takes."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def work(self, *seconds: float) -> Callable[[], None]:
        """Takes as long as the first says, then the second, and so on."""
        durations = iter(seconds)

        def takes() -> None:
            self.now += next(durations)

        return takes


@pytest.fixture
def clock(monkeypatch):
    fake = FakeClock()
    monkeypatch.setitem(harness.CLOCKS, "wall", fake)
    return fake


def case(ours: Callable[[], object], peer: Callable[[], object], **options: object) -> Case:
    return Case("sum/1GB", ours, peer, "a loop", nbytes=10**9, **options)


def test_the_first_run_of_each_is_not_counted(clock):
    found = measure(case(clock.work(100, 1, 1), clock.work(100, 2, 2)), repetitions=2)
    assert (found["ours"], found["peer"], found["ratio"], found["repetitions"]) == (1.0, 0.5, 2.0, 2)


def test_the_ratio_is_the_median_of_neighbours_not_the_ratio_of_medians(clock):
    # The machine is slow at times. The medians alone, 2 and 8, would say 4.
    found = measure(case(clock.work(1, 1, 4, 2), clock.work(1, 2, 8, 40)), repetitions=3)
    assert (found["ours"], found["peer"], found["ratio"]) == (0.5, 0.125, 2.0)


def test_the_spread_is_that_of_the_quartiles(clock):
    found = measure(case(clock.work(*[1] * 8), clock.work(1, 1, 2, 3, 4, 5, 6, 7)), repetitions=7)
    assert (found["ratio"], found["spread"]) == (4.0, [2.0, 6.0])


def test_ours_and_the_peer_take_turns_and_each_is_prepared():
    called = []
    one = Case(
        "m",
        ours=lambda: called.append("ours"),
        peer=lambda: called.append("peer"),
        peer_name="p",
        nbytes=1,
        before=lambda: called.append("before"),
    )
    measure(one, repetitions=2)
    assert called == ["before", "ours", "before", "peer"] * 3


def test_preparing_is_not_timed(clock):
    found = measure(case(clock.work(1, 1), clock.work(1, 1), before=clock.work(*[50] * 4)), repetitions=1)
    assert found["ours"] == 1.0


def test_cpu_seconds_are_reported_for_a_gib(monkeypatch):
    fake = FakeClock()
    monkeypatch.setitem(harness.CLOCKS, "cpu", fake)
    one = Case("m", fake.work(9, 1), fake.work(9, 3), "p", nbytes=2 * GIB, clock="cpu")
    found = measure(one, repetitions=1)
    assert (found["ours"], found["peer"], found["unit"], found["ratio"]) == (0.5, 1.5, "CPU s/GiB", 3.0)


@pytest.mark.parametrize(
    ("kind", "figure", "unit"),
    [
        ("told time", 250.0, "ms"),
        ("told percent", 25.0, "%"),
        ("told wall", 4.0, "GB/s"),
        ("told cpu", 0.2684, "CPU s/GiB"),
    ],
)
def test_what_the_work_tells_is_the_figure(clock, kind, figure, unit):
    told = Case("m", lambda: 0.25, lambda: 0.5, "p", nbytes=10**9, clock=kind)
    found = measure(told, repetitions=1)
    assert (found["ours"], found["unit"], found["ratio"]) == (figure, unit, 2.0)


def test_little_data_is_taken_where_benchmarks_are_only_tried(monkeypatch):
    monkeypatch.delenv(harness.TRIED, raising=False)
    assert harness.tried(1000, 1) == 1000
    monkeypatch.setenv(harness.TRIED, "1")
    assert harness.tried(1000, 1) == 1


def test_a_program_prints_a_line_for_each_case_that_was_asked_for(clock, capsys):
    def cases():
        for name in ("a/1", "b/1", "a/2"):
            yield Case(name, clock.work(1, 1), clock.work(1, 1), "p", nbytes=1, goal=0.5)

    main(cases, ["--repetitions", "1", "--only", "a/"])
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["metric"] for line in printed] == ["a/1", "a/2"]
    assert set(printed[0]) == {
        *("metric", "unit", "ours", "peer", "peer_name", "ratio", "spread", "goal", "repetitions")
    }


def test_no_repetition_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(list, ["--repetitions", "0"])
    assert "at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("name", modules())
def test_a_benchmark_lists_its_cases_and_takes_its_options(name):
    run = subprocess.run(
        [sys.executable, "-m", name, "--only", "no metric is called so"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.stdout == ""


def test_metrics_have_names_of_their_own():
    names = [case.metric for case in all_cases()]
    assert sorted(set(names)) == sorted(names)


# What a benchmark measures is large because caches are; that its cases run shows with less. The processes that
# bench_load starts have sizes of their own.
SMALL = {
    "benchmarks.bench_delta": {"TENSORS": 8, "NBYTES": 8 << 20},
    "benchmarks.bench_file_io": {"NBYTES": 8 << 20, "WHOLE": [(0, 0, 8 << 20)]},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", modules())
def test_the_smallest_case_of_each_benchmark_runs(monkeypatch, name):
    module = importlib.import_module(name)
    monkeypatch.setenv(harness.TRIED, "1")
    for constant, value in SMALL.get(name, {}).items():
        monkeypatch.setattr(module, constant, value)
    smallest = min(module.cases(), key=lambda case: case.nbytes)
    assert measure(smallest, repetitions=1)["ratio"] > 0
