"""gpucheck on the CPU: every check and measurement runs, and no report of this is a GPU's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dtruntime_torch.gpucheck import digests, gather, run
from dtruntime_torch.gpucheck.bandwidth import measure_digest, measure_staging
from dtruntime_torch.gpucheck.deltas import measure_deltas
from dtruntime_torch.gpucheck.digests import check_digests
from dtruntime_torch.gpucheck.findings import Check
from dtruntime_torch.gpucheck.gather import measure_gather
from dtruntime_torch.gpucheck.overlap import check_overlap
from dtruntime_torch.gpucheck.sizes import FULL, GIB, KIB, MIB
from dtruntime_torch.gpucheck.streams import check_streams
from tests.gpucheck.host_device import SPEED, TICK, TINY, HostBench

ROOT = Path(__file__).resolve().parents[2]


def metrics_of(section, bench, sizes=TINY):
    return {found.metric: found for found in section(bench, sizes) if not isinstance(found, Check)}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """A run of everything on the stand-in, in a folder of its own."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        status = run.check(HostBench(), TINY, quick=False, output=None)
    return status, folder


def test_a_sound_device_passes_and_ends_with_0(whole_run):
    assert whole_run[0] == 0


def test_the_report_is_named_after_what_it_ran_on_and_is_no_gpus(whole_run):
    _, folder = whole_run
    (written,) = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    assert written == Path("benchmarks/results/stand-in-cpu-no-gpu.json")


def test_the_report_has_every_check_and_metric(whole_run):
    (written,) = whole_run[1].rglob("*.json")
    report = json.loads(written.read_text())
    assert (report["schema"], report["kind"], report["ok"]) == (1, "stand-in", True)
    assert report["command"] == "python -m dtruntime_torch.gpucheck"
    assert {"cpu", "kernel", "torch", "python", "compiler", "cuda", "date"} <= set(report["machine"])
    names = [check["name"].partition("/")[0] for check in report["checks"]]
    assert set(names) == {
        *("digest", "copy", "side stream", "other device", "graph", "changes", "staging", "tear", "overlap"),
        *("delta staging", "door"),
    }
    assert [left_out["name"] for left_out in report["not_run"]] == [
        "door/AdamW capturable",
        "door/the next save after a step was captured",
    ]
    assert {metric["metric"].partition("/")[0] for metric in report["metrics"]} == {
        *("digest", "digest op", "copy with digest", "staging", "step", "door"),
        *("gather to the device and one copy", "gather to pinned memory"),
        *("delta staging, sources held", "delta staging, until digested"),
    }
    goals = {metric["metric"]: metric["goal"] for metric in report["metrics"] if metric["goal"] is not None}
    assert set(goals.values()) == {0.9} and len(goals) == len(TINY.measured_bytes)


def test_the_checks_reach_every_length_alignment_chunk_size_and_dtype():
    found = {check.name: check.detail for check in check_digests(HostBench(), TINY)}
    assert found["digest/lengths 0 to 300, 16 alignments"] == f"{16 * 300} chunks"
    assert {f"digest/chunks of {chunk}" for chunk in TINY.chunk_sizes} <= set(found)
    assert {"digest/bool", "digest/float8_e5m2", "digest/complex128"} <= set(found)
    assert "digest/vectors" in found


def test_a_full_run_reaches_what_is_promised():
    assert FULL.longest >= 5000 and FULL.large_bytes >= GIB and min(FULL.measured_bytes) >= GIB
    assert (min(FULL.chunk_sizes), max(FULL.chunk_sizes)) == (64 * KIB, 16 * MIB)
    assert FULL.chunked_bytes > 2 * max(FULL.chunk_sizes)


def test_a_section_that_breaks_is_a_failed_check_and_the_others_still_run(monkeypatch, tmp_path, capsys):
    def breaks(bench, sizes):
        yield Check("before it", True, "")
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(run, "SECTIONS", (breaks, check_overlap))
    assert run.check(HostBench(), TINY, quick=False, output=tmp_path / "report.json") == 1
    out = capsys.readouterr().out
    assert "FAILED  breaks runs to its end: RuntimeError: CUDA error: an illegal memory access" in out
    assert "ok      before it" in out and "ok      overlap/" in out and "4 of 5 checks hold" in out


def test_digests_are_measured_against_reads_of_the_same_bytes():
    found = metrics_of(measure_digest, HostBench())["digest/256 KiB in chunks of 1 MiB"]
    assert (found.ours, found.peer) == (SPEED["digest"], SPEED["read"])
    assert (found.ratio, found.reached) == (0.95, True)


