"""`dtruntime drop`, in this process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import dtruntime_torch as dt
from dtruntime_torch.checkpoint.names import Attempt
from dtruntime_torch.cli.app import app
from dtruntime_torch.storage import LocalBackend
from tests.checkpoint.lineages import Shelf


def drop(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["drop", *map(str, arguments)])


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    shelf = Shelf(LocalBackend(tmp_path))
    base = shelf.put(1, 100)
    shelf.put(1, 200, base)
    return shelf


def test_what_is_dropped_is_void_and_gone(tmp_path, shelf):
    attempt = Attempt(1, 200, 1)
    result = drop(tmp_path, "model", attempt.path, "--yes")
    assert result.exit_code == 0, result.output
    first, which, last = result.stdout.splitlines()
    assert which == "model step 200 generation 1: deleted"
    assert first == "model step-00000200/0001-1: given up"
    assert last.startswith("model: 1 checkpoint and the files of 1 attempt deleted, ")
    assert shelf.commits()[attempt.key].void
    assert shelf.attempts() == {Attempt(1, 100, 1).path} and shelf.broken() == []


def test_files_that_another_checkpoint_needs_stay(tmp_path, shelf):
    result = drop(tmp_path, "model", Attempt(1, 100, 1).path, "--yes")
    assert result.exit_code == 0
    assert shelf.steps() == [200] and shelf.broken() == []


def test_who_uses_the_files_that_stay_is_told(tmp_path, shelf):
    base, delta = Attempt(1, 100, 1), Attempt(1, 200, 1)
    result = drop(tmp_path, "model", base.path, "--yes")
    assert f"model: files of {base.path} stay, used by {delta.path}" in result.stdout.splitlines()


def test_without_yes_it_only_says_what_it_would_do(tmp_path, shelf):
    result = drop(tmp_path, "model", Attempt(1, 200, 1).path)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "step 200 of model, as generation 1 saved it, would be deleted for good" in result.stderr
    assert shelf.steps() == [100, 200]


def test_the_commit_of_another_attempt_at_that_step_stays(tmp_path, shelf):
    other = shelf.put_data(Attempt(1, 200, 7))
    assert drop(tmp_path, "model", f"{other.path}/", "--yes").exit_code == 0
    assert shelf.steps() == [100, 200] and other.path not in shelf.attempts()


def test_an_attempt_without_a_commit_can_never_be_committed_any_more(tmp_path, shelf):
    dead = shelf.put_intent(Attempt(1, 300, 1))
    assert drop(tmp_path, "model", dead.path, "--yes").exit_code == 0
    assert shelf.commits()[dead.key].void and dead.path not in shelf.attempts()


def test_while_another_manifest_cannot_be_read_the_files_stay_and_the_status_is_1(tmp_path, shelf):
    broken = shelf.put(1, 300)
    shelf.write(f"model/{broken.path}/manifest.json", b"{}")
    result = drop(tmp_path, "model", Attempt(1, 200, 1).path, "--yes")
    assert result.exit_code == 1 and broken.path in result.stdout
    assert shelf.commits()[Attempt(1, 200, 1).key].void
    assert Attempt(1, 200, 1).path in shelf.attempts()
    assert drop(tmp_path, "model", broken.path, "--yes").exit_code == 0


@pytest.mark.parametrize("attempt", ["step-00000999/0001-1", "200", "../model", "step-200/1-1"])
def test_what_is_no_attempt_there_is_an_error_of_one_line(tmp_path, shelf, attempt):
    before = shelf.files()
    result = drop(tmp_path, "model", attempt, "--yes")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert shelf.files() == before


@pytest.mark.parametrize("arguments", [[], ["."], [".", "model"]])
def test_wrong_usage_has_the_status_2(arguments):
    assert drop(*arguments).exit_code == 2


@pytest.mark.parametrize("committed", [True, False])
def test_the_path_may_be_that_of_the_name(tmp_path, committed):
    shelf = Shelf(LocalBackend(tmp_path))
    attempt = shelf.put(1, 100) if committed else shelf.put_intent(Attempt(1, 100, 1))
    result = drop(tmp_path / "model", "model", attempt.path, "--yes")
    assert result.exit_code == 0, result.output
    assert shelf.attempts() == set() and shelf.commits()[attempt.key].void


def test_a_root_that_is_called_as_the_name_is_a_root(tmp_path):
    shelf = Shelf(LocalBackend(tmp_path / "model"))
    attempt = shelf.put(1, 100)
    assert drop(tmp_path / "model", "model", attempt.path, "--yes").exit_code == 0
    assert shelf.attempts() == set()


def test_a_job_that_fell_back_from_what_was_dropped_goes_on(tmp_path):
    with dt.CheckpointManager(tmp_path) as manager:
        for step in (1, 2):
            path = tmp_path / manager.save({"w": torch.full((9,), float(step))}, step).path
    (data,) = path.glob("*.safetensors")
    data.write_bytes(data.read_bytes()[:-1] + b"?")
    state = {"w": torch.zeros(9)}
    with dt.CheckpointManager(tmp_path) as manager:
        with pytest.warns(RuntimeWarning, match="it is passed over"):
            assert manager.load(state).step == 1
        assert drop(tmp_path, "model", path.relative_to(tmp_path / "model"), "--yes").exit_code == 0
        assert manager.save(state, 2).generation == 2
