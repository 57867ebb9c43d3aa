"""What kill_and_resume.py holds against its runs: each function gives a line of its table."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import dtruntime_torch as dt


class Step(NamedTuple):
    """One step of a run, over all its ranks: the samples in the global order, the loss of each rank."""

    epoch: int
    samples: tuple[int, ...]
    losses: tuple[float, ...]


class Clock(NamedTuple):
    """Seconds of rank 0: in calls that save, in steps that waited for a save, of the loop, and from its first step on."""

    called: float
    waited: float
    loop: float
    steps: float


class Run(NamedTuple):
    """What a run recorded: steps by number, digest of each rank's final weights, and how long it took."""

    steps: dict[int, Step]
    weights: tuple[str, ...]
    clock: Clock


class Row(NamedTuple):
    """A line of the table; `holds` is None where it only tells."""

    holds: bool | None
    what: str
    found: str


def ranks_in_words(ranks: int) -> str:
    """Says how many ranks."""
    return "1 rank" if ranks == 1 else f"{ranks} ranks"


def compare_written(checkpoints: Sequence[dt.CheckpointInfo]) -> Row:
    """What the deltas wrote, beside what a full save would have."""
    shares = [info.written / info.nbytes for info in checkpoints if not info.full]
    found = f"{min(shares):.0%} to {max(shares):.0%} of a full save" if shares else "there is none"
    return Row(bool(shares) and max(shares) < 0.5, f"bytes that {len(shares)} deltas wrote", found)


def compare_weights(wanted: Run, found: Run, of: str = "(c)", those: str = "(a)") -> Row:
    """The final weights: on every rank of both runs the same bits."""
    digests = sorted({*wanted.weights, *found.weights})
    holds = len(wanted.weights) == len(found.weights) == 2 and len(digests) == 1
    what = f"final weights of {of}, bit for bit those of {those}"
    return Row(holds, what, ", ".join(digest[:16] for digest in digests))


def compare_samples(a: dict[int, Step], history: dict[int, Step], n: int) -> Row:
    """The samples of (b) up to the checkpoint and of (c): in (a)'s order, and each once in its epoch."""
    epochs: dict[int, list[int]] = {}
    for step in history.values():
        epochs.setdefault(step.epoch, []).extend(step.samples)
    *whole, last = epochs.values()
    once = all(sorted(epoch) == list(range(n)) for epoch in whole) and len({*last}) == len(last)
    differs = first_difference(a, history, "epoch", "samples")
    found = f"{sum(map(len, epochs.values())):,} in {len(history)} steps, {len(epochs)} epochs of {n:,}"
    return Row(once and not differs, "samples of (b)+(c): each once, in the order of (a)", differs or found)


def compare_losses(a: dict[int, Step], history: dict[int, Step]) -> Row:
    """The loss of each step on each rank, dropout included."""
    differs = first_difference(a, history, "losses")
    return Row(
        not differs, "losses of (b)+(c), bit for bit those of (a)", differs or f"{len(a)} steps on 2 ranks"
    )


def compare_resized(a: dict[int, Step], d: dict[int, Step], newest: int, ranks: int) -> Row:
    """The samples of a few steps on another number of ranks."""
    wanted = {number: step for number, step in a.items() if newest < number <= max(d)}
    differs = first_difference(wanted, d, "epoch", "samples")
    found = f"{sum(len(step.samples) for step in d.values()):,} in steps {min(d)} to {max(d)}"
    what = f"samples of (d) on {ranks_in_words(ranks)}: in the order of (a)"
    return Row(not differs, what, differs or found)


def first_difference(wanted: dict[int, Step], found: dict[int, Step], *fields: str) -> str:
    """Says at which step two runs begin to differ in these fields; nothing if they do not."""
    for number in sorted({*wanted, *found}):
        steps = wanted.get(number), found.get(number)
        if None in steps or any(len({getattr(step, field) for step in steps}) > 1 for field in fields):
            return f"first differs at step {number}"
    return ""


def check_resume(newest: int, b: Run, resumed: int) -> Row:
    """(c) went on from the newest checkpoint that the kill left behind."""
    killed = max(b.steps)
    found = f"killed behind step {killed}, went on behind step {resumed}: {killed - resumed} steps done again"
    return Row(resumed == newest, "resumed from the newest checkpoint", found)


def list_all(checkpoints: Path) -> list[dt.CheckpointInfo]:
    """Describes all checkpoints of a folder, oldest first."""
    with dt.CheckpointManager(checkpoints) as manager:
        return manager.list()


def verify_all(*folders: Path) -> Row:
    """Every byte of every checkpoint, against its digests."""
    reports = []
    for folder in folders:
        with dt.CheckpointManager(folder) as manager:
            reports += [manager.verify(info.step) for info in manager.list()]
    damage = "; ".join(str(damage) for report in reports for damage in report.damage)
    found = f"{sum(report.chunks for report in reports):,} in {len(reports)} checkpoints"
    return Row(bool(reports) and all(report.ok for report in reports), "digests verified", damage or found)


def tell_stall(b: Run, c: Run) -> Row:
    """How long the loop stood still for saving."""
    called, waited, loop, _ = (sum(seconds) for seconds in zip(b.clock, c.clock, strict=True))
    found = f"{called + waited:.2f} of {loop:.1f} s, {(called + waited) / loop:.1%}"
    parts = f"{called:.2f} s in calls, {waited:.2f} s in steps that waited"
    return Row(None, "the loop of (b)+(c) stalled by saving", f"{found}: {parts}")


def tell_pace(a: Run, b: Run, c: Run) -> Row:
    """What saving cost a step altogether, also by what it does in the background, on the same cores."""
    saving, without = milliseconds(b, c), milliseconds(a)
    found = f"{saving:.0f} ms, without saves {without:.0f} ms: {saving / without - 1:+.1%}"
    return Row(None, "a step of (b)+(c) beside one of (a)", found)


def milliseconds(*runs: Run) -> float:
    """How long a step took on average, but for the first of each run, in which everything is made."""
    return 1e3 * sum(run.clock.steps for run in runs) / max(1, sum(len(run.steps) - 1 for run in runs))


def draw(steps: dict[int, Step], resumed: int | None, columns: int = 40) -> str:
    """Draws the loss of rank 0 between its first and its last value, with a bar where the run was resumed."""
    losses = [step.losses[0] for step in steps.values()]
    edges = [len(losses) * column // columns for column in range(columns + 1)]
    means = [sum(losses[i:j]) / (j - i) for i, j in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    line = ["▁▂▃▄▅▆▇█"[int(7.99 * (mean - low) / (high - low or 1))] for mean in means]
    if resumed is not None:
        line.insert(resumed * columns // len(losses), "|")
    return f"{losses[0]:.2f} {''.join(line)} {losses[-1]:.2f}"
