"""What a user gets from `pip install --no-build-isolation .`, built once from a copy of the sources."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import dtruntime_torch

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("csrc", "dtruntime_torch", "LICENSE", "README.md", "pyproject.toml", "scripts", "setup.py")
NOT_SOURCES = shutil.ignore_patterns("__pycache__", "*.so")


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, folder / part, ignore=NOT_SOURCES)
        else:
            shutil.copy(ROOT / part, folder / part)
    return folder


@pytest.fixture(scope="module")
def wheel(sources, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet"]
    subprocess.run([*pip, "--no-build-isolation", "--no-deps", "-w", folder, sources], check=True)
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site-packages")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", "--target", folder, wheel], check=True)
    return folder


@pytest.fixture(scope="module")
def extension(installed) -> Path:
    (built,) = (installed / "dtruntime_torch").glob("_C*.so")
    return built


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"dtruntime_torch"}
    assert {"dtruntime_torch/py.typed", "dtruntime_torch/_C.pyi"} <= set(names)
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "dtruntime_torch").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == expected


def test_no_file_of_the_wheel_holds_an_absolute_path(wheel, sources):
    archive = zipfile.ZipFile(wheel)
    places = [
        str(sources).encode(),
        str(ROOT).encode(),
        sys.prefix.encode(),
        str(Path.home()).encode() + b"/",
    ]
    assert [name for name in archive.namelist() if any(place in archive.read(name) for place in places)] == []


def test_the_extension_names_neither_torch_nor_a_run_path(extension):
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("readelf, which comes with binutils, is not there")
    dynamic = subprocess.run([readelf, "-d", extension], check=True, capture_output=True, text=True).stdout
    assert "NEEDED" in dynamic
    assert [
        line for line in dynamic.splitlines() if "PATH" in line or "torch" in line or "libc10" in line
    ] == []


def test_the_installed_package_works_from_any_folder(installed, tmp_path):
    program = (
        "import sys, dtruntime_torch; from dtruntime_torch import _C\n"
        "assert 'torch' not in sys.modules, 'the native module needs torch'\n"
        "assert _C.digest(b'', 1 << 20) == b''\n"
        "print(dtruntime_torch.__file__, dtruntime_torch.build_info()['dtruntime_torch'])"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(installed)},
    )
    assert run.stdout.split() == [
        str(installed / "dtruntime_torch" / "__init__.py"),
        dtruntime_torch.__version__,
    ]


def test_the_version_stands_in_one_place(wheel):
    assert wheel.name.startswith(f"dtruntime_torch-{dtruntime_torch.__version__}-")
