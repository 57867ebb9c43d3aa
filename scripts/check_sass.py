"""Checks the machine code of the CUDA kernels: that no register spills, and how long the digest's inner loop is.

    python scripts/check_sass.py CUDA_HOME

The kernels are bound by memory only as long as the instructions for each KiB of a chunk stay few: 60 leave three
quarters of the instruction slots of an H100 unused at the bandwidth of its memory. Counted are all instructions of
the loop that sums blocks, also those that one warp of eight executes for all. Toolkits come without a disassembler at
times; it is then installed from PyPI into build/tools.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / "build" / "tools"
DISASSEMBLER = "nvidia-cuda-nvdisasm==13.*"  # of PyPI
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
# Instructions for each KiB, by what tells the kernels apart in their mangled names. Copying stores each piece too.
LIMITS = {"digest_kernelILb0E": ("digest", 60), "digest_kernelILb1E": ("copy_digest", 66)}
LIMITED = "sm_90"
WARP_LOAD_BYTES = 32 * 16


@dataclass(frozen=True)
class Resources:
    """What ptxas says of one kernel."""

    kernel: str  # mangled
    registers: int
    shared_bytes: int
    spilled_bytes: int  # and those of the stack


@dataclass(frozen=True)
class Loop:
    """The innermost loop of a kernel that loads 16 bytes a lane at a time."""

    instructions: int
    loads: int  # of 16 bytes a lane

    @property
    def instructions_per_kib(self) -> float:
        return self.instructions * 1024 / (self.loads * WARP_LOAD_BYTES)


def parse_resources(said: str) -> Iterator[Resources]:
    """Reads what `ptxas -v` says."""
    for part in said.split("Compiling entry function '")[1:]:
        used = re.search(r"Used (\d+) registers", part)
        memory = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
        )
        if used is None or memory is None:
            raise SystemExit(f"ptxas says what this script does not understand: {part}")
        shared = re.search(r"(\d+) bytes smem", part)
        spilled = sum(int(number) for number in memory.groups())
        yield Resources(part.partition("'")[0], int(used[1]), int(shared[1]) if shared else 0, spilled)


def parse_functions(sass: str) -> dict[str, list[str]]:
    """Reads what `nvdisasm -c` prints: by function its lines, which are instructions, and labels that end in ":"."""
    functions: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in sass.splitlines():
        if start := re.match(r"\.text\.(\S+):$", line):
            lines = functions.setdefault(start[1], [])
        elif label := re.match(r"(\.L_\w+:)$", line):
            lines.append(label[1])
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.+?)\s*;", line):
            lines.append(instruction[1])
    return functions


def find_loop(lines: list[str]) -> Loop | None:
    """Returns the shortest stretch from a label to a branch back to it that holds a load of 16 bytes a lane."""
    labels: dict[str, int] = {}
    loops = []
    for place, line in enumerate(lines):
        if line.endswith(":"):
            labels[line[:-1]] = place
        elif (branch := re.search(r"\bBRA\b.*?(\.L_\w+)", line)) and branch[1] in labels:
            body = [other for other in lines[labels[branch[1]] : place + 1] if not other.endswith(":")]
            loads = sum(1 for other in body if re.search(r"\bLDG\S*\.128\b", other))
            if loads:
                loops.append(Loop(len(body), loads))
    return min(loops, key=lambda loop: loop.instructions, default=None)


def find_disassembler(home: Path) -> Path:
    """Returns nvdisasm, of the toolkit or of PyPI."""
    own = home / "bin" / "nvdisasm"
    found = own if own.exists() else next(TOOLS.glob("nvidia/*/bin/nvdisasm"), None)
    if found is None:
        install = [
            sys.executable,
            "-m",
            "pip",
            "--disable-pip-version-check",
            "install",
            "--quiet",
            "--no-deps",
        ]
        subprocess.run([*install, "--target", TOOLS, DISASSEMBLER], check=True, timeout=600)
        found = next(TOOLS.glob("nvidia/*/bin/nvdisasm"))
    found.chmod(0o755)  # a wheel may leave it without
    return found


def compile_kernels(home: Path, source: Path, architecture: str, cubin: Path) -> list[Resources]:
    """Compiles as setup.py does, and returns what the kernels take."""
    flags = ["-std=c++20", "-O3", f"-arch={architecture}", "-Xptxas", "-v", "--cubin"]
    command = [str(home / "bin" / "nvcc"), *flags, "-o", str(cubin), str(source)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if run.returncode != 0:
        raise SystemExit(f"{source.name} does not compile for {architecture}:\n{run.stdout}{run.stderr}")
    return list(parse_resources(run.stdout + run.stderr))


def check(home: Path, source: Path, architecture: str, disassembler: Path) -> list[str]:
    """Prints a line for each kernel of a source, and returns what is wrong with them."""
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        kernels = compile_kernels(home, source, architecture, cubin)
        sass = subprocess.run(
            [disassembler, "-c", cubin], check=True, capture_output=True, text=True, timeout=600
        )
    functions = parse_functions(sass.stdout)
    for kernel in kernels:
        marks = [mark for mark in LIMITS if mark in kernel.kernel]
        name, limit = LIMITS[marks[0]] if marks else (source.stem, None)
        loop = find_loop(functions[kernel.kernel]) if marks else None
        each = f"{loop.instructions_per_kib:6.2f}" if loop else "     -"
        print(
            f"{architecture:7}{name:13}{kernel.registers:10}{kernel.shared_bytes:8}{kernel.spilled_bytes:8}  {each}"
        )
        if kernel.spilled_bytes:
            wrong.append(f"{name} spills registers on {architecture}, or has an array on its stack")
        if marks and loop is None:
            wrong.append(f"{name} has no loop with 16-byte loads on {architecture}")
        if loop and limit and architecture == LIMITED and loop.instructions_per_kib > limit:
            wrong.append(f"{name} takes more than {limit} instructions per KiB on {architecture}")
    return wrong


def main() -> int:
    """Checks every source for every architecture."""
    parser = argparse.ArgumentParser(description="Checks the machine code of the CUDA kernels.")
    parser.add_argument("cuda_home", type=Path, help="the folder of a CUDA toolkit")
    home = parser.parse_args().cuda_home
    if shutil.which(home / "bin" / "nvcc") is None:
        raise SystemExit(f"{home} holds no bin/nvcc: give the folder of a CUDA toolkit")
    disassembler = find_disassembler(home)
    print("         kernel       registers  shared spilled  instructions per KiB")
    wrong = []
    for architecture in ARCHITECTURES:
        for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
            wrong += check(home, source, architecture, disassembler)
    print(*wrong, sep="\n", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
