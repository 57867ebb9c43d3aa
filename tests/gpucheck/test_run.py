"""gpucheck on the CPU: every check and measurement runs, every fault that is planted is found, and no report of this is a GPU's."""

from __future__ import annotations

import ctypes
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dtruntime_torch import _C
from dtruntime_torch.checkpoint.stager import Stager
from dtruntime_torch.gpucheck import run
from dtruntime_torch.gpucheck.bandwidth import measure_digest, measure_staging
from dtruntime_torch.gpucheck.changes import check_changes
from dtruntime_torch.gpucheck.digests import check_digests
from dtruntime_torch.gpucheck.findings import Check
from dtruntime_torch.gpucheck.overlap import check_overlap
from dtruntime_torch.gpucheck.sizes import FULL, GIB, KIB, MIB
from dtruntime_torch.gpucheck.staging import check_staging
from dtruntime_torch.gpucheck.training import measure_training
from tests.gpucheck.host_device import SPEED, TINY, HostDevice

ROOT = Path(__file__).resolve().parents[2]


def metrics_of(section, device, sizes=TINY):
    return {found.metric: found for found in section(device, sizes) if not isinstance(found, Check)}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """A run of everything on the stand-in, in a folder of its own."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        status = run.check(HostDevice(), TINY, quick=False, output=None)
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
    assert set(names) == {"digest", "copy", "changes", "staging", "overlap"}
    assert {metric["metric"].partition("/")[0] for metric in report["metrics"]} == {
        *("digest", "digest op", "copy with digest", "staging", "step")
    }
    goals = {metric["metric"]: metric["goal"] for metric in report["metrics"] if metric["goal"] is not None}
    assert set(goals.values()) == {0.9} and len(goals) == len(TINY.measured_bytes)


def test_the_checks_reach_every_length_alignment_chunk_size_and_dtype():
    found = {check.name: check.detail for check in check_digests(HostDevice(), TINY)}
    assert found["digest/lengths 0 to 300, 16 alignments"] == f"{16 * 300} chunks"
    assert {f"digest/chunks of {chunk}" for chunk in TINY.chunk_sizes} <= set(found)
    assert {"digest/bool", "digest/float8_e5m2", "digest/complex128"} <= set(found)
    assert "digest/vectors" in found


def test_a_full_run_reaches_what_is_promised():
    assert FULL.longest >= 5000 and FULL.large_bytes >= GIB and min(FULL.measured_bytes) >= GIB
    assert (min(FULL.chunk_sizes), max(FULL.chunk_sizes)) == (64 * KIB, 16 * MIB)
    assert FULL.chunked_bytes > 2 * max(FULL.chunk_sizes)


class OneBit:
    """Flips a bit of some digests."""

    def __init__(self, when) -> None:
        self._when = when

    def __call__(self, data: bytes) -> bytes:
        digest = bytearray(_C.digest(data, len(data)))
        digest[15] ^= self._when(len(data))
        return bytes(digest)


def wrong_digest_of_one_length(device):
    device.native.digest_of = OneBit(lambda length: length == 241)


def a_read_rounded_down_to_16(device):
    read = device.native.read_bytes
    device.native.read_bytes = lambda address, length: read(address & ~15, length)


def wrong_digest_by_the_op(device):
    digest = device.digest
    device.digest = lambda tensor, chunk: digest(tensor, chunk) ^ (tensor.dtype == torch.bfloat16)


def a_chunk_too_few(device):
    digest = device.digest
    device.digest = lambda tensor, chunk: digest(tensor, chunk)[:-1]


def a_copy_that_writes_past_its_end(device):
    write = device.native.write_bytes
    device.native.write_bytes = lambda address, data: write(address, data + b"\0")


def an_op_that_does_not_copy(device):
    device.copy_digest_ = lambda target, source, chunk: device.digest(source, chunk)


def a_comparison_of_one_half(device):
    device.native.differ = lambda new, old: new[:8] != old[:8]


def a_change_that_is_not_seen(device):
    device.native.differ = lambda new, old: False


def a_gather_that_writes_zeros(device):
    device.native.write_bytes = lambda address, data: None


def a_table_that_is_not_brought_up_to_date(device):
    find = device.native.cuda_find_changed

    def keeps_the_table(digests, known, count, *rest):
        before = ctypes.string_at(known, 16 * count)
        find(digests, known, count, *rest)
        ctypes.memmove(known, before, len(before))

    device.native.cuda_find_changed = keeps_the_table


class Late:
    """A staging that reads its sources only when somebody waits for it."""

    def __init__(self, stager, pairs) -> None:
        self._stager, self._pairs = stager, pairs

    def before_overwrite(self, indices=None, timeout=None) -> None:
        pass

    def wait(self, timeout=None) -> bytes:
        return self._stager.start(self._pairs).wait(timeout)


def a_torn_staging(device):
    class LateStager:
        def __init__(self, arena, chunk_bytes) -> None:
            self._stager = Stager(arena, chunk_bytes)

        def start(self, pairs):
            return Late(self._stager, pairs)

    device.stager = LateStager


def a_staging_with_wrong_digests(device):
    class Lying(Stager):
        def start(self, pairs):
            staging = super().start(pairs)
            wait = staging.wait
            staging.wait = lambda timeout=None: wait(timeout)[:-16] + bytes(16)
            return staging

    device.stager = Lying


def streams_that_wait_for_each_other(device):
    device.overlaps = False


def a_copy_that_waits_its_turn_on_the_side(device):
    """Three times as slow there, while the other stream is not held up: only who waits for the copy notices."""
    copy = device.copy

    def slow(target, source):
        for _ in range(1 if device.stream() == 7 else 3):
            copy(target, source)

    device.copy = slow


FAULTS = [
    (wrong_digest_of_one_length, check_digests, "digest/lengths"),
    (a_read_rounded_down_to_16, check_digests, "digest/lengths"),
    (wrong_digest_by_the_op, check_digests, "digest/bfloat16"),
    (a_chunk_too_few, check_digests, "digest/chunks"),
    (a_copy_that_writes_past_its_end, check_digests, "copy/bytes at 256 alignments"),
    (an_op_that_does_not_copy, check_digests, "copy/bytes by the op"),
    (a_comparison_of_one_half, check_changes, "changes/found, some"),
    (a_change_that_is_not_seen, check_changes, "changes/found, one"),
    (a_table_that_is_not_brought_up_to_date, check_changes, "changes/table"),
    (a_gather_that_writes_zeros, check_changes, "changes/in their places"),
    (a_gather_that_writes_zeros, check_changes, "changes/gathered"),
    (a_torn_staging, check_staging, "staging/"),
    (a_staging_with_wrong_digests, check_staging, "staging/"),
    (streams_that_wait_for_each_other, check_overlap, "overlap/"),
    (a_copy_that_waits_its_turn_on_the_side, check_overlap, "overlap/"),
]


@pytest.mark.parametrize(("plant", "section", "name"), FAULTS)
def test_a_planted_fault_is_found_and_ends_with_1(plant, section, name, monkeypatch, tmp_path, capsys):
    device = HostDevice()
    plant(device)
    monkeypatch.setattr(run, "SECTIONS", (section,))
    assert run.check(device, TINY, quick=False, output=tmp_path / "report.json") == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["ok"] is False
    failed = [check["name"] for check in report["checks"] if not check["ok"]]
    assert any(found.startswith(name) for found in failed), failed
    assert f"FAILED  {name}" in capsys.readouterr().out


def test_a_section_that_breaks_is_a_failed_check_and_the_others_still_run(monkeypatch, tmp_path, capsys):
    def breaks(device, sizes):
        yield Check("before it", True, "")
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(run, "SECTIONS", (breaks, check_overlap))
    assert run.check(HostDevice(), TINY, quick=False, output=tmp_path / "report.json") == 1
    out = capsys.readouterr().out
    assert "FAILED  breaks runs to its end: RuntimeError: CUDA error: an illegal memory access" in out
    assert "ok      before it" in out and "ok      overlap/" in out and "2 of 3 checks hold" in out


def test_digests_are_measured_against_reads_of_the_same_bytes():
    found = metrics_of(measure_digest, HostDevice())["digest/256 KiB in chunks of 1 MiB"]
    assert (found.ours, found.peer) == (SPEED["digest"], SPEED["read"])
    assert (found.ratio, found.reached) == (0.95, True)


def test_a_goal_that_is_missed_is_shown_and_is_no_failure(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(SPEED, "digest", 89.0)
    monkeypatch.setattr(run, "SECTIONS", (measure_digest,))
    assert run.check(HostDevice(), TINY, quick=False, output=tmp_path / "report.json") == 0
    out = capsys.readouterr().out
    assert "missed  digest/256 KiB in chunks of 1 MiB: 89 GB/s" in out and "2 of 2 goals missed" in out


def test_what_has_no_room_on_the_device_is_left_out():
    device = HostDevice()
    device.free_bytes = lambda: 3 * TINY.measured_bytes[0]
    assert not any(name.startswith("digest/1 MiB") for name in metrics_of(measure_digest, device))


def test_staging_is_measured_by_the_clock_of_the_host():
    (found,) = metrics_of(measure_staging, HostDevice()).values()
    # One tick of the clock for each.
    assert found.ours == found.peer == pytest.approx(TINY.copied_bytes / 1e-3 / 1e9, rel=1e-3)


def test_copies_are_compared_with_computation_of_their_length():
    found = next(iter(check_overlap(HostDevice(), replace(TINY, copied_bytes=5 << 20))))
    assert found.ok and found.detail.startswith(
        "1.00 of it hides: copy 0.105 ms, compute 0.105 ms, both 0.105 ms"
    )


def test_each_way_to_save_is_run_and_cleans_up(monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    found = [
        (metric.metric.partition(",")[0], metric.peer_name) for metric in measure_training(HostDevice(), TINY)
    ]
    assert found == [
        ("step/save_async", "no save"),
        ("step/save_async", "dcp.async_save"),
        ("step/staging alone", "no save"),
        ("step/staging alone", "dcp.async_save"),
    ]
    assert list(tmp_path.iterdir()) == []
