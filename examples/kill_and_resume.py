"""Kills a training job in the middle of its work, starts it again, and proves that nothing was lost.

    python examples/kill_and_resume.py            # or: make demo

It runs train_lm.py under torchrun, each time on the same text with the same global batch:
  (a) on 2 ranks, without interruption and without a checkpoint;
  (b) the same with a checkpoint every few steps; all its processes get SIGKILL at a random moment;
  (c) the same command once more: it goes on from the newest checkpoint, and finishes;
  (d) on 1 and on 4 ranks, from a copy of what (b) left behind, for a few steps;
  (e) from another copy with most of the model frozen, as in fine-tuning, without interruption;
  (f) the same with deltas, which write only what changed; all its processes get SIGKILL at a random moment;
  (g) the same command once more.
Then it compares, prints a table, and exits with 1 if anything that had to hold does not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from evidence import (
    Clock,
    Row,
    Run,
    Step,
    check_resume,
    compare_losses,
    compare_resized,
    compare_samples,
    compare_weights,
    compare_written,
    draw,
    list_all,
    ranks_in_words,
    tell_pace,
    tell_stall,
    verify_all,
)
from tqdm import tqdm  # type: ignore[import-untyped]

import dtruntime_torch as dt

TRAIN = Path(__file__).with_name("train_lm.py")
MARK = "KILL_AND_RESUME_JOB"
TIME_LIMIT = 150.0
TICK = 0.02


class Size(NamedTuple):
    """How long the runs are. No checkpoint falls on the end of an epoch: resuming is in the middle of one."""

    steps: int
    every: int
    samples: int
    extra_steps: int
    tuning_steps: int
    batch_size: int = 16


FULL = Size(steps=160, every=3, samples=984, extra_steps=8, tuning_steps=60)
SHORT = Size(steps=48, every=3, samples=304, extra_steps=4, tuning_steps=36)
SPARE_STEPS = 12  # that a job is killed before its end, at least, so that it does not end first
FROZEN = ("--freeze", "layers")


class PhaseFailed(Exception):
    """A job did not do what its phase needs; the message says where its output is."""


class Job:
    """One torchrun job, whose output goes to a file. Its processes are known by a mark in their environment."""

    def __init__(
        self, folder: Path, phase: str, ranks: int, checkpoints: Path, steps: int, size: Size, *flags: str
    ) -> None:
        self.phase, self.steps, self.ranks = phase, steps, ranks
        self.record = folder / f"record-{phase}"
        self.output = folder / f"output-{phase}.txt"
        self.mark = secrets.token_hex(16)
        launcher = f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node {ranks}".split()
        options = {
            "--checkpoints": checkpoints,
            "--corpus": folder / "corpus.bin",
            "--record": self.record,
            "--steps": steps,
            "--every": size.every,
            "--samples": size.samples,
            "--batch-size": size.batch_size,
        }
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [
                    *launcher,
                    str(TRAIN),
                    *(str(word) for option in options.items() for word in option),
                    *flags,
                ],
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", MARK: self.mark},
            )

    def watch(self, until: Callable[[int], bool], total: int) -> None:
        """Shows the job's progress until it ended, or `until` (steps recorded so far) says so."""
        began, done, ended = time.monotonic(), 0, False
        title = f"({self.phase[0]}) on {ranks_in_words(self.ranks)}"
        try:
            with tqdm(total=total, desc=title, unit="step", disable=None, leave=False) as bar:
                while not ended and not until(done):
                    if time.monotonic() - began > TIME_LIMIT:
                        raise PhaseFailed(f"{title} took over {TIME_LIMIT:.0f} s; see {self.output}")
                    ended = wait(self.process, TICK)
                    done = sum(1 for _ in recorded(self.record / "rank-0.jsonl", "loss"))
                    bar.update(done - bar.n)
        except BaseException:
            self.kill()
            raise
        print(f"{title}: {done} steps, {time.monotonic() - began:.1f} s with the start", flush=True)

    def finish(self, total: int) -> Run:
        """Waits for the end of the job and reads what it recorded."""
        self.watch(lambda done: False, total)
        if self.process.returncode:
            raise PhaseFailed(f"({self.phase}) ended with {self.process.returncode}; see {self.output}")
        return read_run(self.record, self.ranks)

    def kill(self) -> None:
        """Sends SIGKILL to the launcher, the ranks and the loader workers, wherever they are by now."""
        deadline = time.monotonic() + 10
        while pids := marked_processes(self.mark):
            if time.monotonic() > deadline:
                raise PhaseFailed(f"({self.phase}) processes {pids} outlive SIGKILL")
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            wait(self.process, TICK)
        self.process.wait()


