"""Scenarios of models and optimizers in every kind of parallelism; each runs on every rank of four, through both doors."""

from __future__ import annotations

import io
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.optimizer import load_sharded_optimizer_state_dict
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    _patch_model_state_dict,
    _patch_optimizer_state_dict,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import ShardingStrategy, StateDictType, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from tests.distributed.dcp_doors import Doors, State, assert_same, differences, whole
from tests.distributed.dcp_states import RANK
from tests.distributed.in_turn import GROUPS, MESHES

CPU = torch.device("cpu")


class Net(nn.Sequential):
    """Two layers, of which the rows of the second do not divide by four."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        super().__init__(nn.Linear(6, 12), nn.Linear(12, 5))


def fsdp(seed: int) -> nn.Module:
    return FSDP(Net(seed), device_mesh=MESHES[4,], use_orig_params=True, device_id=CPU)


def hsdp(seed: int) -> nn.Module:
    strategy = ShardingStrategy.HYBRID_SHARD
    return FSDP(
        Net(seed), device_mesh=MESHES[2, 2], sharding_strategy=strategy, use_orig_params=True, device_id=CPU
    )


def fsdp2(seed: int) -> nn.Module:
    return sharded(Net(seed), MESHES[4,])


def hsdp2(seed: int) -> nn.Module:
    return sharded(Net(seed), MESHES[2, 2])


def ddp(seed: int) -> nn.Module:
    return DistributedDataParallel(Net(seed))


def tensor_parallel(seed: int) -> nn.Module:
    plan = {"0": ColwiseParallel(), "1": RowwiseParallel()}
    return parallelize_module(Net(seed), MESHES[4,], plan)


def tensor_parallel_in_fsdp2(seed: int) -> nn.Module:
    mesh = MESHES[2, 2]
    model = parallelize_module(Net(seed), mesh["shard"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    return sharded(model, mesh["replicate"])


def plain(seed: int) -> nn.Module:
    return Net(seed)


def sharded(model: nn.Module, mesh: Any) -> nn.Module:
    for layer in model.children():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


KINDS = (plain, ddp, fsdp, hsdp, fsdp2, hsdp2, tensor_parallel, tensor_parallel_in_fsdp2)


def trained(model: nn.Module, steps: int = 2) -> torch.optim.Optimizer:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    train(model, optimizer, steps)
    return optimizer


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> torch.Tensor:
    torch.manual_seed(7)
    loss = torch.zeros(())
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(torch.rand(4, 6)).square().mean()
        loss.backward()
        optimizer.step()
    return loss.detach()


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> State:
    of_model, of_optimizer = get_state_dict(model, optimizer)
    return {"model": of_model, "optimizer": of_optimizer}


def every_kind_of_model_loads_every_other(doors: Doors) -> None:
    """Plain, DDP, FSDP and FSDP2, both also hybrid, tensor parallel, and the two at once."""
    saved = {kind.__name__: get_model_state_dict(kind(n)) for n, kind in enumerate(KINDS)}
    doors.save(saved)
    expected = whole(saved)
    for kind in KINDS:
        state = get_model_state_dict(kind(99))
        assert_same(doors.load({name: apart(state) for name in saved}), expected)


def apart(state: Any) -> Any:
    """A copy, so that several may be filled."""
    if isinstance(state, torch.Tensor):
        return state.detach().clone()
    return {key: apart(item) for key, item in state.items()}


def loads_into_the_running_model(doors: Doors) -> None:
    """FSDP, hybrid or not, trained on between save and load, and put back."""
    for kind in (fsdp, hsdp):
        model = kind(1)
        FSDP.set_state_dict_type(model, StateDictType.SHARDED_STATE_DICT)
        before = whole(dict(model.state_dict()))
        doors.save({"model": model.state_dict()}, kind.__name__)
        trained(model, 1)
        assert len(differences(whole(dict(model.state_dict())), before)) == 4
        state = doors.load({"model": model.state_dict()}, kind.__name__)
        model.load_state_dict(state["model"])
        assert_same(dict(model.state_dict()), before)


def sharded_optimizer_state_is_made_while_it_loads(doors: Doors) -> None:
    """The optimizer to load has no state yet: DCP makes it from the metadata, by a planner of its own."""
    model = fsdp(1)
    optimizer = trained(model)
    FSDP.set_state_dict_type(model, StateDictType.SHARDED_STATE_DICT)
    saved: State = {"model": model.state_dict(), "optim": FSDP.optim_state_dict(model, optimizer)}
    doors.save(saved)
    other = fsdp(2)
    fresh = torch.optim.Adam(other.parameters(), lr=0.1)
    FSDP.set_state_dict_type(other, StateDictType.SHARDED_STATE_DICT)
    state = doors.load({"model": other.state_dict()})
    other.load_state_dict(state["model"])
    found = load_sharded_optimizer_state_dict(state["model"], "optim", doors.reader())
    fresh.load_state_dict(FSDP.optim_state_dict_to_load(other, fresh, found["optim"]))
    assert_same(FSDP.optim_state_dict(other, fresh)["state"], saved["optim"]["state"])


class Progress:
    """The state of a loop, in tensors and in bytes that it made itself."""

    def __init__(self, losses: list[float]) -> None:
        self.losses = losses

    def state_dict(self) -> State:
        stream = io.BytesIO()
        torch.save(self.losses, stream)
        return {"step": torch.tensor(len(self.losses), dtype=torch.int32), "losses": stream}

    def load_state_dict(self, state: State) -> None:
        state["losses"].seek(0)
        self.losses = torch.load(state["losses"])
        assert len(self.losses) == state["step"].item()


def training_goes_on_where_it_was(doors: Doors) -> None:
    """Models, optimizers and a loop's state are given as they are; the next step is the one that would have been."""
    for kind in (ddp, fsdp, hsdp, fsdp2):
        model = kind(1)
        optimizer = trained(model)
        _patch_model_state_dict(model)
        _patch_optimizer_state_dict(model, optimizers=optimizer)
        progress = Progress([0.5, 0.25])
        doors.save({"model": model, "optimizer": optimizer, "progress": progress}, kind.__name__)
        expected = train(model, optimizer, 1)
        other = kind(2)
        fresh = trained(other, 1)
        _patch_model_state_dict(other)
        _patch_optimizer_state_dict(other, optimizers=fresh)
        found = Progress([])
        doors.load({"model": other, "optimizer": fresh, "progress": found}, kind.__name__)
        assert found.losses == progress.losses
        assert torch.equal(train(other, fresh, 1), expected)


