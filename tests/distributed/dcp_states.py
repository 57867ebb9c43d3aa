"""Models, states and a planner for the scenarios of `dcp_scenarios.py`."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import dtruntime_torch as dt
from tests.distributed.in_turn import GROUPS, MESHES

RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
State = dict[str, Any]


def make_model(seed: int) -> torch.nn.Sequential:
    """Its tensors are cut unevenly; of some there is nothing for the last ranks."""
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 1))


def trained(seed: int, mesh: DeviceMesh | None, steps: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = make_model(seed)
    if mesh is not None:
        for layer in model:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    torch.manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 6)).square().mean().backward()
        optimizer.step()
    return model, optimizer


def state_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> State:
    of_model, of_optimizer = get_state_dict(model, optimizer)
    return {"model": of_model, "optimizer": of_optimizer, "step": 3, "extra": [1, ("two",)]}


def full(value: Any) -> Any:
    """All of a state, on every rank."""
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: full(item) for key, item in value.items()}
    return [full(item) for item in value] if isinstance(value, list) else value


def flat(value: Any, at: str = "") -> State:
    if isinstance(value, dict):
        return {key: item for name in value for key, item in flat(value[name], f"{at}.{name}").items()}
    return {at[1:]: value}


def assert_equal(left: State, right: State) -> None:
    one, other = flat(left), flat(right)
    assert one.keys() == other.keys()
    for name, value in one.items():
        same = torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
        assert same, name


def members(count: int) -> bool:
    return count > RANK


def save_by(count: int, folder: Path, steps: int = 3) -> State:
    """The first ranks train, sharded among them, and save; returns all that there was, on these."""
    state = state_of(*trained(1, MESHES[(count,)] if count > 1 else None, steps))
    dcp_save(state, storage_writer=dt.StorageWriter(folder), process_group=GROUPS[count])
    return full(state)  # type: ignore[no-any-return]


def load_by(count: int, folder: Path) -> State:
    """The first ranks load into another model, sharded among them."""
    model, optimizer = trained(2, MESHES[(count,)] if count > 1 else None, 1)
    state = state_of(model, optimizer) | {"step": 0, "extra": None}
    dcp_load(state, storage_reader=dt.StorageReader(folder), process_group=GROUPS[count])
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return full(state_of(model, optimizer) | {"step": state["step"], "extra": state["extra"]})  # type: ignore[no-any-return]


class Rows(DefaultSavePlanner):
    """Cuts every tensor of one rank into single rows, each an item of its own."""

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        return replace(plan, items=[row for item in plan.items for row in self._rows(item)])

    def _rows(self, item: WriteItem) -> list[WriteItem]:
        data = item.tensor_data
        if data is None or not data.chunk.sizes:
            return [item]
        rows = []
        for n in range(data.chunk.sizes[0]):
            offsets = torch.Size([data.chunk.offsets[0] + n, *data.chunk.offsets[1:]])
            chunk = ChunkStorageMetadata(offsets, torch.Size([1, *data.chunk.sizes[1:]]))
            rows.append(
                replace(
                    item,
                    index=MetadataIndex(item.index.fqn, offsets),
                    type=WriteItemType.SHARD,
                    tensor_data=replace(data, chunk=chunk),
                )
            )
        return rows

    def lookup_object(self, index: MetadataIndex) -> Any:
        whole = self.state_dict[index.fqn]
        local, first = (whole.to_local(), 0) if isinstance(whole, DTensor) else (whole, 0)
        if not isinstance(local, torch.Tensor) or index.offset is None or not index.offset:
            return local
        if isinstance(whole, DTensor):
            first = RANK * whole.shape[0] // WORLD
        return local[index.offset[0] - first : index.offset[0] - first + 1]
