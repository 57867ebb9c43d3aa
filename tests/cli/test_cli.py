"""The command line as a process of its own: what it imports, and how it ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dtruntime_torch.cli import main
from dtruntime_torch.storage import LocalBackend
from tests.checkpoint.saved_checkpoints import flip, save

RUN = "from dtruntime_torch.cli import main; main()"
WITHOUT_TORCH = "import sys; sys.modules['torch'] = None; "


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_both_commands_run_without_torch(tmp_path: Path) -> None:
    saved = save(LocalBackend(tmp_path))
    listed = run(WITHOUT_TORCH + RUN, "ls", tmp_path)
    assert (listed.returncode, listed.stderr) == (0, "")
    assert saved.sha256[:12] in listed.stdout
    flip(LocalBackend(tmp_path), saved.data_path(1), -1)
    verified = run(WITHOUT_TORCH + RUN, "verify", tmp_path / "model", "--step", 100)
    assert (verified.returncode, verified.stderr) == (1, "")
    assert saved.data_path(1) in verified.stdout


def test_ls_never_imports_torch(tmp_path: Path) -> None:
    save(LocalBackend(tmp_path))
    code = f"import sys, atexit; atexit.register(lambda: print('torch' in sys.modules)); {RUN}"
    listed = run(code, "ls", tmp_path)
    assert listed.stdout.splitlines()[-1] == "False", listed


def test_planning_reading_writing_and_verifying_need_no_torch() -> None:
    code = """
from dtruntime_torch.checkpoint import verify
from dtruntime_torch.checkpoint.loading import chunk_reader, load_plan, read_requests
from dtruntime_torch.checkpoint.saving import layout, save_plan, shard_file
"""
    imported = run(WITHOUT_TORCH + code)
    assert (imported.returncode, imported.stderr) == (0, "")


def test_an_error_is_one_line_and_the_status_is_2(tmp_path: Path) -> None:
    failed = run(RUN, "ls", tmp_path)
    assert failed.returncode == 2
    assert failed.stdout == ""
    assert len(failed.stderr.splitlines()) == 1


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_its_extra_it_says_how_to_install_it(
    missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith("dtruntime_torch.cli.")]:
        monkeypatch.delitem(sys.modules, name)
    for name in [name for name in sys.modules if name.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    expected = f'error: the command line needs {missing}: pip install "dtruntime_torch[cli]"\n'
    assert capsys.readouterr().err == expected


def test_an_import_that_fails_for_another_reason_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "dtruntime_torch.cli.app", raising=False)
    monkeypatch.setitem(sys.modules, "dtruntime_torch.cli.app", None)
    with pytest.raises(ModuleNotFoundError):
        main()