def wait(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Waits at most so long for the end of `process`; returns whether it ended."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def marked_processes(mark: str) -> list[int]:
    """Returns the living processes that inherited this mark: also those in sessions of their own, and orphans."""
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"{MARK}={mark}".encode() in environment.read_bytes():
                found.append(int(environment.parent.name))
        except OSError:
            continue
    return found


def recorded(path: Path, having: str) -> Iterator[dict[str, Any]]:
    """Yields the whole lines of a rank's record that have this field; SIGKILL may have cut the last one off."""
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        if line.endswith(b"\n") and having in (values := json.loads(line)):
            yield values


def read_run(record: Path, ranks: int) -> Run:
    """Reads what a run recorded, up to the last step that all of its ranks recorded."""
    paths = [record / f"rank-{rank}.jsonl" for rank in range(ranks)]
    steps: dict[int, Step] = {}
    for lines in zip(*(recorded(path, "loss") for path in paths), strict=False):
        number = lines[0]["step"]
        follows = not steps or number - 1 == max(steps)
        if not follows or any(line["step"] != number for line in lines):
            raise PhaseFailed(f"{record} tells of step {number} out of turn, or on some ranks only")
        places = zip(*(line["samples"] for line in lines), strict=True)
        samples = tuple(sample for place in places for sample in place)
        steps[number] = Step(lines[0]["epoch"], samples, tuple(line["loss"] for line in lines))
    if not steps:
        raise PhaseFailed(f"{record} tells of no step")
    weights = tuple(line["weights"] for path in paths for line in recorded(path, "weights"))
    timed = list(recorded(paths[0], "called"))
    last = timed[-1]
    in_steps = timed[len(steps) - 1]["seconds"] - timed[0]["seconds"]
    return Run(steps, weights, Clock(last["called"], last["waited"], last["seconds"], in_steps))


def moment_to_kill(checkpoints: Path, last: int, full: bool, chance: random.Random) -> Callable[[int], bool]:
    """Returns the question whether it is time, for a moment drawn once the first such checkpoint is committed."""
    manager = dt.CheckpointManager(checkpoints)
    moment: float | None = None

    def is_time(done: int) -> bool:
        nonlocal moment
        if moment is None:
            newest = manager.latest()
            if newest is not None and newest.full == full:
                moment = chance.uniform(done, last)
        return moment is not None and done >= moment

    return is_time


def run_phases(folder: Path, size: Size, chance: random.Random) -> list[Row]:
    """Runs (a) to (d) in `folder` and compares them."""
    checkpoints = folder / "checkpoints"
    never = size._replace(every=size.steps + 1)
    a = Job(folder, "a", 2, folder / "no-checkpoints", size.steps, never).finish(size.steps)

    job = Job(folder, "b", 2, checkpoints, size.steps, size)
    b = kill(job, size.steps, moment_to_kill(checkpoints, size.steps - SPARE_STEPS, True, chance), chance)
    newest = list_all(checkpoints)[-1].step
    copies = {name: shutil.copytree(checkpoints, folder / f"checkpoints-{name}") for name in (1, 4, "e", "f")}

    c = Job(folder, "c", 2, checkpoints, size.steps, size).finish(size.steps - newest)
    d = {
        ranks: Job(folder, f"d{ranks}", ranks, copy, newest + size.extra_steps, size).finish(size.extra_steps)
        for ranks, copy in ((1, copies[1]), (4, copies[4]))
    }
    tuned = tune(folder, copies["e"], copies["f"], newest, size, chance)
    resumed = min(c.steps) - 1
    history = {**{number: step for number, step in b.steps.items() if number <= resumed}, **c.steps}
    return [
        compare_weights(a, c),
        compare_samples(a.steps, history, size.samples),
        compare_losses(a.steps, history),
        *(compare_resized(a.steps, run.steps, newest, ranks) for ranks, run in d.items()),
        check_resume(newest, b, resumed),
        *tuned,
        verify_all(checkpoints, copies["f"]),
        tell_stall(b, c),
        tell_pace(a, b, c),
        Row(None, "loss of (a)", draw(a.steps, None)),
        Row(None, "loss of (b) | (c)", draw(history, resumed)),
    ]


def kill(job: Job, total: int, is_time: Callable[[int], bool], chance: random.Random) -> Run:
    """Kills a job a little after it is time; returns what it had recorded by then."""
    job.watch(is_time, total)
    if wait(job.process, chance.uniform(0, 0.1)):
        raise PhaseFailed(f"({job.phase}) ended before it could be killed; see {job.output}")
    job.kill()
    return read_run(job.record, job.ranks)


def tune(
    folder: Path, whole: Path, deltas: Path, newest: int, size: Size, chance: random.Random
) -> list[Row]:
    """Phases (e) to (g): most of the model is frozen, so that a delta has little to write."""
    steps = newest + size.tuning_steps
    e = Job(folder, "e", 2, whole, steps, size, *FROZEN).finish(size.tuning_steps)
    is_time = moment_to_kill(deltas, size.tuning_steps - SPARE_STEPS, False, chance)
    kill(Job(folder, "f", 2, deltas, steps, size, *FROZEN, "--delta"), size.tuning_steps, is_time, chance)
    left = steps - list_all(deltas)[-1].step
    g = Job(folder, "g", 2, deltas, steps, size, *FROZEN, "--delta").finish(left)
    return [compare_weights(e, g, "(g)", "(e)"), compare_written(list_all(deltas))]


def main() -> int:
    """Runs all phases and prints the table; returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Kill a training job, resume it, prove that nothing was lost."
    )
    parser.add_argument("--short", action="store_true", help="fewer steps")
    parser.add_argument("--seed", type=int, help="draws the moment to kill at [random]")
    args = parser.parse_args()
    seed = secrets.randbelow(10**6) if args.seed is None else args.seed
    folder = Path(tempfile.mkdtemp(prefix="kill-and-resume-"))
    began = time.monotonic()
    print(f"Working in {folder}; --seed {seed} draws the same moment again", flush=True)
    try:
        rows = run_phases(folder, SHORT if args.short else FULL, random.Random(seed))
    except PhaseFailed as error:
        rows = [Row(False, "the run", str(error))]
    width = max(len(row.what) for row in rows)
    for row in rows:
        mark = {True: "ok", False: "FAILED", None: ""}[row.holds]
        print(f"{mark:>6}  {row.what:<{width}}  {row.found}")
    seconds = time.monotonic() - began
    if any(row.holds is False for row in rows):
        print(f"Failed after {seconds:.0f} s; what the jobs wrote is in {folder}")
        return 1
    print(f"Nothing was lost and nothing repeated. It took {seconds:.0f} s.")
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