def a_part_of_what_was_saved_loads(doors: Doors) -> None:
    """The model without its optimizer, in place; then either by its name, without a state to fill."""
    model = fsdp2(1)
    saved = state_of(model, trained(model))
    doors.save(saved)
    other = fsdp2(2)
    doors.load({"model": get_model_state_dict(other)})
    assert_same(get_model_state_dict(other), saved["model"])
    found = _load_state_dict_from_keys("model", storage_reader=doors.reader())
    assert_same(found, {"model": saved["model"]})
    found = _load_state_dict_from_keys({"optimizer.state"}, storage_reader=doors.reader())
    assert_same(found, {"optimizer": {"state": saved["optimizer"]["state"]}})


class Tuned(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.body, self.head = Net(seed), nn.Linear(5, 3)
        self.body.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))  # type: ignore[no-any-return]


def a_frozen_body_and_its_head_are_two_checkpoints(doors: Doors) -> None:
    """Fine-tuning: the body comes from the first, only the head is saved, and a restart takes both."""
    first = fsdp2(1)
    doors.save(state_of(first, trained(first)), "pretrained")
    head: State = {}
    for restart in (False, True):
        model = Tuned(2)
        fully_shard(model.body, mesh=MESHES[4,])
        fully_shard(model, mesh=MESHES[4,])
        optimizer = torch.optim.Adam(model.head.parameters(), lr=0.1)
        doors.load({"model": get_model_state_dict(model.body)}, "pretrained")
        assert_same(get_model_state_dict(model.body), get_model_state_dict(first))
        options = StateDictOptions(ignore_frozen_params=True, strict=False)
        if restart:
            of_model, of_optimizer = get_state_dict(model, optimizer, options=options)
            state = doors.load({"model": of_model, "optimizer": of_optimizer}, "tuned")
            set_state_dict(
                model,
                optimizer,
                model_state_dict=state["model"],
                optim_state_dict=state["optimizer"],
                options=options,
            )
            assert_same(get_model_state_dict(model.head), head)
        train(model, optimizer, 1)
        of_model, of_optimizer = get_state_dict(model, optimizer, options=options)
        assert set(of_model) == {"head.weight", "head.bias"}
        if not restart:
            doors.save({"model": of_model, "optimizer": of_optimizer}, "tuned")
            head = whole(get_model_state_dict(model.head))


