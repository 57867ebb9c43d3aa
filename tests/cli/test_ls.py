"""`dtruntime ls`, in this process."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import threading
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from dtruntime_torch.checkpoint.names import CommitKey
from dtruntime_torch.cli import place
from dtruntime_torch.cli.app import app
from dtruntime_torch.cli.ls import TITLES
from dtruntime_torch.storage import LocalBackend, run_sync
from dtruntime_torch.testing.faulty_backend import FaultyBackend, not_done
from tests.checkpoint.saved_checkpoints import Saved, commit, flip, make_newer, save, void


def ls(path: Path | str, *options: str) -> Result:
    return CliRunner().invoke(app, ["ls", str(path), *options])


def lines(result: Result) -> list[list[str]]:
    return [line.split() for line in result.stdout.splitlines()]


@pytest.fixture
def backend(tmp_path: Path) -> LocalBackend:
    return LocalBackend(tmp_path)


def test_each_checkpoint_has_a_line(tmp_path: Path, backend: LocalBackend) -> None:
    saved = [save(backend, "ema", 50), save(backend, step=300), save(backend, step=100, generation=12)]
    result = ls(tmp_path)
    assert result.exit_code == 0, result.output
    titles, *rows = lines(result)
    assert titles == list(TITLES)
    when, size, written = ["2026-01-02", "03:04:05+00:00"], ["220", "bytes"], ["732", "bytes"]
    assert rows == [
        [name, step, generation, *when, "2", *size, *written, "full", one.sha256[:12]]
        for (name, step, generation), one in zip(
            [("ema", "50", "1"), ("model", "300", "1"), ("model", "100", "12")], saved, strict=True
        )
    ]


@pytest.mark.parametrize("spell", [str, lambda p: f"{p}/", lambda p: f"file://{p}", os.path.relpath])
def test_one_name_may_be_given_in_any_spelling(tmp_path: Path, backend: LocalBackend, spell) -> None:
    save(backend, "ema")
    save(backend, "model")
    result = ls(spell(tmp_path / "model"))
    assert [line[0] for line in lines(result)] == ["name", "model"]


def test_the_folder_of_a_name_may_be_where_one_stands(
    tmp_path: Path, backend: LocalBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(backend)
    monkeypatch.chdir(tmp_path / "model")
    assert [line[0] for line in lines(ls("."))] == ["name", "model"]


def test_a_link_to_a_folder_of_checkpoints_is_followed(tmp_path: Path) -> None:
    save(LocalBackend(tmp_path / "data"))
    (tmp_path / "latest").symlink_to(tmp_path / "data" / "model")
    assert [line[0] for line in lines(ls(tmp_path / "latest"))] == ["name", "model"]


def test_a_tilde_is_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(LocalBackend(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in ("~", "~/model"):
        assert [line[0] for line in lines(ls(path))] == ["name", "model"]


def test_a_name_like_one_of_our_folders_is_a_name(tmp_path: Path, backend: LocalBackend) -> None:
    save(backend, "commits")
    assert [line[0] for line in lines(ls(tmp_path))] == ["name", "commits"]


@pytest.mark.parametrize("which", ["manifest_path", "commit_path"])
def test_a_damaged_checkpoint_is_marked_and_the_status_is_1(
    tmp_path: Path, backend: LocalBackend, which: str
) -> None:
    damaged = save(backend, step=100)
    save(backend, step=200)
    flip(backend, getattr(damaged, which), 1)
    result = ls(tmp_path)
    assert result.exit_code == 1
    _, first, second, *faults = lines(result)
    assert first == ["model", "100", "1", "damaged"]
    assert second[:3] == ["model", "200", "1"]
    (fault,) = faults
    assert getattr(damaged, which) in " ".join(fault)


def test_one_of_a_later_version_is_marked_and_the_status_is_1(tmp_path: Path, backend: LocalBackend) -> None:
    newer = save(backend, step=100)
    save(backend, step=200)
    make_newer(backend, "model", newer.key)
    result = ls(tmp_path)
    assert result.exit_code == 1
    _, first, second, *faults = lines(result)
    assert first == ["model", "100", "1", "newer"]
    assert second[:3] == ["model", "200", "1"]
    (fault,) = faults
    assert "upgrade" in " ".join(fault) and newer.manifest_path in " ".join(fault)


def test_as_json_each_checkpoint_has_all_that_its_manifest_tells(
    tmp_path: Path, backend: LocalBackend
) -> None:
    first = save(backend, step=100)
    told = {"parent": CommitKey(1, 100), "metadata": {"loss": math.nan, "tags": ["\x1b[2J"]}}
    second = commit(backend, dataclasses.replace(save(backend, step=200).manifest, **told), [])
    result = ls(tmp_path, "--json")
    assert result.exit_code == 0, result.output
    shown = [json.loads(line, parse_constant=pytest.fail) for line in result.stdout.splitlines()]
    assert [one["sha256"] for one in shown] == [first.sha256, second.sha256]
    assert [one["parent"] for one in shown] == [None, [1, 100]]
    for one, saved in zip(shown, (first, second), strict=True):
        manifest = saved.manifest
        assert (one["run_id"], one["versions"]) == (manifest.run_id, dict(manifest.versions))
        assert one["parts"] == [dataclasses.asdict(part) for part in manifest.parts]
    assert shown[1]["metadata"] == {"loss": {"~": "float", "v": "7ff8000000000000"}, "tags": ["\x1b[2J"]}
    assert "\x1b" not in result.stdout


def test_as_json_what_cannot_be_read_says_why_and_the_status_is_1(
    tmp_path: Path, backend: LocalBackend
) -> None:
    damaged, newer = save(backend, step=100), save(backend, step=200)
    save(backend, step=300)
    flip(backend, damaged.manifest_path, 1)
    make_newer(backend, "model", newer.key)
    result = ls(tmp_path, "--json")
    assert result.exit_code == 1
    shown = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(one["step"], one.get("fault")) for one in shown] == [
        (100, "damaged"),
        (200, "newer"),
        (300, None),
    ]
    assert damaged.manifest_path in shown[0]["message"] and "upgrade" in shown[1]["message"]


def test_damaged_data_is_not_looked_for(tmp_path: Path, backend: LocalBackend) -> None:
    flip(backend, save(backend).data_path(0), -1)
    assert ls(tmp_path).exit_code == 0


def test_voids_are_not_listed(tmp_path: Path, backend: LocalBackend) -> None:
    void(backend, save(backend, step=100))
    save(backend, step=200)
    assert [line[1] for line in lines(ls(tmp_path))] == ["step", "200"]


def fails_in_one_line(result: Result) -> str:
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def test_where_no_checkpoint_is_an_error_says_so(tmp_path: Path, backend: LocalBackend) -> None:
    assert "there is no checkpoint in" in fails_in_one_line(ls(tmp_path))
    assert "there is no checkpoint in" in fails_in_one_line(ls(tmp_path / "nowhere"))
    void(backend, save(backend))
    assert "given up or removed" in fails_in_one_line(ls(tmp_path))
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("path", ["s3://bucket/run", "https://host/run"])
def test_a_storage_that_is_not_supported_is_an_error(path: str) -> None:
    assert "not supported" in fails_in_one_line(ls(path))


def test_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    fails_in_one_line(ls(tmp_path / "file"))


def test_a_storage_that_fails_is_an_error(
    tmp_path: Path, backend: LocalBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = save(backend)
    fails = FaultyBackend(backend)
    fails.when("read", saved.manifest_path, not_done())
    monkeypatch.setattr(place, "backend_for", lambda target: fails)
    assert "scripted fault" in fails_in_one_line(ls(tmp_path))


def test_a_checkpoint_that_is_pruned_meanwhile_is_left_out(
    tmp_path: Path, backend: LocalBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, other = save(backend, step=100), save(backend, step=200)
    save(backend, step=300)
    faulty = FaultyBackend(backend)

    async def prune(call) -> object:
        await backend.delete(old.commit_path)
        await backend.delete(old.manifest_path)
        return await call.proceed()

    async def take(call) -> object:
        await backend.delete(other.commit_path)
        return await call.proceed()

    faulty.when("read", old.manifest_path, prune)
    faulty.when("read", other.commit_path, take)
    monkeypatch.setattr(place, "backend_for", lambda target: faulty)
    result = ls(tmp_path)
    assert result.exit_code == 0, result.output
    assert [line[1] for line in lines(result)] == ["step", "300"]


def test_files_that_go_while_they_are_listed_leave_no_traceback(
    tmp_path: Path, backend: LocalBackend
) -> None:
    saved = [save(backend, step=step) for step in range(100, 130)]

    def take_away() -> None:
        for one in saved[:-1]:
            remove(backend, one)

    thread = threading.Thread(target=take_away)
    thread.start()
    while thread.is_alive():
        result = ls(tmp_path)
        assert result.exit_code == 0, result.output
    thread.join()
    assert [line[1] for line in lines(ls(tmp_path))] == ["step", "129"]


def remove(backend: LocalBackend, saved: Saved) -> None:
    for path in (saved.commit_path, saved.manifest_path, saved.part_path(0), saved.data_path(0)):
        run_sync(backend.delete(path))
