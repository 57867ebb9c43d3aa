"""Builds `dtruntime_torch._C`; everything else about the package stands in pyproject.toml.

With CUDA_HOME in the environment the CUDA sources are built too, else the CPU alone.
"""

from __future__ import annotations

import os
from glob import glob
from pathlib import Path

from setuptools import Extension, setup  # type: ignore[import-untyped]
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parent
CUDA_HOME = os.environ.get("CUDA_HOME")


def with_cuda(extension: Extension, sources: list[str], home: Path) -> None:
    """Adds the CUDA sources, compiled by the toolkit at `home`, with its runtime linked statically."""
    # torch sets it only if it was built for CUDA itself; our kernels do not depend on that.
    cpp_extension.CUDA_HOME = str(home)
    extension.sources += sources
    extension.define_macros.append(("DTRUNTIME_WITH_CUDA", "1"))
    extension.include_dirs.append(str(home / "include"))
    extension.library_dirs.append(str(home / "lib64"))
    extension.libraries += ["cudart_static", "dl", "rt", "pthread"]
    architectures = [] if "TORCH_CUDA_ARCH_LIST" in os.environ else ["-arch=all-major"]
    extension.extra_compile_args["nvcc"] = ["-std=c++20", "-O3", *architectures]


def native_module() -> Extension:
    """Describes `_C`: every source below csrc/, no library but the C++ one."""
    # No absolute path may reach the wheel, and no debug information: it would hold thousands of them.
    flags = ["-std=c++20", "-O3", "-g0", "-Wall", "-Wextra", "-fvisibility=hidden"]
    flags.append(f"-ffile-prefix-map={ROOT}=.")
    extension: Extension = cpp_extension.CppExtension(  # type: ignore[no-untyped-call]
        "dtruntime_torch._C",
        sources=sorted(glob("csrc/core/*.cpp") + glob("csrc/bindings/*.cpp")),
        depends=sorted(
            glob("csrc/*/*.h")
        ),  # ninja finds headers by itself; an sdist has those that are named
        extra_compile_args={"cxx": flags},
    )
    # CppExtension adds torch's libraries. None of their symbols is used, and without them `_C` loads without
    # torch and a new torch needs no rebuild.
    extension.libraries = []
    extension.library_dirs = []
    if CUDA_HOME:
        with_cuda(extension, sorted(glob("csrc/cuda/*.cu")), Path(CUDA_HOME))
    else:
        extension.sources.append("csrc/cuda/absent.cpp")
    return extension


setup(ext_modules=[native_module()], cmdclass={"build_ext": cpp_extension.BuildExtension})
