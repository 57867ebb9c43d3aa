"""The run itself: every check and every measurement on one device, whatever becomes of the others."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from dtruntime_torch.gpucheck.bandwidth import measure_digest, measure_staging
from dtruntime_torch.gpucheck.changes import check_changes
from dtruntime_torch.gpucheck.cuda_device import CudaBench, what_is_missing
from dtruntime_torch.gpucheck.deltas import check_deltas, measure_deltas
from dtruntime_torch.gpucheck.device import Bench
from dtruntime_torch.gpucheck.digests import check_digests
from dtruntime_torch.gpucheck.door import check_door, measure_door
from dtruntime_torch.gpucheck.findings import Check, Finding
from dtruntime_torch.gpucheck.gather import measure_gather
from dtruntime_torch.gpucheck.machine import describe_machine
from dtruntime_torch.gpucheck.overlap import check_overlap
from dtruntime_torch.gpucheck.report import Report, one_line
from dtruntime_torch.gpucheck.sizes import FULL, QUICK, Sizes
from dtruntime_torch.gpucheck.staging import check_staging
from dtruntime_torch.gpucheck.streams import check_streams
from dtruntime_torch.gpucheck.tears import check_tears
from dtruntime_torch.gpucheck.training import measure_training

Section = Callable[[Bench, Sizes], Iterator[Finding]]

SECTIONS: tuple[Section, ...] = (
    check_digests,
    check_streams,
    check_changes,
    check_staging,
    check_tears,
    check_deltas,
    check_door,
    check_overlap,
    measure_digest,
    measure_staging,
    measure_deltas,
    measure_gather,
    measure_door,
    measure_training,
)
ALL_HOLD, SOMETHING_FAILED, NO_GPU = 0, 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Checks the GPU of this machine; see `parser` for the options.

    Returns:
        The exit status: 0 if all checks hold, 1 if one failed, 2 if there is no GPU to check.
    """
    options = parser().parse_args(arguments)
    missing = what_is_missing()
    if missing:
        _say("\n".join(["There is no GPU that can be checked here.", *missing]))
        return NO_GPU
    return check(CudaBench(), QUICK if options.quick else FULL, options.quick, options.output)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m dtruntime_torch.gpucheck",
        description="Checks that digests, staging and copies on this machine's GPU do what the tests show on the CPU, "
        "and measures how fast they are. Exits with 0 if all checks hold, 1 if one failed, 2 without a GPU.",
    )
    made.add_argument("--quick", action="store_true", help="smaller sizes and fewer rounds")
    made.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="where the JSON goes; default: benchmarks/results/gpu-<device>.json",
    )
    return made


def check(bench: Bench, sizes: Sizes, quick: bool, output: Path | None) -> int:
    """Runs all sections on a device, prints as it goes, and writes the report.

    Returns:
        The exit status.
    """
    start = bench.clock()
    findings = []
    for finding in findings_of(bench, sizes):
        _say(one_line(finding))
        findings.append(finding)
    report = Report(bench.describe(), describe_machine(), quick, findings, bench.clock() - start)
    path = report.default_path() if output is None else output
    report.write(path)
    _say(f"\n{report.summary()}\nwritten to {path}")
    return ALL_HOLD if report.ok else SOMETHING_FAILED


def findings_of(bench: Bench, sizes: Sizes) -> Iterator[Finding]:
    """What every section finds. One that ends with an error is a check that failed; the others run all the same."""
    for section in SECTIONS:
        try:
            yield from section(bench, sizes)
        except Exception as error:
            traceback.print_exc()
            yield Check(f"{section.__name__} runs to its end", False, f"{type(error).__name__}: {error}")


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
