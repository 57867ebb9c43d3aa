"""docs/BENCHMARKS.md: what it shows of results, and that nobody wrote into it by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import run
from benchmarks.harness import TRIED, modules
from benchmarks.report import NO_GPU_RESULTS, render

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

MACHINE = {
    "cpu": "Some CPU",
    "cores": 2,
    "memory": 24 << 30,
    "kernel": "Linux 6.1",
    "date": "2025-01-02",
    "dtruntime_torch": "0.1.0",
    "python": "3.11.7",
    "torch": "2.13.0",
    "compiler": "gcc 12",
    "cuda": "13.0",
    "simd": "avx512",
}


def metric(name: str, ratio: float, goal: float | None) -> dict[str, object]:
    return {
        "metric": name,
        "unit": "GB/s",
        "ours": 12.5,
        "peer": 10.0,
        "peer_name": "PyPI xxhash",
        "ratio": ratio,
        "spread": [1.1, 1.4],
        "goal": goal,
        "repetitions": 21,
    }


def host(*metrics: dict[str, object], quick: bool = False) -> dict[str, object]:
    return {
        "schema": 1,
        "kind": "host",
        "command": "make bench",
        "quick": quick,
        "machine": MACHINE,
        "file_systems": {"/dev/shm": "tmpfs"},
        "peers": {"xxhash": "4.1.0"},
        "benchmarks": {"bench_some": {"about": "Some against others.", "metrics": list(metrics)}},
    }


def gpu(ok: bool = True, kind: str = "gpu") -> dict[str, object]:
    return {
        "schema": 1,
        "kind": kind,
        "command": "python -m dtruntime_torch.gpucheck",
        "seconds": 200.0,
        "ok": ok,
        "device": {
            "kind": kind,
            "name": "Some GPU",
            "capability": "9.0",
            "memory": 80 << 30,
            "driver": "580.1",
            "cuda_of_torch": "13.0",
        },
        "machine": MACHINE,
        "checks": [{"name": "digest/all", "ok": ok, "detail": "3 of 4 differ"}],
        "not_run": [] if ok else [{"name": "ops/second device", "why": "there is one"}],
        "metrics": [metric("digest/1 GiB", 0.95, 0.9)],
    }


def row_of(page: str, name: str) -> list[str]:
    (row,) = [line for line in page.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_a_metric_is_shown_with_all_that_was_measured():
    assert row_of(render(host(metric("digest/x", 1.25, 1.0))), "digest/x") == [
        *("digest/x", "12.5", "10", "GB/s", "PyPI xxhash", "1.250", "1.100 to 1.400", "21", "1", "reached")
    ]


def test_a_missed_goal_is_shown_in_its_row_and_at_the_top():
    page = render(host(metric("good", 1.25, 1.0), metric("bad", 0.99, 1.0)))
    assert row_of(page, "bad")[-1] == "**missed**"
    assert "1 of 2 goals are reached; missed: `bad`." in page.partition("## The machine")[0]


def test_a_metric_without_goal_is_neither_reached_nor_missed():
    page = render(host(metric("free", 0.5, None)))
    assert row_of(page, "free")[-2:] == ["", ""] and "missed:" not in page and "reached" not in page


def test_a_benchmark_that_was_not_run_has_no_table():
    assert (
        render(host())
        .partition("## GPU")[0]
        .endswith("## bench_some\n\nSome against others.\n\nNot measured yet.\n\n")
    )


def test_a_quick_run_says_so():
    assert "its figures say nothing" in render(host(quick=True))
    assert "its figures say nothing" not in render(host())


def test_the_machine_is_told():
    page = render(host())
    for told in ("Some CPU, 2 cores, avx512", "24 GiB", "/dev/shm: tmpfs", "xxhash 4.1.0", "gcc 12"):
        assert told in page


def test_without_results_of_a_gpu_nothing_is_claimed():
    assert render(host()).endswith(f"## GPU\n\n{NO_GPU_RESULTS}")


def test_results_of_a_gpu_have_their_section():
    page = render(host(), [gpu()])
    assert "### Some GPU" in page and "1 of 1 checks hold" in page and NO_GPU_RESULTS not in page
    assert row_of(page, "digest/1 GiB")[-1] == "reached"


def test_a_check_that_failed_on_a_gpu_is_shown():
    page = render(host(), [gpu(ok=False)])
    assert (
        "0 of 1 checks hold.\n\n- failed: digest/all: 3 of 4 differ\n- not run: ops/second device: there is one\n"
        in page
    )


def test_what_is_no_gpu_is_refused_as_one():
    with pytest.raises(ValueError, match="stand-in"):
        render(host(), [gpu(kind="stand-in")])


def test_another_schema_is_refused():
    with pytest.raises(ValueError, match="schema 2"):
        render({**host(), "schema": 2})


def test_a_bar_in_a_name_does_not_end_the_cell():
    assert "| a\\|b |" in render(host(metric("a|b", 1.0, None)))


@pytest.fixture
def two_benchmarks(monkeypatch):
    """The modules of benchmarks for a run: one that works and one that fails after a line."""
    line = json.dumps(metric("fast", 2.0, 1.0))
    programs = {"good": f"print('''{line}''')", "bad": f"print('''{line}'''); raise SystemExit(3)"}
    real = subprocess.Popen

    def popen(command, **options):
        assert options["env"][TRIED]
        assert command[:2] == [sys.executable, "-m"] and command[3:] == ["--repetitions", "1"]
        return real([sys.executable, "-c", programs[command[2]]], **options)

    monkeypatch.setattr(run.subprocess, "Popen", popen)
    monkeypatch.setattr(run, "_about", lambda name: f"About {name}.")


def test_a_run_collects_what_each_benchmark_prints(two_benchmarks):
    found = run.collect(["good"], quick=True)
    assert found["benchmarks"] == {"good": {"about": "About good.", "metrics": [metric("fast", 2.0, 1.0)]}}
    assert row_of(render(found), "fast")[-1] == "reached"


def test_a_benchmark_that_fails_ends_the_run(two_benchmarks):
    with pytest.raises(SystemExit, match="bad ended with 3; nothing was written"):
        run.collect(["good", "bad"], quick=True)


def test_the_program_writes_results_and_page(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "collect", lambda names, quick, _: host(metric("fast", 2.0, 1.0), quick=quick))
    run.main(["--quick", "--into", str(tmp_path)])
    page = (tmp_path / "docs" / "BENCHMARKS.md").read_text()
    assert page == render(json.loads((tmp_path / "benchmarks" / "results" / "host.json").read_text()))
    (tmp_path / "benchmarks" / "results" / "gpu-some.json").write_text(json.dumps(gpu()))
    run.main(["--render", "--into", str(tmp_path)])
    assert "### Some GPU" in (tmp_path / "docs" / "BENCHMARKS.md").read_text()


def test_how_to_run_one_alone_is_told_once_for_all_tables():
    two = {name: {"about": "Some.", "metrics": []} for name in ("bench_some", "bench_more")}
    assert render({**host(), "benchmarks": two}).count("python -m benchmarks.") == 1


def test_one_benchmark_may_be_run_again_beside_the_results_of_the_others(monkeypatch, tmp_path):
    first, again = host(metric("fast", 2.0, 1.0)), host(metric("slow", 1.0, 1.0))
    again["benchmarks"] = {"bench_more": again["benchmarks"]["bench_some"]}
    asked = []
    monkeypatch.setattr(
        run, "collect", lambda names, quick, repetitions: asked.append((names, repetitions)) or again
    )
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    results = tmp_path / "benchmarks" / "results" / "host.json"
    results.write_text(json.dumps(first))
    for _ in range(2):
        run.main(["--only", "bench_more", "--repetitions", "5", "--into", str(tmp_path)])
    found = json.loads(results.read_text())
    assert asked == [(["benchmarks.bench_more"], 5)] * 2
    assert found["benchmarks"] == {**again["benchmarks"], **first["benchmarks"]}
    command = "python -m benchmarks.run --only bench_more --repetitions 5"
    assert found["command"] == f"make bench, then {command}"


def test_a_folder_lies_on_the_file_system_that_is_mounted_nearest():
    mounts = "a / ext4 rw 0 0\nb /data xfs rw 0 0\nc /data tmpfs rw 0 0\nd /data/x btrfs rw 0 0\ne /dat nfs rw 0 0\n"
    kinds = {place: run.file_system(place, mounts) for place in ("/etc", "/data/y", "/data/x/y", "/database")}
    assert kinds == {"/etc": "ext4", "/data/y": "tmpfs", "/data/x/y": "btrfs", "/database": "ext4"}


def test_the_page_is_what_the_results_give():
    assert (ROOT / "docs" / "BENCHMARKS.md").read_text(encoding="utf-8") == run.page(RESULTS)


def test_every_benchmark_is_on_the_page():
    found = json.loads((RESULTS / "host.json").read_text(encoding="utf-8"))
    assert [f"benchmarks.{name}" for name in found["benchmarks"]] == modules()
    assert not found["quick"], "a quick run was committed: make bench"


def test_make_bench_is_this_program():
    env = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    shown = subprocess.run(
        ["make", "--no-print-directory", "-n", "-o", ".venv/installed", "bench", "ARGS=--quick"],
        cwd=ROOT,
        env=env,
        check=True,
        capture_output=True,
        text=True,
    )
    assert shown.stdout.splitlines()[-1] == ".venv/bin/python -m benchmarks.run --quick"
