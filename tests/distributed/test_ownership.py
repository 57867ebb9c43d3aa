"""Pipelines, experts, buffers that differ, worlds that grow: who writes what, and what comes back. Under torchrun."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from tests.distributed import ownership
from tests.distributed.launch import torchrun


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outcomes")
    # A rank that fails says so in its file, and takes the others down with it.
    with contextlib.suppress(AssertionError):
        torchrun("run_all", folder, ownership.WORLD, program=Path(ownership.__file__))
    return folder


@pytest.mark.parametrize("scenario", ownership.SCENARIOS)
def test_on_four_ranks(outcomes: Path, scenario: str) -> None:
    files = [outcomes / f"{scenario}-{rank}" for rank in range(ownership.WORLD)]
    results = [file.read_text() if file.exists() else "did not get here" for file in files]
    assert results == ["ok"] * ownership.WORLD, "\n".join(results)
