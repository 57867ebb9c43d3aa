"""What the benchmarks of saving measure with: processes that train and save, and what they take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from benchmarks import bench_many_tensors, bench_save, bench_training, processes, ranks, savers, turns
from benchmarks.harness import TRIED
from benchmarks.saving_rank import SavingRank, Setting
from benchmarks.way import AT_ONCE, Pending, Way
from benchmarks.workloads import LanguageModel, Matrices, SmallTensors, Training

ROOT = Path(__file__).resolve().parents[1]
MIB = 1 << 20


class Spends(Way):
    """Takes CPU time and memory, and keeps both."""

    def start(self, step: int) -> Pending:
        self.kept = torch.full((16 * MIB,), float(step))
        for _ in range(10):
            self.kept.neg_()
        return AT_ONCE


class Fails(Way):
    def start(self, step: int) -> Pending:
        raise OSError("no such luck")


class NeverEnds(Way):
    def start(self, step: int) -> Pending:
        os.read(os.pipe()[0], 1)
        return AT_ONCE


@dataclass
class Counts:
    """Ranks that count their runs instead of making them."""

    setting: Setting
    runs: int = 0

    def do(self, what: str, *arguments: int, watched: bool = False) -> dict[str, float]:
        self.runs += what != "tidy"
        return {"call": self.runs, "stall": 10 * self.runs, "memory": 100 * self.runs}

    def end(self) -> None:
        pass


@pytest.fixture
def counting(monkeypatch):
    monkeypatch.setattr(turns, "Ranks", Counts)
    monkeypatch.setattr(turns, "_alive", {})


@pytest.fixture
def make_ranks(tmp_path) -> Iterator[object]:
    made = []

    def make(way: type[Way], number: int = 1) -> ranks.Ranks:
        made.append(ranks.Ranks(Setting(way, SmallTensors(4, 16), number, str(tmp_path))))
        return made[-1]

    yield make
    for one in made:
        one.end()


def setting(way: type[Way]) -> Setting:
    return Setting(way, SmallTensors(4, 16), 1, None)


def test_figures_of_one_order_share_its_runs(counting):
    pair = turns.Turns(setting(savers.Ours), setting(savers.DCP))
    call, stall = (pair.figure("ours", name, "window") for name in ("call", "stall"))
    assert [call(), call(), stall(), stall(), stall()] == [1, 2, 10, 20, 30]


def test_memory_is_looked_at_in_runs_that_are_not_timed(counting):
    pair = turns.Turns(setting(savers.Ours), setting(savers.DCP))
    assert pair.figure("ours", "call", "alone")() == 1
    assert pair.figure("ours", "memory", "alone")() == 200


def test_what_a_peer_is_granted_is_added_to_its_figure(counting):
    pair = turns.Turns(setting(savers.Ours), setting(savers.DCP))
    assert pair.figure("peer", "call", "window", plus=0.5)() == 1.5


def test_only_the_pair_that_is_measured_has_processes(counting):
    first = turns.Turns(setting(savers.Ours), setting(savers.DCP))
    second = turns.Turns(setting(savers.Ours), setting(savers.TorchSave))
    for pair in (first, second):
        pair.figure("ours", "call", "alone")()
        pair.figure("peer", "call", "alone")()
    assert {one.way for one in turns._alive} == {savers.Ours, savers.TorchSave}


def test_a_stall_is_what_the_steps_beside_a_save_took_longer(monkeypatch, tmp_path):
    now = 0.0

    def spend(seconds: float) -> None:
        nonlocal now
        now += seconds

    class SlowsTwoSteps(Way):
        left = 0

        def start(self, step: int) -> Pending:
            spend(0.5)
            self.left = 3
            return Pending(lambda: not self.left, lambda: spend(100))

        def guard(self):
            if self.left:
                self.left -= 1
                spend(0.25 if self.left else 0)
            return super().guard()

    class Optimizer:
        def step(self) -> None:
            spend(2)

        def zero_grad(self, set_to_none: bool) -> None:
            pass

    monkeypatch.setattr("benchmarks.saving_rank.time.perf_counter", lambda: now)
    monkeypatch.setattr("benchmarks.saving_rank.dist.barrier", lambda: None)
    workload = lambda rank, ranks: Training({}, lambda: spend(1), Optimizer())  # noqa: E731
    rank = SavingRank(Setting(SlowsTwoSteps, workload, 1, None), 0, tmp_path)
    rank.open()
    assert rank.window() == {"call": 0.5, "stall": 1.0}


@pytest.mark.slow
def test_cpu_time_and_memory_are_those_of_all_ranks(make_ranks):
    one, two = (make_ranks(Spends, number).do("alone", watched=True) for number in (1, 2))
    assert 0 < one["cpu"] < two["cpu"]
    assert 64 * MIB <= one["memory"] < 128 * MIB <= two["memory"] < 192 * MIB


def test_the_processes_of_a_session_are_found_and_those_of_others_not():
    program = "import os, sys; os.setsid(); os.fork(); print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as leader:
        leader.stdout.readline()
        leader.stdout.readline()
        found = processes.members([leader.pid])
        leader.stdin.close()
    assert len(found) == 2 and leader.pid in found and os.getpid() not in found


@pytest.mark.slow
def test_a_rank_that_fails_says_why(make_ranks):
    with pytest.raises(RuntimeError, match="OSError: no such luck"):
        make_ranks(Fails).do("alone")


@pytest.mark.slow
def test_a_rank_that_does_not_answer_is_given_up_and_ended(make_ranks, monkeypatch, tmp_path):
    stuck = make_ranks(NeverEnds)
    monkeypatch.setattr(ranks, "PATIENCE", 0.1)
    with pytest.raises(RuntimeError, match=r"NeverEnds.* did not answer within 0.1 s"):
        stuck.do("alone")
    pids = stuck._all()
    stuck.end()
    assert pids and not any(Path(f"/proc/{pid}").exists() for pid in pids) and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_benchmark_that_is_terminated_leaves_neither_processes_nor_files(tmp_path):
    only = "save_async/2 ranks/disk"
    command = [sys.executable, "-m", "benchmarks.bench_save", "--repetitions", "1", "--only", only]
    environment = {**os.environ, TRIED: "1", "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE) as run:
        first = json.loads(run.stdout.readline())
        run.terminate()
        # Ends with the last that could write there.
        run.stdout.read()
    mark = f"TMPDIR={tmp_path}".encode()
    left = [pid for pid in os.listdir("/proc") if pid.isdigit() and mark in environment_of(pid)]
    assert first["metric"].startswith(only) and run.returncode
    assert left == [] and list(tmp_path.glob("bench_save-*")) == []


def environment_of(pid: str) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


@pytest.mark.parametrize("workload", [Matrices(32 * MIB), LanguageModel(64, 1)], ids=["matrices", "model"])
def test_a_step_changes_what_is_saved(workload):
    training = workload(0, 2)
    before = {name: tensor.clone() for name, tensor in training.state.items()}
    training.step()
    assert len(before) > 2
    assert [name for name, tensor in training.state.items() if torch.equal(tensor, before[name])] == []


def test_the_ranks_hold_all_bytes_together():
    shares = [Matrices(64 * MIB)(rank, 2).state for rank in range(2)]
    assert sum(tensor.nbytes for share in shares for tensor in share.values()) == 64 * MIB
    assert not shares[0].keys() & shares[1].keys()


def test_a_peer_that_is_not_installed_is_left_out(monkeypatch):
    def names() -> str:
        modules = (bench_save, bench_many_tensors, bench_training)
        return " ".join(case.metric for module in modules for case in module.cases())

    monkeypatch.setattr(savers, "_find_torch_checkpointing", lambda: True)
    assert names().count("torch_checkpointing") > 2
    monkeypatch.setattr(savers, "_find_torch_checkpointing", lambda: False)
    assert "torch_checkpointing" not in names() and "dcp.async_save" in names()


@pytest.mark.parametrize("files", [10, 100_000])
def test_peers_that_share_memory_get_no_more_tensors_than_files_may_be_open(monkeypatch, files):
    monkeypatch.setattr(bench_many_tensors.resource, "getrlimit", lambda _: (files, files * 4))
    assert bench_many_tensors.tensors_for(savers.DCPAsyncReused) == min(files, bench_many_tensors.TENSORS)
    assert bench_many_tensors.tensors_for(savers.DCPAsync) == bench_many_tensors.TENSORS
