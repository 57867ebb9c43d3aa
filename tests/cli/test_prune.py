"""`dtruntime prune`, in this process."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from dtruntime_torch.checkpoint.names import Attempt
from dtruntime_torch.cli.app import app
from dtruntime_torch.storage import LocalBackend, run_sync
from tests.checkpoint import saved_checkpoints
from tests.checkpoint.lineages import Shelf


def prune(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["prune", *map(str, arguments)])


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    shelf = Shelf(LocalBackend(tmp_path))
    for step in (100, 200, 300):
        shelf.put(1, step, metadata={"loss": 1.0 / step, "accuracy": 1.0 / step})
    return shelf


def test_each_checkpoint_that_goes_is_a_line_and_the_sum_is_the_last(tmp_path, shelf):
    result = prune(tmp_path, "--keep-last", 1)
    assert result.exit_code == 0, result.output
    first, second, last = result.stdout.splitlines()
    assert first == "model step 100 generation 1: deleted"
    assert second == "model step 200 generation 1: deleted"
    assert last.startswith("model: 2 checkpoints and the files of 2 attempts deleted, ")
    assert shelf.steps() == [300] and shelf.broken() == []


def test_a_dry_run_says_the_same_and_deletes_nothing(tmp_path, shelf):
    files = shelf.files()
    told = prune(tmp_path, "--keep-last", 1, "--dry-run").stdout
    assert shelf.files() == files
    assert told.replace("would be deleted", "deleted") == prune(tmp_path, "--keep-last", 1).stdout


@pytest.mark.parametrize("dry_run", [True, False])
def test_it_says_which_files_stay_because_a_delta_uses_them(tmp_path, shelf, dry_run):
    shelf.put(1, 400, Attempt(1, 100, 1))
    result = prune(tmp_path, "--keep-last", 1, *(["--dry-run"] if dry_run else []))
    told = [line for line in result.stdout.splitlines() if "stay" in line]
    assert told == ["model: files of step-00000100/0001-1 stay, used by step-00000400/0001-1"]
    assert result.exit_code == 0


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        (["--keep-every", 200], [200, 300]),
        (["--pin", 100], [100, 300]),
        (["--pin", 100, "--pin", 200], [100, 200, 300]),
        (["--keep-best", "accuracy:max"], [100, 300]),
        (["--keep-best", "loss:min"], [300]),
        (["--keep-best", "loss"], [300]),
        (["--keep-best", "accuracy:max", "--keep-every", 200], [100, 200, 300]),
    ],
)
def test_every_option_keeps_something(tmp_path, shelf, options, kept):
    assert prune(tmp_path, "--keep-last", 1, *options).exit_code == 0
    assert shelf.steps() == kept


def test_one_name_leaves_the_others_alone(tmp_path, shelf):
    for step in (1, 2):
        saved_checkpoints.save(shelf.backend, "ema", step=step)
    result = prune(tmp_path, "ema", "--keep-last", 1)
    assert result.stdout.splitlines()[0] == "ema step 1 generation 1: deleted"
    assert shelf.steps() == [100, 200, 300]
    assert prune(tmp_path / "model", "--keep-last", 2).exit_code == 0
    assert shelf.steps() == [200, 300]


def test_what_died_in_an_older_generation_goes_and_in_the_newest_stays(tmp_path, shelf):
    shelf.claim(2)
    dead, alive = shelf.put_data(Attempt(1, 400, 1)), shelf.put_data(Attempt(2, 400, 1))
    result = prune(tmp_path, "--keep-last", 5)
    assert result.stdout.startswith("model: 0 checkpoints and the files of 1 attempt deleted")
    assert dead.path not in shelf.attempts() and alive.path in shelf.attempts()


def test_what_keeps_it_from_deleting_is_said_and_the_status_is_1(tmp_path, shelf):
    path = f"model/{Attempt(1, 200, 1).path}/manifest.json"
    run_sync(shelf.backend.write(path, b"{}"))
    result = prune(tmp_path, "--keep-last", 1)
    assert result.exit_code == 1
    assert path in result.stdout and "dtruntime drop PATH model step-00000200/0001-1" in result.stdout
    assert shelf.steps() == [100, 200, 300]


def test_who_waits_for_a_network_file_system_is_told_so(tmp_path, shelf, monkeypatch):
    monkeypatch.setattr("dtruntime_torch.storage.local.is_on_network", lambda folder: True)
    assert "90 s" in prune(tmp_path, "--keep-last", 5).stderr
    assert prune(tmp_path, "--keep-last", 1, "--dry-run").stderr == ""


@pytest.mark.parametrize(
    "arguments", [[], ["--keep-last", "0"], ["--keep-last", "x"], ["--keep-last", "1", "--pin", "-1"]]
)
def test_wrong_usage_has_the_status_2_and_deletes_nothing(tmp_path, shelf, arguments):
    assert prune(tmp_path, *arguments).exit_code == 2
    assert shelf.steps() == [100, 200, 300]


def test_a_name_that_is_not_there_is_an_error_of_one_line(tmp_path, shelf):
    result = prune(tmp_path, "ema", "--keep-last", 1)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"error: there is no checkpoint called ema in {tmp_path}\n"


def test_a_metric_without_a_name_is_refused(tmp_path, shelf):
    assert prune(tmp_path, "--keep-last", 1, "--keep-best", "").exit_code == 2


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        (["--keep-every", 200], [200, 300]),
        (["--pin", 100], [100, 300]),
        (["--pin", 0], [300]),
        (["--keep-best", "accuracy:max"], [100, 300]),
    ],
)
def test_each_option_suffices_and_the_newest_stays(tmp_path, shelf, options, kept):
    result = prune(tmp_path, *options)
    assert result.exit_code == 0, result.output
    assert shelf.steps() == kept


def test_without_any_option_it_says_what_to_give(tmp_path, shelf):
    result = prune(tmp_path)
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and "--keep-last" in result.stderr and "--pin" in result.stderr
    assert shelf.steps() == [100, 200, 300]
