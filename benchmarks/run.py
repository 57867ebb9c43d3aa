"""Runs every benchmark and writes what they found, and docs/BENCHMARKS.md from it: `make bench`.

What it writes to benchmarks/results/host.json: "schema", "kind" ("host"), "command", "quick", "machine",
"file_systems" (folder -> kind), "peers" (package -> version), and "benchmarks": name -> "about" and "metrics".
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.harness import REPETITIONS, TRIED, end_as_by_exception, modules
from benchmarks.report import SCHEMA, render
from dtruntime_torch.gpucheck.machine import describe_machine

ROOT = Path(__file__).resolve().parents[1]
PEERS = ("xxhash", "torch", "numpy", "safetensors", "torch_checkpointing")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmarks, or only makes the page anew from the results that are there."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=str(__doc__).splitlines()[0]
    )
    parser.add_argument(
        "--quick", action="store_true", help="one repetition each, some of little data; the page says so"
    )
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="this benchmark; the others' results stay"
    )
    parser.add_argument(
        "--repetitions", type=int, default=REPETITIONS, metavar="N", help="runs of each; default: %(default)s"
    )
    parser.add_argument("--render", action="store_true", help="run nothing, make the page from the results")
    parser.add_argument(
        "--into",
        type=Path,
        default=ROOT,
        metavar="FOLDER",
        help="the checkout to write to; default: this one",
    )
    options = parser.parse_args(arguments)
    end_as_by_exception()
    results = options.into / "benchmarks" / "results"
    if not options.render:
        results.mkdir(parents=True, exist_ok=True)
        names = [f"benchmarks.{name}" for name in options.only] if options.only else modules()
        found = collect(names, options.quick, options.repetitions)
        if options.only:
            again = " ".join(f"--only {name}" for name in options.only)
            again += f" --repetitions {options.repetitions}" if options.repetitions != REPETITIONS else ""
            found = _beside(_read(results / "host.json"), found, f"python -m benchmarks.run {again}")
        _write(results / "host.json", json.dumps(found, indent=1) + "\n")
    _write(options.into / "docs" / "BENCHMARKS.md", page(results))


def page(results: Path) -> str:
    """The page that a folder of results gives."""
    gpus = [_read(path) for path in sorted(results.glob("gpu-*.json"))]
    return render(_read(results / "host.json"), gpus)


def collect(names: Sequence[str], quick: bool, repetitions: int = REPETITIONS) -> dict[str, Any]:
    """Runs benchmarks, each in a process of its own, one after another.

    Args:
        names: their modules.
        quick: one repetition each, and little data where a benchmark starts processes.
        repetitions: of each, if not quick.

    Raises:
        SystemExit: one of them failed; a page without it would hide that.
    """
    repetitions = 1 if quick else repetitions
    return {
        "schema": SCHEMA,
        "kind": "host",
        "command": "make bench" + (" ARGS=--quick" if quick else ""),
        "quick": quick,
        "machine": describe_machine(),
        "file_systems": {place: file_system(place) for place in ("/dev/shm", tempfile.gettempdir())},
        "peers": {name: found for name in PEERS if (found := _installed(name)) is not None},
        "benchmarks": {
            name.rpartition(".")[2]: {"about": _about(name), "metrics": _run(name, quick, repetitions)}
            for name in names
        },
    }


def _beside(old: dict[str, Any], new: dict[str, Any], command: str) -> dict[str, Any]:
    """The new results, and the old ones of the benchmarks that were not run again."""
    both = {**old["benchmarks"], **new["benchmarks"]}
    earlier = [one for one in old["command"].split(", then ") if one != command]
    return {
        **new,
        "command": ", then ".join([*earlier, command]),
        "benchmarks": {name: both[name] for name in sorted(both)},
    }


def file_system(place: str, mounts: str | None = None) -> str:
    """The kind of the file system that a folder lies on, as the kernel names it.

    Args:
        place: the folder.
        mounts: the text of /proc/mounts, or what to take for it.
    """
    text = Path("/proc/mounts").read_text(encoding="utf-8") if mounts is None else mounts
    at = os.path.realpath(place)
    holding = [
        (len(point), kind)
        for _, point, kind, *_ in map(str.split, text.splitlines())
        if os.path.commonpath([at, point]) == point
    ]
    # Of two that are mounted at one place the later one is seen.
    return max(reversed(holding), key=lambda found: found[0])[1]


def _run(name: str, quick: bool, repetitions: int) -> list[dict[str, Any]]:
    print(f"==> {name}", flush=True)
    metrics = []
    command = [sys.executable, "-m", name, "--repetitions", str(repetitions)]
    environment = {**os.environ, TRIED: "1"} if quick else None
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                metrics.append(json.loads(line))
                print(line, end="", flush=True)
        except BaseException:
            # It ends its own processes, and deletes its files.
            process.terminate()
            raise
    if process.returncode:
        raise SystemExit(f"{name} ended with {process.returncode}; nothing was written")
    return metrics


def _about(name: str) -> str:
    """The first line of the docstring of a benchmark."""
    path = ROOT.joinpath(*name.split(".")).with_suffix(".py")
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