def test_a_goal_that_is_missed_is_shown_and_is_no_failure(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(SPEED, "digest", 89.0)
    monkeypatch.setattr(run, "SECTIONS", (measure_digest,))
    assert run.check(HostBench(), TINY, quick=False, output=tmp_path / "report.json") == 0
    out = capsys.readouterr().out
    assert "missed  digest/256 KiB in chunks of 1 MiB: 89 GB/s" in out and "2 of 2 goals missed" in out


def test_what_cannot_be_run_here_is_said_with_its_reason_and_is_no_failure(monkeypatch, tmp_path, capsys):
    bench = HostBench()
    bench.other_device = lambda: None
    monkeypatch.setattr(digests, "VECTORS", tmp_path / "tests" / "vectors" / "digest.json")
    monkeypatch.setattr(run, "SECTIONS", (digests.check_digests, check_streams))
    assert run.check(bench, TINY, quick=False, output=tmp_path / "report.json") == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["not_run"] == [
        {
            "name": "digest/vectors",
            "why": f"{digests.VECTORS} is not there: it comes with the sources, not with a wheel",
        },
        {"name": "other device", "why": "there is one device only"},
    ]
    assert not any(check["name"].startswith("digest/vector") for check in report["checks"])
    # As soon as it is known, and again at the end.
    assert capsys.readouterr().out.count("not run other device: there is one device only\n") == 2


def test_what_has_no_room_on_the_device_is_left_out():
    bench = HostBench()
    bench.free_bytes = lambda: 3 * TINY.measured_bytes[0]
    assert not any(name.startswith("digest/1 MiB") for name in metrics_of(measure_digest, bench))


def test_staging_is_measured_by_the_clock_of_the_host():
    (found,) = metrics_of(measure_staging, HostBench()).values()
    # One tick of the clock for each.
    assert found.ours == found.peer == pytest.approx(TINY.copied_bytes / TICK / 1e9, rel=1e-3)


def test_each_tensor_whose_staging_is_measured_is_a_copy_of_its_own():
    bench, copied = HostBench(), []
    copy = bench.copy
    bench.copy = lambda target, source: copied.append((bench.stream(), source.nbytes)) or copy(target, source)
    list(measure_staging(bench, TINY))
    by_stager = [nbytes for stream, nbytes in copied if stream == 9]
    assert by_stager == [TINY.copied_bytes // 64] * 64 * (1 + TINY.repetitions)


def test_gathering_is_measured_against_a_copy_for_each_piece():
    staged, direct = metrics_of(measure_gather, HostBench()).values()
    assert staged.peer == direct.peer == SPEED["copy"]
    assert direct.ours == SPEED["gather"]
    assert staged.ours == pytest.approx(1 / (1 / SPEED["gather"] + 1 / SPEED["copy"]), rel=1e-3)


@pytest.mark.parametrize(("fraction", "what"), [(0.01, "1%"), (0.1, "10%"), (0.5, "50%")])
def test_a_delta_staging_is_measured_against_plain_copies_of_all(fraction, what):
    found = metrics_of(measure_deltas, HostBench())[f"delta staging, sources held/{what} of 256 KiB changed"]
    # All is digested, and what changed is gathered.
    seconds = 1 / SPEED["digest"] + fraction / SPEED["gather"]
    assert found.peer == pytest.approx(1 / (1 / SPEED["digest"] + 1 / SPEED["copy"]), rel=1e-2)
    assert found.ours == pytest.approx(1 / seconds, rel=1e-2)


def test_all_ways_to_gather_bring_the_same_bytes(monkeypatch):
    bench, images = HostBench(), []
    arena = bench.arena(TINY.pieces * gather.PIECE_BYTES)
    image = torch.frombuffer(arena, dtype=torch.uint8)
    bench.arena = lambda nbytes: arena

    def keeps_what_each_brings(ways, take, repetitions):
        for work in ways.values():
            image.zero_()
            work()
            images.append(image.clone())
        return {name: [1.0] for name in ways}

    monkeypatch.setattr(gather, "in_turns", keeps_what_each_brings)
    list(measure_gather(bench, TINY))
    assert len(images) == 3 and images[2].any() and all(torch.equal(each, images[2]) for each in images)


def test_copies_are_compared_with_computation_of_their_length():
    found = next(iter(check_overlap(HostBench(), replace(TINY, copied_bytes=5 << 20))))
    assert found.ok and found.detail.startswith(
        "1.00 of it hides: copy 0.105 ms, compute 0.105 ms, both 0.105 ms"
    )
