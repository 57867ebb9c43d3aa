"""Every fault that is planted is found, by the check that is there for it."""

from __future__ import annotations

import json

import pytest
import torch

from dtruntime_torch.gpucheck import run
from dtruntime_torch.gpucheck.changes import check_changes
from dtruntime_torch.gpucheck.deltas import check_deltas, measure_deltas
from dtruntime_torch.gpucheck.digests import check_digests
from dtruntime_torch.gpucheck.door import check_door
from dtruntime_torch.gpucheck.overlap import check_overlap
from dtruntime_torch.gpucheck.staging import check_staging
from dtruntime_torch.gpucheck.streams import check_streams, on_another_device
from dtruntime_torch.gpucheck.tears import check_tears
from tests.gpucheck import faults
from tests.gpucheck.host_device import TINY, HostBench

FAULTS = [
    (faults.wrong_digest_of_one_length, check_digests, "digest/lengths"),
    (faults.a_read_rounded_down_to_16, check_digests, "digest/lengths"),
    (faults.wrong_digest_by_the_op, check_digests, "digest/bfloat16"),
    (faults.a_chunk_too_few, check_digests, "digest/chunks"),
    (faults.a_copy_that_writes_past_its_end, check_digests, "copy/bytes at 256 alignments"),
    (faults.an_op_that_does_not_copy, check_digests, "copy/bytes by the op"),
    (faults.a_comparison_of_one_half, check_changes, "changes/found, some"),
    (faults.a_change_that_is_not_seen, check_changes, "changes/found, one"),
    (faults.a_table_that_is_not_brought_up_to_date, check_changes, "changes/table"),
    (faults.a_gather_that_writes_zeros, check_changes, "changes/in their places"),
    (faults.a_gather_that_writes_zeros, check_changes, "changes/gathered"),
    (faults.an_op_that_does_not_wait_for_the_side_stream, check_streams, "side stream/digests"),
    (faults.an_op_that_does_not_copy, check_streams, "side stream/copy"),
    (faults.an_op_that_changes_the_current_device, check_streams, "other device/current device"),
    (faults.an_op_that_does_not_copy, check_streams, "other device/copy"),
    (faults.a_graph_that_does_nothing, check_streams, "graph/digests of replay 0"),
    (faults.a_graph_that_runs_well_only_once, check_streams, "graph/digests of replay 1"),
    (faults.a_graph_that_does_not_copy, check_streams, "graph/copy of replay 0"),
    (faults.a_torn_staging, check_staging, "staging/4 rounds while overwritten"),
    (faults.a_torn_staging, check_staging, "staging/2 rounds of training"),
    (faults.a_staging_with_wrong_digests, check_staging, "staging/4 rounds while overwritten"),
    (faults.a_staging_with_wrong_digests, check_staging, "staging/2 rounds of training"),
    (faults.a_staging_with_wrong_digests, check_tears, "tear/digests of the device"),
    (faults.a_device_that_does_not_digest_at_the_call, check_tears, "tear/tensor 0 overwritten behind"),
    (faults.a_device_that_does_not_digest_at_the_call, check_tears, "tear/tensor 4 overwritten behind"),
    (faults.a_device_that_fails_in_the_words_of_a_tear, check_tears, "tear/tensor 0 overwritten behind"),
    (faults.a_torn_staging, check_tears, "tear/4 rounds of early and late ones"),
    (faults.a_staging_with_wrong_digests, check_tears, "tear/4 rounds of early and late ones"),
    (faults.a_stager_that_takes_late_ones_first, check_tears, "tear/early ones are not held by late ones"),
    (faults.a_graph_that_does_nothing, check_tears, "tear/asked while a graph is captured"),
    (faults.a_change_that_is_not_seen, check_deltas, "delta staging/4 rounds while overwritten"),
    (faults.a_change_that_is_neither_seen_nor_kept, check_deltas, "delta staging/4 rounds while overwritten"),
    (faults.a_gather_that_writes_zeros, check_deltas, "delta staging/4 rounds while overwritten"),
    (faults.a_torn_staging, check_deltas, "delta staging/4 rounds while overwritten"),
    (faults.a_stager_that_copies_all, check_deltas, "delta staging/4 rounds while overwritten"),
    (faults.a_staging_with_wrong_digests, check_deltas, "delta staging/4 rounds while overwritten"),
    (faults.a_change_that_is_not_seen, measure_deltas, "measure_deltas runs to its end"),
    (faults.a_stager_that_copies_all, measure_deltas, "delta staging/bytes with 50% changed"),
    (faults.a_door_that_does_not_hold, check_door, "door/AdamW foreach"),
    (faults.a_door_that_does_not_hold, check_door, "door/AdamW fused"),
    (faults.a_door_that_does_not_hold, check_door, "door/SGD with momentum"),
    (faults.a_door_that_does_not_hold, check_door, "door/an optimizer for each parameter"),
    (faults.a_door_that_does_not_hold, check_door, "door/a scaled loss"),
    (faults.a_save_that_does_not_take_what_is_early, check_door, "door/an average and a buffer"),
    (faults.a_save_that_takes_all_for_what_optimizers_own, check_door, "door/an average and a buffer"),
    (faults.a_value_that_is_loaded_as_another, check_door, "door/a scaled loss"),
    (faults.a_tensor_that_is_not_loaded, check_door, "door/AdamW foreach"),
    (faults.a_save_that_is_never_late, check_door, "door/AdamW foreach"),
    (faults.a_save_that_does_not_look_for_tears, check_door, "door/overwritten behind it"),
    (faults.a_manager_that_forgets_tears, check_door, "door/the next save after a tear"),
    (faults.streams_that_wait_for_each_other, check_overlap, "overlap/copies"),
    (faults.streams_that_wait_for_each_other, check_overlap, "overlap/staging"),
    (faults.a_copy_that_waits_its_turn_on_the_side, check_overlap, "overlap/copies"),
    (faults.a_stager_on_the_stream_of_training, check_overlap, "overlap/staging"),
    (faults.a_start_that_waits, check_overlap, "overlap/start"),
]


@pytest.mark.filterwarnings("ignore:saves now wait until all is staged")
@pytest.mark.parametrize(("plant", "section", "name"), FAULTS)
def test_a_planted_fault_is_found_and_ends_with_1(plant, section, name, monkeypatch, tmp_path, capsys):
    bench = HostBench()
    plant(bench)
    monkeypatch.setattr(run, "SECTIONS", (section,))
    assert run.check(bench, TINY, quick=False, output=tmp_path / "report.json") == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["ok"] is False
    failed = [check["name"] for check in report["checks"] if not check["ok"]]
    assert any(found.startswith(name) for found in failed), failed
    assert f"FAILED  {name}" in capsys.readouterr().out


def test_digests_on_the_wrong_device_are_found():
    bench = HostBench()
    bench.digest = bench.copy_digest_ = lambda *args: torch.empty((1, 2), device="meta")
    found = on_another_device(bench, 1000)
    assert next(found).name == "other device/current device"
    where = next(found)
    assert (where.ok, where.detail) == (False, "data on cpu, digests on meta")
