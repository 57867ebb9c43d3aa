"""Builds `dtruntime_torch._C`; everything else about the package stands in pyproject.toml.

The CUDA sources are built with it if CUDA_HOME names a toolkit, or if torch is a CUDA build and a toolkit of its
version is found; CUDA_HOME= (empty) leaves them out. TORCH_CUDA_ARCH_LIST chooses the devices, as for torch: by
default the first of each generation that the toolkit knows, and what is newer through PTX.
"""

from __future__ import annotations

import os
import re
import subprocess
from glob import glob
from pathlib import Path

import torch
from setuptools import Extension, setup  # type: ignore[import-untyped]
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parent
FIND_CUDA = "scripts/find_cuda.sh"
OLDEST_CUDA = 12  # the first whose nvcc compiles C++20
OLDEST_DEVICE = 70  # the first that takes __grid_constant__


def version_of(home: Path) -> str:
    """Returns the version of the toolkit at `home`, as "13.0". Stops the build if there is none."""
    how_on = (
        "Set it to the folder of a CUDA toolkit that holds bin/nvcc, or to nothing to build without CUDA."
    )
    try:
        said = subprocess.run(
            [home / "bin" / "nvcc", "--version"], check=True, capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"CUDA_HOME is {home}, where no nvcc runs ({error}). {how_on}") from error
    found = re.search(r"release (\d+\.\d+)", said.stdout)
    if found is None or int(found[1].partition(".")[0]) < OLDEST_CUDA:
        version = found[1] if found else "of no known version"
        raise SystemExit(f"CUDA_HOME is {home}, a toolkit {version}; CUDA {OLDEST_CUDA} is needed. {how_on}")
    return found[1]


def find_toolkit() -> Path | None:
    """Returns the toolkit to build the CUDA sources with, or None to leave them out."""
    named = os.environ.get("CUDA_HOME")
    if named is not None:
        home = Path(named) if named else None
    elif torch.version.cuda is not None:
        run = subprocess.run([ROOT / FIND_CUDA], check=True, capture_output=True, text=True)
        home = Path(run.stdout.strip()) if run.stdout.strip() else None
    else:
        home = None
    if home is not None:
        major = version_of(home).partition(".")[0]
        # Torch refuses another major version than its own; one that nobody named is then no reason to stop.
        if named is None and major != str(torch.version.cuda).partition(".")[0]:
            return None
    return home


def architecture_flags(home: Path) -> list[str]:
    """Returns what makes nvcc compile for the first device of each generation, as -arch=all-major, but no older."""
    listed = subprocess.run(
        [home / "bin" / "nvcc", "--list-gpu-code"], check=True, capture_output=True, text=True
    )
    codes = [int(code) for code in re.findall(r"sm_(\d+)\b", listed.stdout) if int(code) >= OLDEST_DEVICE]
    first = sorted({min(code for code in codes if code // 10 == other // 10) for other in codes})
    flags = [f"-gencode=arch=compute_{code},code=sm_{code}" for code in first]
    return [*flags, f"-gencode=arch=compute_{first[-1]},code=compute_{first[-1]}"]


def with_cuda(extension: Extension, sources: list[str], home: Path) -> None:
    """Adds the CUDA sources, compiled by the toolkit at `home`, with its runtime linked statically."""
    libraries = [home / name for name in ("lib64", "lib") if (home / name / "libcudart_static.a").exists()]
    if not libraries:
        raise SystemExit(f"{home} holds no libcudart_static.a, in lib64 or lib: install all of the toolkit.")
    # torch sets it only if it was built for CUDA itself; our kernels do not depend on that.
    cpp_extension.CUDA_HOME = str(home)
    extension.sources += sources
    extension.define_macros.append(("DTRUNTIME_WITH_CUDA", "1"))
    extension.include_dirs.append(str(home / "include"))
    extension.library_dirs.append(str(libraries[0]))
    extension.libraries += ["cudart_static", "dl", "rt", "pthread"]
    architectures = [] if os.environ.get("TORCH_CUDA_ARCH_LIST") else architecture_flags(home)
    hidden = ["-Xcompiler", f"-fvisibility=hidden,-g0,-ffile-prefix-map={ROOT}=."]
    extension.extra_compile_args["nvcc"] = ["-std=c++20", "-O3", *architectures, *hidden]


def native_module() -> Extension:
    """Describes `_C`: every source below csrc/, no library but the C++ one."""
    # No absolute path may reach the wheel, and no debug information: it would hold thousands of them.
    flags = ["-std=c++20", "-O3", "-g0", "-Wall", "-Wextra", "-fvisibility=hidden"]
    flags.append(f"-ffile-prefix-map={ROOT}=.")
    extension: Extension = cpp_extension.CppExtension(  # type: ignore[no-untyped-call]
        "dtruntime_torch._C",
        sources=sorted(glob("csrc/core/*.cpp") + glob("csrc/bindings/*.cpp")),
        # ninja finds headers by itself; an sdist has those that are named
        depends=[*sorted(glob("csrc/*/*.h")), FIND_CUDA],
        extra_compile_args={"cxx": flags},
    )
    # CppExtension adds torch's libraries. None of their symbols is used, and without them `_C` loads without
    # torch and a new torch needs no rebuild.
    extension.libraries = []
    extension.library_dirs = []
    home = find_toolkit()
    if home is not None:
        with_cuda(extension, sorted(glob("csrc/cuda/*.cu")), home)
    else:
        extension.sources.append("csrc/cuda/absent.cpp")
    return extension


setup(ext_modules=[native_module()], cmdclass={"build_ext": cpp_extension.BuildExtension})
