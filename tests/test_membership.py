"""Who saves together: alone, with all ranks, or with those of a group."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from dtruntime_torch import membership
from dtruntime_torch.membership import HashStore, join
from tests.meeting_ranks import TCPStore, launch, outcome


@pytest.fixture
def group_of_one():
    """A process group of this process, and its Store."""
    store = HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield store
    dist.destroy_process_group()


def keys_of(store, run_id):
    return [key for key in store.list_keys() if f"dtruntime/{run_id}/" in key]


def test_without_torch_distributed_a_process_is_alone():
    members = join(timeout=5.0)
    assert (members.rank, members.world_size) == (0, 1)
    assert (members.barrier.rank, members.barrier.world_size, members.barrier.timeout) == (0, 1, 5.0)
    assert members.barrier.meet("save", b"part", lambda values: values[0]) == b"part"


def test_each_incarnation_has_an_id_of_its_own():
    ids = {join().run_id for _ in range(10)}
    assert len(ids) == 10
    assert all(re.fullmatch("[0-9a-f]{32}", run_id) for run_id in ids)


def test_the_ranks_meet_on_the_store_of_the_process_group(group_of_one):
    members = join()
    members.barrier.announce("pick", lambda: b"")
    assert len(keys_of(group_of_one, members.run_id)) == 1


def test_the_ranks_meet_on_the_store_that_is_given(group_of_one):
    shared = HashStore()
    members = join(store=PrefixStore("mine", shared))
    members.barrier.announce("pick", lambda: b"")
    assert keys_of(shared, members.run_id) == [f"mine/dtruntime/{members.run_id}/pick/answer"]
    assert keys_of(group_of_one, members.run_id) == []


def test_processes_join_as_all_as_a_group_and_alone():
    store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    ranks = [launch("joining", rank, 3, store.port) for rank in range(3)]
    found = [outcome(rank) for rank in ranks]

    run_id = found[0]["all"][2]
    assert [of["all"] for of in found] == [[rank, 3, run_id, "0 1 2"] for rank in range(3)]
    assert len({of["again"] for of in found} | {run_id}) == 2

    assert [of["alone"][:2] for of in found] == [[0, 1]] * 3
    assert len({of["alone"][2] for of in found}) == 3

    assert found[0]["some"] == ["rank 0 is not in the process group; only its members may save together"]
    some_id = found[1]["some"][2]
    assert [of["some"] for of in found[1:]] == [[rank, 2, some_id, "0 1", ""] for rank in range(2)]
    # The announcement, which nothing followed, was the last thing there.
    assert store.check([f"theirs/dtruntime/{some_id}/told/answer"])


@pytest.mark.parametrize(
    ("config", "accelerator", "device"),
    [
        ("cpu:gloo,cuda:gloo", None, "cpu"),
        ("cpu:gloo,cuda:nccl", "cuda:3", "cpu"),
        ("cuda:nccl", "cuda:3", "cuda:3"),
        ("xpu:xccl", "xpu:3", "xpu:3"),
    ],
)
def test_the_id_travels_by_the_host_if_the_group_can(monkeypatch, config, accelerator, device):
    # What a machine with such devices would say; there is none here.
    current = torch.device(accelerator.partition(":")[0]) if accelerator else None
    monkeypatch.setattr(dist, "get_backend_config", lambda group: config)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: current)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 3)
    assert membership._device_of(None) == torch.device(device)


def test_a_process_of_torchrun_that_did_not_initialise_is_warned(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.warns(RuntimeWarning, match=r"torchrun started 4 processes.*init_process_group\(\) first"):
        assert join().world_size == 1


def test_a_process_of_its_own_is_not_warned(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        join()