def stages_of_a_pipeline_load_into_a_sharded_model(doors: Doors) -> None:
    """Each rank has one layer, the others are on the meta device."""

    def build(seed: int) -> nn.Sequential:
        torch.manual_seed(seed)
        return nn.Sequential(*(nn.Linear(5, 5) for _ in range(4)))

    with torch.device("meta"):
        model = build(0)
    model[RANK] = build(1)[RANK]
    state = {name: value for name, value in model.state_dict().items() if not value.is_meta}
    doors.save({"model": state})
    target = get_model_state_dict(sharded(build(2), MESHES[4,]))
    doors.load({"model": target})
    assert_same(target, dict(build(1).state_dict()))


def experts_on_some_ranks_each(doors: Doors) -> None:
    """Sharded over the ranks that have them, beside layers that are sharded over all."""
    mesh = MESHES[2, 2]
    mine = RANK % 2

    def build(seed: int) -> nn.ModuleDict:
        model = nn.ModuleDict({"shared": Net(seed), f"expert{mine}": Net(seed + 1 + mine)})
        sharded(model["shared"], MESHES[4,])
        sharded(model[f"expert{mine}"], mesh["replicate"])
        return model

    saved = get_model_state_dict(build(1))
    doors.save({"model": saved})
    target = get_model_state_dict(build(5))
    doors.load({"model": target})
    assert_same(target, saved)


def a_fresh_optimizer_gets_the_learning_rate_that_was_saved(doors: Doors) -> None:
    model = Net(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    doors.save(
        {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    )
    other = Net(2)
    fresh = torch.optim.Adam(other.parameters(), lr=0.2)
    of_model, of_optimizer = get_model_state_dict(other), get_optimizer_state_dict(other, fresh)
    state = doors.load({"model": of_model, "optimizer": of_optimizer})
    assert state["model"] is of_model and state["optimizer"] is of_optimizer
    set_state_dict(other, fresh, model_state_dict=of_model, optim_state_dict=of_optimizer)
    assert fresh.param_groups[0]["lr"] == 0.1
    assert_same(get_model_state_dict(other), get_model_state_dict(model))


class Talks:
    """Its state is loaded by a collective call."""

    def __init__(self, gather: bool) -> None:
        self.gather, self.loaded = gather, False

    def state_dict(self) -> State:
        return {}

    def load_state_dict(self, state: State) -> None:
        mine = torch.ones(2)
        if self.gather:
            dist.all_gather([torch.zeros(2) for _ in range(4)], mine)
        else:
            dist.all_reduce(mine)
        self.loaded = True


def ranks_name_their_state_in_another_order(doors: Doors) -> None:
    names = ["a", "b"] if RANK == 0 else ["b", "a"]
    state: State = {name: Talks(name == "a") for name in names}
    doors.save(state)
    doors.load(state)
    assert all(one.loaded for one in state.values())


def one_group_saves_while_another_trains(doors: Doors) -> None:
    """Two ranks save together; the other two make steps with each other meanwhile."""
    model = nn.Linear(3, 3)
    group = dist.new_group([2, 3])
    if RANK < 2:
        for n in range(3):
            doors.save({"w": torch.full((3,), float(n))}, str(n), process_group=GROUPS[2])
        found = doors.load({"w": torch.zeros(3)}, "2", process_group=GROUPS[2])
        assert (found["w"] == 2).all()
    else:
        replicas = DistributedDataParallel(model, process_group=group)
        trainer = torch.optim.SGD(replicas.parameters(), lr=0.1)
        for _ in range(20):
            replicas(torch.ones(1, 3)).sum().backward()
            trainer.step()


CASES = (
    every_kind_of_model_loads_every_other,
    loads_into_the_running_model,
    sharded_optimizer_state_is_made_while_it_loads,
    training_goes_on_where_it_was,
    a_part_of_what_was_saved_loads,
    a_frozen_body_and_its_head_are_two_checkpoints,
    stages_of_a_pipeline_load_into_a_sharded_model,
    experts_on_some_ranks_each,
    a_fresh_optimizer_gets_the_learning_rate_that_was_saved,
    ranks_name_their_state_in_another_order,
    one_group_saves_while_another_trains,
)
