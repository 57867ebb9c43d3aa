"""What four ranks do with sharded states, for the tests beside this file: each function is run on every rank."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.planner_helpers import _create_write_items_for_dtensor
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from dtruntime_torch.checkpoint.flatten import FlatState, flatten_state
from dtruntime_torch.checkpoint.loading.targets import bind_targets
from dtruntime_torch.checkpoint.state.local_shard import BoxFinder
from dtruntime_torch.errors import InvalidArgument, UnsupportedType
from tests.checkpoint.memory_checkpoint import MemoryCheckpoint, box, checkpoint_of, exact, load
from tests.distributed.in_turn import run_in_turn

WORLD = 4


def make_model() -> torch.nn.Sequential:
    """Its tensors are cut unevenly by four ranks; of some there is nothing for the last ones."""
    return torch.nn.Sequential(
        torch.nn.Linear(6, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 8), torch.nn.Linear(8, 1)
    )


def shard(model: torch.nn.Sequential, mesh: DeviceMesh | None = None) -> torch.nn.Sequential:
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def make_state(**options: Any) -> dict[str, Any]:
    model = shard(make_model())
    return {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=0.01, **options)}


def train(state: dict[str, Any], steps: int) -> None:
    # Alike on all ranks, so that BatchNorm's statistics are, and a load changes none of them.
    torch.manual_seed(steps)
    for _ in range(steps):
        state["optimizer"].zero_grad()
        state["model"](torch.randn(3, 6)).square().mean().backward()
        state["optimizer"].step()


def gathered(flat: FlatState) -> MemoryCheckpoint:
    """What this rank finds after all have saved."""
    flats: list[Any] = [None] * WORLD
    # Copies: a shard that is a view would be sent with all of its storage.
    copies = {fqn: tensor.clone() for fqn, tensor in flat.tensors.items()}
    dist.all_gather_object(flats, FlatState(flat.specs, copies, flat.values))
    return checkpoint_of(*flats, rank=dist.get_rank())


def whole(state: dict[str, Any]) -> object:
    """All of a state, on every rank."""

    def full(value: Any) -> Any:
        if isinstance(value, DTensor):
            return value.full_tensor()
        if isinstance(value, dict):
            return {key: full(item) for key, item in value.items()}
        return value

    optimizer = full(state["optimizer"].state_dict()["state"])
    return exact({"model": full(dict(state["model"].state_dict())), "optimizer": optimizer})


def boxes_are_those_of_dcp() -> None:
    state = make_state()
    train(state, 1)
    expected, _ = flatten_state_dict(
        {
            "model": get_model_state_dict(state["model"]),
            "optimizer": get_optimizer_state_dict(state["model"], state["optimizer"]),
        }
    )
    flat = flatten_state(state, dist.get_rank())
    tensors = {fqn: value for fqn, value in expected.items() if isinstance(value, torch.Tensor)}
    assert [spec.fqn for spec in flat.specs.tensors] == list(tensors)
    for spec in flat.specs.tensors:
        value = tensors[spec.fqn]
        assert spec.global_shape == tuple(value.shape)
        local = value
        if isinstance(value, DTensor):
            chunk = _create_write_items_for_dtensor(spec.fqn, value).tensor_data.chunk  # type: ignore[union-attr]
            assert (spec.offsets, spec.shape) == (tuple(chunk.offsets), tuple(chunk.sizes))
            local = value.to_local()
        assert spec.shape == flat.tensors[spec.fqn].shape == local.shape
        assert flat.tensors[spec.fqn].data_ptr() == local.data_ptr()


def holders_and_spread_are_told_apart() -> None:
    state = make_state()
    train(state, 1)
    rank = dist.get_rank()
    for spec in flatten_state(state, rank).specs.tensors:
        sharded = "step" not in spec.fqn and "running" not in spec.fqn and "num_batches" not in spec.fqn
        assert spec.holders == ((rank,) if sharded else None), spec
        assert bool(spec.layout) == sharded, spec
        assert spec.spread == spec.fqn.endswith(".step"), spec


def a_fresh_sharded_model_goes_on_bit_for_bit() -> None:
    state, fresh = make_state(), make_state()
    train(state, 2)
    checkpoint = gathered(flatten_state(state, dist.get_rank()))
    at_save = whole(state)
    load(checkpoint, fresh)
    assert whole(fresh) == at_save
    for ours, theirs in zip(
        state["optimizer"].state.values(), fresh["optimizer"].state.values(), strict=True
    ):
        assert ours["exp_avg"].placements == theirs["exp_avg"].placements
        assert not isinstance(theirs["step"], DTensor)
    train(state, 2)
    train(fresh, 2)
    assert whole(fresh) == whole(state)


def a_used_sharded_model_is_filled_in_place() -> None:
    state, used = make_state(), make_state()
    train(state, 2)
    train(used, 1)
    entries = [dict(entry) for entry in used["optimizer"].state.values()]
    pointers = [parameter.to_local().data_ptr() for parameter in used["model"].parameters()]
    load(gathered(flatten_state(state, dist.get_rank())), used)
    assert whole(used) == whole(state)
    assert [parameter.to_local().data_ptr() for parameter in used["model"].parameters()] == pointers
    for after, before in zip(used["optimizer"].state.values(), entries, strict=True):
        assert all(after[key] is tensor for key, tensor in before.items())


def sharded_and_plain_fit_each_other() -> None:
    state = make_state()
    train(state, 2)
    checkpoint = gathered(flatten_state(state, dist.get_rank()))
    model = make_model()
    plain = {"model": model, "optimizer": torch.optim.AdamW(model.parameters())}
    load(checkpoint, plain)
    assert whole(plain) == whole(state)
    again = make_state()
    load(gathered(flatten_state(plain, dist.get_rank())), again)
    assert whole(again) == whole(state)


def fp32_state_of_bf16_parameters_stays() -> None:
    state, fresh = make_state(), make_state()
    for one in (state, fresh):
        one["model"].to(torch.bfloat16)
    for parameter in state["model"].parameters():
        state["optimizer"].state[parameter]["master"] = parameter.detach().float() + 0.001
    load(gathered(flatten_state(state, dist.get_rank())), fresh)
    assert whole(fresh) == whole(state)


def parameters_that_a_forward_gathered_are_found() -> None:
    state = make_state()
    with torch.no_grad():
        state["model"].eval()(torch.randn(2, 6))
    reversed_state = dict(reversed(state.items()))
    flat = flatten_state(reversed_state, dist.get_rank())
    assert {spec.fqn for spec in flat.specs.tensors if spec.holders} == {
        f"model.{name}" for name, _ in state["model"].named_parameters()
    }


def a_dict_and_a_stateful_object_may_hold_dtensors() -> None:
    mesh = init_device_mesh("cpu", (WORLD,))

    class Average:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.state = {"ema": distribute_tensor(tensor, mesh, [Shard(1)])}

        def state_dict(self) -> dict[str, Any]:
            return self.state

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.state = state

    torch.manual_seed(0)
    tensor = torch.randn(3, 6)
    saved = {"a": distribute_tensor(tensor, mesh, [Shard(0)]), "b": Average(tensor), "c": tensor}
    target = {
        "a": distribute_tensor(torch.zeros(3, 6), mesh, [Shard(1)]),
        "b": Average(torch.zeros(3, 6)),
        "c": distribute_tensor(torch.zeros(3, 6), mesh, [Replicate()]),
    }
    load(gathered(flatten_state(saved, dist.get_rank())), target)
    assert torch.equal(target["a"].full_tensor(), tensor)  # type: ignore[attr-defined]
    assert torch.equal(target["b"].state["ema"].full_tensor(), tensor)  # type: ignore[attr-defined]
    assert target["b"].state["ema"].placements == (Shard(1),)  # type: ignore[attr-defined]
    assert torch.equal(target["c"].to_local(), tensor)  # type: ignore[attr-defined]


def only_the_own_box_is_wanted() -> None:
    state = make_state()
    train(state, 1)
    checkpoint = gathered(flatten_state(state, dist.get_rank()))
    fresh = make_state()
    wanted = {spec.fqn: spec for spec in bind_targets(fresh).want(checkpoint.saved).tensors}
    for spec in flatten_state(state, dist.get_rank()).specs.tensors:
        assert (wanted[spec.fqn].offsets, wanted[spec.fqn].shape) == (spec.offsets, spec.shape)


def tied_shards_name_the_first() -> None:
    embed, head = torch.nn.Embedding(8, 3), torch.nn.Linear(3, 8, bias=False)
    head.weight = embed.weight
    model = torch.nn.Sequential(embed, head)
    fully_shard(model)
    specs = {spec.fqn: spec for spec in flatten_state({"m": model}, dist.get_rank()).specs.tensors}
    assert specs["m.1.weight"].alias == "m.0.weight"
    checkpoint = gathered(flatten_state({"m": model}, dist.get_rank()))
    assert torch.equal(checkpoint.tensors["m.1.weight"], full_tensor(embed.weight))


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    assert isinstance(tensor, DTensor)
    return tensor.full_tensor().detach()


def replicas_of_a_hybrid_mesh_are_all_holders() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = shard(make_model(), mesh)
    rank = dist.get_rank()
    for spec in flatten_state({"m": model}, rank).specs.tensors:
        if "running" not in spec.fqn and "num_batches" not in spec.fqn:
            assert spec.holders == (rank % 2, rank % 2 + 2)
            assert spec.first_holders == (0, 2)
    reference = {name: full_tensor(parameter) for name, parameter in model.named_parameters()}
    checkpoint = gathered(flatten_state({"m": model}, rank))
    assert all(torch.equal(checkpoint.tensors[f"m.{name}"], tensor) for name, tensor in reference.items())


def tensor_parallel_and_sharded_makes_boxes_that_tile() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 6))
    reference = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    weight: Any = model[0].weight
    assert any(isinstance(placement, _StridedShard) for placement in weight.placements)
    flat = flatten_state({"m": model}, dist.get_rank())
    checkpoint = gathered(flat)
    assert all(torch.equal(checkpoint.tensors[f"m.{name}"], tensor) for name, tensor in reference.items())
    for spec in flat.specs.tensors:
        assert torch.equal(flat.tensors[spec.fqn], reference[spec.fqn[2:]][box(spec.offsets, spec.shape)])


def a_shard_that_is_no_box_is_refused() -> None:
    mesh = init_device_mesh("cpu", (2, 2))
    placements = [Shard(0), _StridedShard(0, split_factor=2)]
    tensor = DTensor.from_local(torch.zeros(2, 3), mesh, placements, shape=torch.Size([8, 3]), stride=(3, 1))
    refused = False
    try:
        BoxFinder().find(tensor, "w")
    except UnsupportedType as error:
        refused = str(error).startswith("w: ") and "no box" in str(error)
    assert refused


def a_plain_shard_in_an_optimizer_is_refused() -> None:
    state = make_state()
    for parameter in state["model"].parameters():
        state["optimizer"].state[parameter]["local"] = torch.zeros_like(parameter.to_local())
    refused = ""
    try:
        flatten_state(state, dist.get_rank())
    except UnsupportedType as error:
        refused = str(error)
    assert refused.startswith("optimizer.state.0.weight.local: ")


def a_rank_outside_of_the_mesh_is_refused() -> None:
    mesh = DeviceMesh("cpu", [0, 1])
    tensor = distribute_tensor(torch.zeros(4), mesh, [Shard(0)])
    refused = False
    try:
        flatten_state({"t": tensor}, dist.get_rank())
    except UnsupportedType as error:
        refused = str(error).startswith("t: this rank is not in")
    assert refused == (dist.get_rank() > 1)


def a_mesh_counts_the_ranks_that_save() -> None:
    state = make_state()
    refused = False
    try:
        flatten_state(state, (dist.get_rank() + 1) % WORLD)
    except InvalidArgument as error:
        refused = str(error).startswith("model.0.weight: by its mesh")
    assert refused


SCENARIOS: dict[str, Callable[[], None]] = {
    scenario.__name__: scenario
    for scenario in (
        boxes_are_those_of_dcp,
        holders_and_spread_are_told_apart,
        a_fresh_sharded_model_goes_on_bit_for_bit,
        a_used_sharded_model_is_filled_in_place,
        sharded_and_plain_fit_each_other,
        fp32_state_of_bf16_parameters_stays,
        parameters_that_a_forward_gathered_are_found,
        a_dict_and_a_stateful_object_may_hold_dtensors,
        only_the_own_box_is_wanted,
        tied_shards_name_the_first,
        replicas_of_a_hybrid_mesh_are_all_holders,
        tensor_parallel_and_sharded_makes_boxes_that_tile,
        a_shard_that_is_no_box_is_refused,
        a_plain_shard_in_an_optimizer_is_refused,
        a_rank_outside_of_the_mesh_is_refused,
        a_mesh_counts_the_ranks_that_save,
    )
}


def run(rank: int, folder: str) -> None:
    """Runs every scenario on one rank; what became of each is in a file of its name and the rank's."""
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=timeout
    )
    run_in_turn({name: partial(_without_folder, one) for name, one in SCENARIOS.items()}, Path(folder), rank)
    dist.destroy_process_group()


def _without_folder(scenario: Callable[[], None], folder: Path) -> None:
    scenario()
