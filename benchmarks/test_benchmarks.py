"""The same cases under pytest-benchmark, for before and after: `pytest benchmarks --benchmark-save=before`."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.harness import Case


def cases() -> Iterator[Case]:
    for path in sorted(Path(__file__).parent.glob("bench_*.py")):
        yield from importlib.import_module(f"benchmarks.{path.stem}").cases()


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.metric)
def test_ours(case, benchmark):
    benchmark.pedantic(case.ours, setup=case.before, rounds=9, warmup_rounds=1)
