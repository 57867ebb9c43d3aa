"""The same cases under pytest-benchmark, for before and after: `pytest benchmarks --benchmark-save=before`."""

from __future__ import annotations

import pytest

from benchmarks.harness import all_cases


@pytest.mark.parametrize("case", all_cases(), ids=lambda case: case.metric)
def test_ours(case, benchmark):
    def before() -> None:
        # pytest-benchmark takes what a set-up returns for arguments.
        case.before()

    benchmark.pedantic(case.ours, setup=before, rounds=9, warmup_rounds=1)
