"""`dtruntime diff`, in this process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from dtruntime_torch.cli.app import app
from dtruntime_torch.storage import LocalBackend
from tests.checkpoint.saved_checkpoints import save


def diff(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["diff", *map(str, arguments)])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Steps 1 to 3: between the first two one element of `w` changes, between the others nothing."""
    weight = np.zeros(100, dtype=np.float32)
    changed = weight.copy()
    changed[50] = 1
    for step, value in ((1, weight), (2, changed), (3, changed)):
        save(LocalBackend(tmp_path), step=step, held=[{"w": value, "frozen": weight}])
    return tmp_path


def test_what_changed_is_a_line_with_its_bytes_and_the_status_is_1(root: Path) -> None:
    result = diff(root, 1, 2)
    assert result.exit_code == 1
    _, line, total = result.stdout.splitlines()
    assert line.split() == ["changed", "16", "bytes", "400", "bytes", "w"]
    assert total == "model step 1 and step 2: 1 difference, 16 bytes changed"


def test_equal_steps_say_so_and_the_status_is_0(root: Path) -> None:
    result = diff(root / "model", 2, 3)
    assert (result.exit_code, result.stdout) == (0, "model step 2 and step 3: equal\n")


def test_a_step_that_is_not_there_is_an_error(root: Path) -> None:
    result = diff(root, 1, 9)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: there is no checkpoint model of step 9")


def test_several_names_ask_for_one(root: Path) -> None:
    save(LocalBackend(root), "ema", step=1)
    result = diff(root, 1, 2)
    assert result.exit_code == 2
    assert "there are checkpoints called ema, model" in result.stderr
