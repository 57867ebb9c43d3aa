"""What torch tests of `torch.distributed.checkpoint`, in our words, through our writer, reader and stager.

Each scenario runs through the stock doors first, which shows that it is sound, and then through ours.

| torch's tests | here |
|---|---|
| file system, tensors, bytes, casts | `checkpoint/dcp/test_round_trips.py` |
| file system, `Stateful` with bytes; end to end, DDP, FSDP, HSDP | `training_goes_on_where_it_was` |
| file system, `ShardedTensor`: reshard, rows to columns, to plain ones and back | `dcp_tensor_cases.py` |
| file system, overwriting | `checkpoint/dcp/test_folders.py`, `overwritten_by_fewer` |
| HSDP, and HSDP to FSDP | `loads_into_the_running_model`, `every_kind_of_model_loads_every_other` |
| FSDP model state; FSDP2 against its state dict; TP, 2D, FSDP to TP | `every_kind_of_model_loads_every_other` |
| FSDP optimizer state, with a planner and without | `sharded_optimizer_state_is_made_while_it_loads` |
| DTensor with extra state | `a_module_with_extra_state` |
| DTensor resharding: placements, meshes, empty and uneven shards | `placements_and_meshes_change`, `shards_are_uneven_or_empty` |
| DTensor resharding: `LocalShardsWrapper`, tensors with methods of their own | `uneven_shards_in_one_dtensor`, `tensors_that_cut_themselves` |
| replicas stored once | `what_all_ranks_have_is_stored_once`, `hybrid_shards_are_written_once` |
| async, thread and process, stagers; a failure in the process | `dcp_async_cases.py` |
| stager: dtypes, no elements, memory used again, independence | `checkpoint/dcp/test_pinned_stager.py` |
| failures of each step on some ranks, other coordinators | `dcp_fault_cases.py` |
| planners: strict, partial, sizes, plans kept; nested dicts; keys; `Stateful` in place; to and from `torch.save` | `checkpoint/dcp/test_stock_cases.py`, `test_planners.py` |
| end to end: order of keys, partial load, fresh optimizer; fine-tuning; experts; pipeline | `dcp_model_cases.py` |
| Hugging Face files consolidated | `stock_code_makes_one_file_of_it` |
| Hugging Face files, resharded | `checkpoint/dcp/test_foreign_folders.py`, `..._hugging_face_writes`, `..._hugging_face_reads` |

Not here, for it says nothing of a writer or reader: threads and extensions of `FileSystemWriter` (its files), fsspec
paths (its file systems), which doors a `checkpoint_id` selects (stock ones only), how the process for async saves finds its
port, quantized files, CUDA. Planners for process groups are gone from torch.
Unlike stock stagers ours keeps no attributes of tensors, and views of one memory are copies of their own: neither is saved.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed import dcp_stock_cases
from tests.distributed.in_turn import check_outcome
from tests.distributed.launch import in_turn

PROGRAM = Path(dcp_stock_cases.__file__)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stock-cases")
    in_turn(tuple(dcp_stock_cases.SCENARIOS), folder, 4, program=PROGRAM)
    return folder


@pytest.mark.parametrize("scenario", dcp_stock_cases.SCENARIOS)
def test_as_through_the_stock_doors(outcomes, scenario):
    check_outcome(outcomes, scenario, 4)
