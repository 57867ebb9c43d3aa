"""What a rank's plan of DCP says, in the records of our files: each tensor a spec and its bytes, each object its value."""

from __future__ import annotations

import io
from dataclasses import dataclass, field

import torch
from torch.distributed.checkpoint.planner import SavePlan as TorchPlan
from torch.distributed.checkpoint.planner import SavePlanner, WriteItemType
from torch.distributed.checkpoint.planner import WriteItem as TorchItem

from dtruntime_torch.checkpoint.dcp.payloads import encode_payload
from dtruntime_torch.checkpoint.dcp.state_paths import mapping_of, path_of
from dtruntime_torch.checkpoint.flatten import tensor_of
from dtruntime_torch.checkpoint.objects import Json
from dtruntime_torch.checkpoint.specs import ObjectSpec, SavePlan, TensorSpec, WriteItem
from dtruntime_torch.checkpoint.state.local_shard import dtype_name, local_tensor
from dtruntime_torch.errors import InvalidArgument


@dataclass(slots=True)
class ShardFile:
    """What goes into one data file and its part manifest.

    Attributes:
        tensors: each with its data: on the host, contiguous.
        objects: each with its encoded value.
    """

    tensors: dict[str, tuple[TensorSpec, torch.Tensor]] = field(default_factory=dict)
    objects: dict[str, tuple[ObjectSpec, Json]] = field(default_factory=dict)

    def holds(self, fqn: str) -> bool:
        """Whether it has something of that name."""
        return fqn in self.tensors or fqn in self.objects

    @property
    def values(self) -> dict[str, Json]:
        """The encoded objects by their fqns."""
        return {fqn: value for fqn, (_, value) in self.objects.items()}

    def plan(self, number: int, total: int) -> SavePlan:
        """The same as a plan of one of so many parts. All parts are read together, so each is completed by the others."""
        items = tuple(WriteItem(spec, spec.fqn) for spec, _ in self.tensors.values())
        objects = tuple(spec for spec, _ in self.objects.values())
        others = tuple(other for other in range(total) if other != number)
        return SavePlan(number, total, items, objects, others)


def files_needed(plan: TorchPlan) -> int:
    """How many data files a rank's plan takes: a safetensors file has room for one tensor of a name."""
    counts: dict[str, int] = {}
    for item in plan.items:
        counts[item.index.fqn] = counts.get(item.index.fqn, 0) + 1
    return max(counts.values(), default=1)


def resolve(plan: TorchPlan, planner: SavePlanner) -> list[ShardFile]:
    """Asks the planner for all that its plan names.

    Nothing is copied that lies contiguous in host memory; what lies on a device or strided comes through a copy.

    Args:
        plan: of this rank.
        planner: who made it.

    Returns:
        At least one; the first is enough unless a name occurs more than once.

    Raises:
        UnsupportedType: something cannot be stored; the message names it by its key.
        InvalidArgument: what the planner gives is not what it planned.
    """
    files = [ShardFile()]
    order = {fqn: place for place, fqn in enumerate(mapping_of(plan.planner_data))}
    for place, item in enumerate(plan.items):
        fqn = item.index.fqn
        file = next((file for file in files if not file.holds(fqn)), None)
        if file is None:
            files.append(file := ShardFile())
        spec = ObjectSpec(fqn, path_of(plan.planner_data, fqn), order.get(fqn, len(order) + place))
        data = planner.resolve_data(item)
        if item.type == WriteItemType.BYTE_IO:
            _add_bytes(file, spec, data)
        else:
            file.tensors[fqn] = _tensor(spec, item, data)
    return files


def _add_bytes(file: ShardFile, spec: ObjectSpec, data: object) -> None:
    if not isinstance(data, io.BytesIO):
        raise InvalidArgument(
            f"{spec.fqn}: the planner gave a {type(data).__qualname__} where it planned bytes; its resolve_data has to "
            f"give an io.BytesIO"
        )
    raw = data.getvalue()
    value, kept = encode_payload(raw, spec.fqn)
    if kept is None:
        file.objects[spec.fqn] = spec, value
        return
    shape = (len(kept),)
    whole = TensorSpec(spec.fqn, spec.path, spec.index, "uint8", shape, (0,), shape, is_bytes=True)
    file.tensors[spec.fqn] = whole, tensor_of(kept)


def _tensor(spec: ObjectSpec, item: TorchItem, data: object) -> tuple[TensorSpec, torch.Tensor]:
    planned = item.tensor_data
    if not isinstance(data, torch.Tensor) or planned is None:
        raise InvalidArgument(
            f"{spec.fqn}: the planner gave a {type(data).__qualname__} where it planned a tensor"
        )
    tensor = local_tensor(data, spec.fqn).to("cpu").contiguous()
    shape, offsets = tuple(planned.chunk.sizes), tuple(planned.chunk.offsets)
    if tuple(tensor.shape) != shape:
        raise InvalidArgument(
            f"{spec.fqn}: the planner planned a shard of shape {list(shape)} and gave one of {list(tensor.shape)}"
        )
    whole = tuple(planned.size)
    return TensorSpec(spec.fqn, spec.path, spec.index, dtype_name(tensor), whole, offsets, shape), tensor
