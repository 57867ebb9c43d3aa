"""How the build chooses a CUDA toolkit, and what it says of one that does not fit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # what setup.py says costs an import of torch each

ROOT = Path(__file__).resolve().parents[1]
TOOLS = "/usr/bin:/bin"


def toolkit(folder: Path, version: str = "13.0") -> Path:
    """Makes a folder that looks like a CUDA toolkit from afar."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(
        "#!/bin/sh\n"
        f'echo "#$ TOP={folder}/bin/.."\n'
        f'echo "Cuda compilation tools, release {version}"\n'
        "echo sm_61 sm_75 sm_90a\n"
    )
    nvcc.chmod(0o755)
    return folder


def found(**environment: Path | str) -> str:
    run = subprocess.run(
        [ROOT / "scripts" / "find_cuda.sh"],
        check=True,
        capture_output=True,
        text=True,
        env={"PATH": TOOLS, **{name: str(value) for name, value in environment.items()}},
    )
    return run.stdout.strip()


def test_the_toolkit_that_is_named_comes_first(tmp_path):
    named, other, on_path = (toolkit(tmp_path / name) for name in ("named", "other", "path"))
    path = f"{on_path}/bin:{TOOLS}"
    assert found(CUDA_HOME=named, CUDA_PATH=other, PATH=path) == str(named)
    assert found(CUDA_HOME=tmp_path / "absent", CUDA_PATH=other, PATH=path) == str(other)


def test_a_compiler_on_the_path_says_where_its_toolkit_is(tmp_path):
    home = toolkit(tmp_path / "toolkit")
    wrapper = tmp_path / "bin" / "nvcc"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {home}/bin/nvcc "$@"\n')
    wrapper.chmod(0o755)
    assert found(PATH=f"{wrapper.parent}:{TOOLS}") == str(home)


def test_without_a_toolkit_nothing_is_found():
    usual = Path("/usr/local/cuda")
    assert found(CUDA_HOME="/nowhere") == (str(usual.resolve()) if (usual / "bin" / "nvcc").exists() else "")


def setup_says(home: Path | str) -> tuple[int, str]:
    run = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "CUDA_HOME": str(home)},
    )
    return run.returncode, run.stderr


def test_a_folder_without_a_compiler_is_refused_with_what_to_do(tmp_path):
    code, said = setup_says(tmp_path)
    assert code != 0
    assert f"CUDA_HOME is {tmp_path}, where no nvcc runs" in said
    assert "Set it to the folder of a CUDA toolkit that holds bin/nvcc, or to nothing" in said
    assert "Traceback" not in said


def test_a_toolkit_that_is_too_old_is_refused(tmp_path):
    code, said = setup_says(toolkit(tmp_path / "old", "11.8"))
    assert code != 0 and "a toolkit 11.8; CUDA 12 is needed" in said


def test_a_toolkit_without_its_runtime_is_refused(tmp_path):
    code, said = setup_says(toolkit(tmp_path / "half"))
    assert code != 0 and "holds no libcudart_static.a, in lib64 or lib" in said


@pytest.mark.parametrize("folder", ["lib64", "lib"])
def test_a_toolkit_may_keep_its_libraries_in_either_folder(tmp_path, folder):
    home = toolkit(tmp_path / "toolkit")
    (home / folder).mkdir()
    (home / folder / "libcudart_static.a").touch()
    assert setup_says(home)[0] == 0


def test_an_empty_name_builds_without_cuda():
    assert setup_says("")[0] == 0
