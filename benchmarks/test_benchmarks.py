"""The same cases under pytest-benchmark, for before and after: `pytest benchmarks --benchmark-save=before`."""

from __future__ import annotations

import pytest

from benchmarks.harness import CLOCKS, TRIED, all_cases

with pytest.MonkeyPatch.context() as environment:
    # Where processes save, the time of a call here says little; see `told` for what it found.
    environment.setenv(TRIED, "1")
    CASES = list(all_cases())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.metric)
def test_ours(case, benchmark):
    def before() -> None:
        # pytest-benchmark takes what a set-up returns for arguments.
        case.before()

    told = benchmark.pedantic(case.ours, setup=before, rounds=9, warmup_rounds=1)
    if case.clock not in CLOCKS:
        benchmark.extra_info["told"] = told
