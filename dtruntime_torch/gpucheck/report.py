"""All that a run found: as a table, and as the JSON that docs/BENCHMARKS.md is made from."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from dtruntime_torch.gpucheck.comparison import Comparison
from dtruntime_torch.gpucheck.findings import Check, Finding, NotRun

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Report:
    """A run of gpucheck.

    Attributes:
        device: what `Bench.describe` said; "kind" is "gpu" where it is one.
        machine: what `describe_machine` said.
        quick: sizes were small.
        findings: in the order in which they were found.
        seconds: that the run took.
    """

    device: dict[str, object]
    machine: dict[str, object]
    quick: bool
    findings: Sequence[Finding] = field(default=())
    seconds: float = 0.0

    @property
    def checks(self) -> list[Check]:
        """What must hold."""
        return [finding for finding in self.findings if isinstance(finding, Check)]

    @property
    def metrics(self) -> list[Comparison]:
        """What was measured."""
        return [finding for finding in self.findings if isinstance(finding, Comparison)]

    @property
    def not_run(self) -> list[NotRun]:
        """What this machine had no means for."""
        return [finding for finding in self.findings if isinstance(finding, NotRun)]

    @property
    def ok(self) -> bool:
        """Whether all that must hold does. A goal that was missed is no failure; it is shown."""
        return all(check.ok for check in self.checks)

    def default_path(self) -> Path:
        """Where it goes: named after the kind of the device and its name.

        Example:
            >>> str(Report({"kind": "gpu", "name": "NVIDIA H100 80GB HBM3"}, {}, False).default_path())
            'benchmarks/results/gpu-nvidia-h100-80gb-hbm3.json'
        """
        words = f"{self.device['kind']}-{self.device['name']}".lower()
        return Path("benchmarks", "results", re.sub(r"[^a-z0-9]+", "-", words).strip("-") + ".json")

    def write(self, path: Path) -> None:
        """Writes it as JSON; makes the folder."""
        content = {
            "schema": SCHEMA,
            "kind": self.device["kind"],
            "command": "python -m dtruntime_torch.gpucheck" + (" --quick" if self.quick else ""),
            "seconds": round(self.seconds, 1),
            "ok": self.ok,
            "device": self.device,
            "machine": self.machine,
            "checks": [asdict(check) for check in self.checks],
            "metrics": [metric.as_json() for metric in self.metrics],
            "not_run": [asdict(left_out) for left_out in self.not_run],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def summary(self) -> str:
        """The table of what was measured, and a sentence on what was checked."""
        failed = [check for check in self.checks if not check.ok]
        missed = [metric for metric in self.metrics if metric.reached is False]
        verdict = f"{len(self.checks) - len(failed)} of {len(self.checks)} checks hold"
        if missed:
            verdict += f"; {len(missed)} of {sum(m.goal is not None for m in self.metrics)} goals missed"
        lines = [f"{self.device['kind']}: {self.device['name']}", *_table(self.metrics)]
        lines += [f"FAILED  {check.name}: {check.detail}" for check in failed]
        lines += [one_line(left_out) for left_out in self.not_run]
        return "\n".join([*lines, f"{verdict}; {self.seconds:.0f} s"])


def one_line(finding: Finding) -> str:
    """What is shown as soon as it is found."""
    if isinstance(finding, Check):
        return f"{'ok    ' if finding.ok else 'FAILED'}  {finding.name}: {finding.detail}"
    if isinstance(finding, NotRun):
        return f"not run {finding.name}: {finding.why}"
    return (
        f"{'missed' if finding.reached is False else '      '}  {finding.metric}: {finding.ours:g} {finding.unit}, "
        f"{finding.peer_name} {finding.peer:g}, ratio {finding.ratio:.3f}"
    )


def _table(metrics: Sequence[Comparison]) -> list[str]:
    rows = [("metric", "ours", "peer", "unit", "ratio", "quartiles", "goal", "", "peer is")]
    for metric in metrics:
        rows.append(
            (
                metric.metric,
                f"{metric.ours:g}",
                f"{metric.peer:g}",
                metric.unit,
                f"{metric.ratio:.3f}",
                f"{metric.spread[0]:.3f} to {metric.spread[1]:.3f}",
                "" if metric.goal is None else f"{metric.goal:g}",
                {None: "", True: "reached", False: "missed"}[metric.reached],
                metric.peer_name,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
