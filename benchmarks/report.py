"""docs/BENCHMARKS.md from what lies in benchmarks/results: results in, text out, nothing else.

The page is wholly made here, so that a figure on it can only come from a file that a run wrote.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dtruntime_torch.gpucheck.report import SCHEMA as GPU_SCHEMA

# As a run wrote it: benchmarks/run.py says what is in a host's, dtruntime_torch/gpucheck/report.py in a GPU's.
Results = Mapping[str, Any]

SCHEMA = 1

INTRODUCTION = """\
# Benchmarks

`make bench` wrote this page from `benchmarks/results/`; it is not edited by hand.

Ours and a peer do the same work in turns, in one run. Figures are medians. A ratio is above 1 where ours is better:
it is the median of the ratios of neighbouring runs, and the quartiles are theirs. A shared machine is fast one second
and slow the next, so look at ratios rather than figures, and at the quartiles before either. A goal that is missed
stays on the page as missed. `python -m benchmarks.NAME` runs one alone, by the name above its table.
"""

NO_GPU_RESULTS = """\
Run `python -m dtruntime_torch.gpucheck` on a machine with a GPU; no results are committed yet, and nothing is claimed
about speed there. It writes a file into `benchmarks/results/`, from which the next `make bench` fills this section.
"""

NOT_MEASURED = "Not measured yet.\n"


def render(host: Results, gpus: Sequence[Results] = ()) -> str:
    """Makes the page.

    Args:
        host: what the benchmarks gave.
        gpus: what gpucheck gave, a run each.

    Raises:
        ValueError: a result is of another schema, or is no GPU's where one is expected.
    """
    _check(host, "host", SCHEMA)
    for gpu in gpus:
        _check(gpu, "gpu", GPU_SCHEMA)
    parts = [INTRODUCTION, _verdict(host), _machine(host)]
    parts += [_benchmark(name, found) for name, found in host["benchmarks"].items()]
    parts.append("## GPU\n")
    parts += [_gpu(gpu) for gpu in gpus] or [NO_GPU_RESULTS]
    return "\n".join(parts)


def _check(results: Results, kind: str, schema: int) -> None:
    found = (results.get("kind"), results.get("schema"))
    if found != (kind, schema):
        raise ValueError(f"results of kind {found[0]} and schema {found[1]} instead of {kind} and {schema}")


def _verdict(host: Results) -> str:
    lines = []
    if host["quick"]:
        lines.append("**This was a quick run of one repetition each: its figures say nothing.**\n")
    metrics = [metric for found in host["benchmarks"].values() for metric in found["metrics"]]
    goals = [metric for metric in metrics if metric["goal"] is not None]
    missed = [metric for metric in goals if not _reached(metric)]
    if goals:
        names = ", ".join(f"`{metric['metric']}`" for metric in missed)
        lines.append(
            f"{len(goals) - len(missed)} of {len(goals)} goals are reached"
            + (f"; missed: {names}.\n" if missed else ".\n")
        )
    return "\n".join(lines)


def _machine(host: Results) -> str:
    machine = host["machine"]
    peers = ", ".join(f"{name} {version}" for name, version in host["peers"].items())
    places = ", ".join(f"{place}: {kind}" for place, kind in host["file_systems"].items())
    rows = {
        "date": machine["date"],
        "command": f"`{host['command']}`",
        "CPU": f"{machine['cpu']}, {machine['cores']} cores, {machine['simd']}",
        "memory": _gibibytes(machine["memory"]),
        "kernel": machine["kernel"],
        "file systems": places,
        "Python, torch": f"{machine['python']}, {machine['torch']}",
        "compiler": machine["compiler"],
        "peers": peers,
    }
    return "## The machine\n\n| | |\n|---|---|\n" + "".join(f"| {k} | {v} |\n" for k, v in rows.items())


def _benchmark(name: str, found: Results) -> str:
    return f"## {name}\n\n{found['about']}\n\n" + (
        _table(found["metrics"]) if found["metrics"] else NOT_MEASURED
    )


def _gpu(gpu: Results) -> str:
    device, machine = gpu["device"], gpu["machine"]
    failed = [check for check in gpu["checks"] if not check["ok"]]
    lines = [
        f"### {device['name']}\n",
        f"`{gpu['command']}` on {machine['date']}, {gpu['seconds']:g} s. Compute capability {device['capability']}, "
        f"{_gibibytes(device['memory'])}, driver {device['driver']}, torch {machine['torch']} with CUDA "
        f"{device['cuda_of_torch']}, dtruntime_torch {machine['dtruntime_torch']} with CUDA {machine['cuda']}.\n",
        f"{len(gpu['checks']) - len(failed)} of {len(gpu['checks'])} checks hold.\n",
    ]
    notes = [f"- failed: {check['name']}: {check['detail']}" for check in failed]
    notes += [f"- not run: {left_out['name']}: {left_out['why']}" for left_out in gpu["not_run"]]
    return "\n".join(lines + notes) + ("\n\n" if notes else "\n") + _table(gpu["metrics"])


def _table(metrics: Sequence[Results]) -> str:
    lines = [
        "| metric | ours | peer | unit | the peer | ratio | quartiles | runs | goal | |",
        "|---|---:|---:|---|---|---:|---|---:|---:|---|",
    ]
    lines += [
        "| " + " | ".join(cell.replace("|", "\\|") for cell in _row(metric)) + " |" for metric in metrics
    ]
    return "\n".join(lines) + "\n"


def _row(metric: Results) -> list[str]:
    low, high = metric["spread"]
    figures = [f"{metric['ours']:g}", f"{metric['peer']:g}", metric["unit"], metric["peer_name"]]
    ratio = [f"{metric['ratio']:.3f}", f"{low:.3f} to {high:.3f}", str(metric["repetitions"])]
    if metric["goal"] is None:
        goal = ["", ""]
    else:
        goal = [f"{metric['goal']:g}", "reached" if _reached(metric) else "**missed**"]
    return [metric["metric"], *figures, *ratio, *goal]


def _reached(metric: Results) -> bool:
    return bool(metric["ratio"] >= metric["goal"])


def _gibibytes(nbytes: int) -> str:
    return f"{nbytes / (1 << 30):.0f} GiB"
