"""`dtruntime verify`, in this process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from dtruntime_torch.cli import place
from dtruntime_torch.cli.app import app
from dtruntime_torch.storage import LocalBackend
from dtruntime_torch.testing.faulty_backend import FaultyBackend
from tests.checkpoint.saved_checkpoints import flip, make_newer, save, void


def verify(*arguments: object, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(app, ["verify", *map(str, arguments)], env=env)


@pytest.fixture
def backend(tmp_path: Path) -> LocalBackend:
    return LocalBackend(tmp_path)


def test_a_sound_checkpoint_is_one_line_with_counts(tmp_path: Path, backend: LocalBackend) -> None:
    save(backend)
    result = verify(tmp_path)
    assert result.exit_code == 0, result.output
    assert result.output == ("model step 100 generation 1: sound; checked 3 tensors, 16 chunks, 220 bytes\n")


def test_each_damaged_range_is_one_line_and_the_status_is_1(tmp_path: Path, backend: LocalBackend) -> None:
    saved = save(backend)
    start, _ = saved.images[0].place("layer0")
    flip(backend, saved.data_path(0), start)
    flip(backend, saved.data_path(1), 0)
    result = verify(tmp_path)
    assert result.exit_code == 1
    first, second, last = result.stdout.splitlines()
    assert first.startswith(f"{saved.data_path(0)} bytes [{start}, {start + 16}) (tensor layer0): expected ")
    assert second.startswith(f"{saved.data_path(1)} bytes [0, ")
    assert last.startswith("model step 100 generation 1: damaged in 2 places; checked 3 tensors")


def test_a_root_means_the_newest_of_every_name(tmp_path: Path, backend: LocalBackend) -> None:
    flip(backend, save(backend, "ema", step=1).data_path(0), -1)
    save(backend, "ema", step=2)
    save(backend, "model", step=3)
    result = verify(tmp_path)
    assert result.exit_code == 0, result.output
    assert [line.split(" generation")[0] for line in result.stdout.splitlines()] == [
        "ema step 2",
        "model step 3",
    ]


def test_damage_of_one_name_does_not_keep_the_others_from_being_checked(
    tmp_path: Path, backend: LocalBackend
) -> None:
    flip(backend, save(backend, "ema").data_path(0), -1)
    save(backend, "model")
    result = verify(tmp_path)
    assert result.exit_code == 1
    assert "ema step 100 generation 1: damaged" in result.stdout
    assert "model step 100 generation 1: sound" in result.stdout


def test_a_step_is_that_of_the_names_that_have_it(tmp_path: Path, backend: LocalBackend) -> None:
    save(backend, "ema", step=200)
    flip(backend, save(backend, "model", step=100).data_path(0), -1)
    save(backend, "model", step=200)
    save(backend, "model", step=100, generation=2)
    result = verify(tmp_path, "--step", 100)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("model step 100 generation 2: sound")


def test_a_step_that_is_not_there_is_an_error_of_one_line(tmp_path: Path, backend: LocalBackend) -> None:
    save(backend)
    result = verify(tmp_path / "model", "--step", 7)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert (
        result.stderr == "error: there is no checkpoint model of step 7; `dtruntime ls` lists what there is\n"
    )


def verdicts(result: Result) -> list[str]:
    return [line.partition(";")[0] for line in result.stdout.splitlines() if " generation " in line]


def test_all_means_every_checkpoint_of_every_name_oldest_first(tmp_path: Path, backend: LocalBackend) -> None:
    save(backend, "ema", step=7)
    damaged = save(backend, step=100)
    save(backend, step=300)
    save(backend, step=100, generation=2)
    void(backend, save(backend, step=200, generation=2))
    flip(backend, damaged.data_path(0), -1)
    assert verify(tmp_path).exit_code == 0
    result = verify(tmp_path, "--all")
    assert result.exit_code == 1
    assert verdicts(result) == [
        "ema step 7 generation 1: sound",
        "model step 100 generation 1: damaged in 1 place",
        "model step 300 generation 1: sound",
        "model step 100 generation 2: sound",
    ]
    assert len(result.stdout.splitlines()) == 5
    assert verdicts(verify(tmp_path / "ema", "--all")) == ["ema step 7 generation 1: sound"]
    assert verify(tmp_path / "ema", "--all").exit_code == 0


@pytest.mark.parametrize("arguments", [[], ["--all"]])
def test_one_of_a_later_version_has_a_line_and_the_status_1(
    tmp_path: Path, backend: LocalBackend, arguments: list[str]
) -> None:
    make_newer(backend, "ema", save(backend, "ema").key)
    save(backend, "model")
    result = verify(tmp_path, *arguments)
    assert result.exit_code == 1
    first, second = result.stdout.splitlines()
    assert first.startswith("ema step 100 generation 1: newer; ") and "upgrade" in first
    assert second.startswith("model step 100 generation 1: sound; ")


def test_one_that_is_removed_meanwhile_is_not_damaged(
    tmp_path: Path, backend: LocalBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = save(backend, step=100)
    save(backend, step=200)
    faulty = FaultyBackend(backend)

    async def prune(call) -> object:
        for path in (old.commit_path, old.manifest_path):
            await backend.delete(path)
        return await call.proceed()

    faulty.when("read", old.manifest_path, prune)
    monkeypatch.setattr(place, "backend_for", lambda target: faulty)
    result = verify(tmp_path, "--all")
    assert result.exit_code == 0, result.output
    assert verdicts(result) == ["model step 100 generation 1: gone", "model step 200 generation 1: sound"]


def test_where_all_were_given_up_nothing_can_be_said(tmp_path: Path, backend: LocalBackend) -> None:
    void(backend, save(backend))
    result = verify(tmp_path, "--all")
    assert result.exit_code == 2
    assert "given up or removed" in result.stderr


def test_all_and_a_step_are_refused_together(tmp_path: Path, backend: LocalBackend) -> None:
    save(backend)
    result = verify(tmp_path, "--all", "--step", 100)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--all" in result.stderr


@pytest.mark.parametrize("arguments", [[], ["--step", "x", "."], ["--step", "-1", "."], ["--no-such", "."]])
def test_wrong_usage_has_the_status_2(arguments: list[str]) -> None:
    assert verify(*arguments).exit_code == 2


def test_a_terminal_gets_a_progress_bar_and_a_pipe_does_not(tmp_path: Path, backend: LocalBackend) -> None:
    save(backend)
    assert verify(tmp_path).stderr == ""
    watched = verify(tmp_path, env={"FORCE_COLOR": "1", "TERM": "xterm"})
    assert "model step 100" in watched.stderr
    assert "220" in watched.stderr


def test_what_a_tensor_is_called_cannot_steer_the_terminal(tmp_path: Path, backend: LocalBackend) -> None:
    name = "[red]\x1b[2J\nw"
    saved = save(backend, held=[{name: np.arange(4, dtype=np.float32)}])
    flip(backend, saved.data_path(0), -1)
    damage, _ = verify(tmp_path).stdout.splitlines()
    assert "(tensor [red]\\x1b[2J\\nw)" in damage


def test_a_long_line_is_not_cut(tmp_path: Path, backend: LocalBackend) -> None:
    name = ".".join(["layers"] * 100)
    saved = save(backend, held=[{name: np.arange(4, dtype=np.float32)}])
    flip(backend, saved.data_path(0), -1)
    damage, _ = verify(tmp_path).stdout.splitlines()
    assert name in damage
