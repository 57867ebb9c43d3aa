"""What `make` says on a machine that lacks something: one sentence, with what to install, before anything is made."""

from __future__ import annotations

import os
import re
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


def lacks(python: str, cxx: str, target: str = "setup") -> str:
    check = ROOT / "scripts" / "check_machine.sh"
    return subprocess.run([check, python, cxx, target], check=True, stdout=subprocess.PIPE, text=True).stdout


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


def test_the_cpp_tests_need_neither_venv_nor_python_headers(tmp_path, cxx):
    bare = program(tmp_path / "bare", 'case "$2" in *ensurepip*) exit 1;; esac')
    assert lacks(bare, cxx, "native-test") == ""
    headless = program(tmp_path / "headless", "! grep -q Python.h")
    assert "Python.h" not in lacks(sys.executable, headless, "native-test")


def test_missing_doctest_is_named_for_the_cpp_tests_alone(tmp_path, python):
    without = program(tmp_path / "without", "! grep -q doctest")
    assert "doctest/doctest.h" in lacks(python, without, "native-test")
    assert lacks(python, without) == ""


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_a_missing_sanitizer_is_named(sanitizer, tmp_path, python):
    without = program(tmp_path / "without", f'cat >/dev/null; [ "$1" != -fsanitize={sanitizer} ]')
    assert f"cannot link -fsanitize={sanitizer}: install" in lacks(python, without, "native-test")


def run_make(*arguments: str) -> subprocess.CompletedProcess[str]:
    # Not a part of the make that may have started the tests.
    env = {
        name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    }
    make = ["make", "--no-print-directory", *arguments]
    return subprocess.run(
        make, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.parametrize("target", ["setup", "native-test"])
def test_make_stops_with_that_sentence_and_makes_nothing(target, tmp_path):
    venv = tmp_path / "venv"
    run = run_make(target, f"VENV={venv}", "PYTHON=no-such-python")
    assert run.returncode != 0
    assert len(run.stdout.splitlines()) == 1 and "no-such-python is not Python 3.10 or newer" in run.stdout
    assert not venv.exists()


def test_help_lists_every_target_that_is_meant_for_people():
    (phony,) = re.findall(r"^\.PHONY: (.*) help FORCE$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    listed = [line.split()[1] for line in run_make("help").stdout.splitlines()]
    assert listed == phony.split()
    assert "native-test" in listed


def test_the_cpp_tests_are_built_without_the_extension():
    planned = run_make("--dry-run", "native-test").stdout
    assert "tests/native/native.mk" in planned
    assert "pip" not in planned


def test_the_form_of_the_cpp_tests_is_checked():
    assert "tests/native/main.cpp" in run_make("--dry-run", "lint").stdout
