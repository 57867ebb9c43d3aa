"""What `make` says on a machine that lacks something: one sentence, with what to install, before anything is made."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def program(path: Path, line: str) -> str:
    """Makes a stand-in for a tool, of one line of shell."""
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)
    return str(path)


def lacks(python: str, cxx: str) -> str:
    check = ROOT / "scripts" / "check_machine.sh"
    return subprocess.run([check, python, cxx], check=True, stdout=subprocess.PIPE, text=True).stdout


@pytest.fixture
def python(tmp_path) -> str:
    return program(tmp_path / "python", "exit 0")


@pytest.fixture
def cxx(tmp_path) -> str:
    return program(tmp_path / "cxx", "cat >/dev/null")


def test_a_machine_that_has_everything_lacks_nothing(python, cxx):
    assert lacks(python, cxx) == ""


def test_the_python_that_runs_this_lacks_nothing():
    # In the environment that `make setup` made, the compiler is the one that just built the extension.
    assert lacks(sys.executable, os.environ.get("CXX", "c++")) == ""


@pytest.mark.parametrize("missing", ["", "no-such-python"])
def test_no_python_is_named(missing, cxx):
    assert "Python 3.10 or newer: install" in lacks(missing, cxx)


@pytest.mark.parametrize(("version", "fits"), [("3, 9, 19", False), ("3, 10, 0", True), ("4, 0, 0", True)])
def test_an_old_python_is_named(version, fits, tmp_path, cxx):
    claim = f"import sys; sys.version_info = ({version})"
    claiming = program(tmp_path / "claiming", f'exec "{sys.executable}" -c "{claim}; $2"')
    assert (f"{claiming} is not Python 3.10 or newer: install" in lacks(claiming, cxx)) is not fits


def test_a_python_without_venv_is_named(tmp_path, cxx):
    bare = program(tmp_path / "bare", 'case "$2" in *ensurepip*) exit 1;; esac')
    assert "venv and ensurepip: install" in lacks(bare, cxx)


def test_a_compiler_without_cxx20_is_named(tmp_path, python):
    old = program(tmp_path / "old", "exit 1")
    assert f"{old} does not compile C++20: install" in lacks(python, old)


def test_a_python_without_headers_is_named(tmp_path, python):
    headless = program(tmp_path / "headless", "! grep -q Python.h")
    assert "Python.h: install" in lacks(python, headless)


def test_make_stops_with_that_sentence_and_makes_nothing(tmp_path):
    venv = tmp_path / "venv"
    make = ["make", "--no-print-directory", "setup", f"VENV={venv}", "PYTHON=no-such-python"]
    # Not a part of the make that may have started the tests.
    env = {
        name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    }
    run = subprocess.run(make, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert run.returncode != 0
    assert len(run.stdout.splitlines()) == 1 and "no-such-python is not Python 3.10 or newer" in run.stdout
    assert not venv.exists()
