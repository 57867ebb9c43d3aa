"""What of a tensor lies on this rank: torch's tensor types on one side, a box of plain numbers on the other."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]  # not in its __all__

from dtruntime_torch.checkpoint import dtypes
from dtruntime_torch.checkpoint.specs import MAX_DIMENSIONS, Shape
from dtruntime_torch.errors import InvalidArgument, UnsupportedType

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement

    Placements = tuple[Placement, ...]


PLAIN_TENSORS = frozenset({torch.Tensor, torch.nn.Parameter})
"""Classes of tensors that are nothing else: a subclass may be anything."""

_NAMES = {getattr(torch, name): name for name in dtypes.NAMES if hasattr(torch, name)}
_STRIDED = torch.strided
# Of those only a complex one may be conjugated.
_REAL = frozenset(dtype for dtype in _NAMES if not dtype.is_complex)


class Box(NamedTuple):
    """Where a rank's shard lies in the whole tensor.

    Attributes:
        offsets: where it starts.
        shape: its own shape.
        layout: mesh and placements, alike on all ranks of the mesh; "" for a plain tensor.
        holders: the ranks that hold the same shard, ascending; None for a plain tensor.
        first_holders: the ranks that hold the shard with the tensor's first element, ascending; none for a plain tensor.
    """

    offsets: Shape
    shape: Shape
    layout: str
    holders: tuple[int, ...] | None
    first_holders: tuple[int, ...] = ()


class BoxFinder:
    """Finds boxes, each kind of sharding once: a model has many tensors of few kinds."""

    def __init__(self) -> None:
        self._whole: dict[Shape, Box] = {}
        # By the id of the mesh, which is not kept alive: it holds a tensor.
        self._found: dict[int, tuple[weakref.ref[DeviceMesh], dict[Hashable, Box]]] = {}

    def find(self, tensor: torch.Tensor, where: str) -> Box:
        """The box of a tensor on this rank.

        Args:
            tensor: plain, or a DTensor.
            where: its name, for the error.

        Raises:
            UnsupportedType: it is a DTensor whose shard is no box, or that is not there yet (Partial).
        """
        if not is_dtensor(tensor):
            return self.whole(tensor.shape)
        return self.of_shard(tensor, local_part(tensor).shape, where)

    def of_shard(self, tensor: DTensor, local_shape: Shape, where: str) -> Box:
        """The box of a DTensor whose local shard has that shape; raises as `find` does."""
        shape = tensor.shape
        mesh, placements = tensor.device_mesh, tensor.placements
        found = self._on_mesh(mesh)
        box = found.get((shape, placements))
        if box is None:
            box = found[shape, placements] = _find_box(tuple(shape), mesh, placements, where)
        if local_shape != box.shape:
            raise UnsupportedType(
                f"{where}: the local shard has shape {list(local_shape)}, and the placements "
                f"{placements} of a tensor of shape {list(shape)} give {list(box.shape)}"
            )
        return box

    def whole(self, shape: Shape) -> Box:
        """The box of a plain tensor."""
        box = self._whole.get(shape)
        if box is None:
            box = self._whole[shape] = Box((0,) * len(shape), tuple(shape), "", None)
        return box

    def _on_mesh(self, mesh: DeviceMesh) -> dict[Hashable, Box]:
        known = self._found.get(id(mesh))
        if known is None or known[0]() is not mesh:
            known = self._found[id(mesh)] = (weakref.ref(mesh), {})
        return known[1]


def is_dtensor(value: object) -> TypeGuard[DTensor]:
    """Whether the value is a DTensor, told without importing what only who has one needs."""
    if type(value) in PLAIN_TENSORS:
        return False
    kind = dtensor_class()
    return kind is not None and isinstance(value, kind)


def dtensor_class() -> type[DTensor] | None:
    """The class of DTensors; None where nobody has imported it, so that there are none."""
    module = sys.modules.get("torch.distributed.tensor")
    return None if module is None else module.DTensor


def local_tensor(tensor: torch.Tensor, where: str) -> torch.Tensor:
    """The data of a tensor on this rank: detached, of any stride, sharing memory where that is possible.

    Raises:
        UnsupportedType: it has no data that could be stored as it is; the message says what to do.
    """
    local = local_part(tensor)
    if is_common(local) and tensor.dtype is local.dtype:
        return local.detach()
    check_dtype(tensor, where)
    if local is not tensor and hasattr(type(local), "__tensor_flatten__"):
        raise UnsupportedType(
            f"{where}: the shards of this DTensor are {type(local).__qualname__}s, which wrap other tensors; how those "
            f"are cut only that class knows, so store what it wraps by yourself, as DTensors"
        )
    check_plain(local, where)
    if local.dim() > MAX_DIMENSIONS:
        raise UnsupportedType(
            f"{where}: a tensor of {local.dim()} dimensions cannot be stored, which takes at most {MAX_DIMENSIONS}; "
            f"reshape it first"
        )
    return local.detach().resolve_conj().resolve_neg()


def is_common(tensor: Any) -> TypeGuard[torch.Tensor]:
    """Whether it is a tensor that surely passes all checks, and its bytes are those of its elements."""
    return (
        type(tensor) in PLAIN_TENSORS
        and tensor.dtype in _REAL
        and tensor.layout is _STRIDED
        and not tensor.is_nested
        and not tensor.is_meta
        and tensor.is_contiguous()
        and not tensor.is_neg()
        and tensor.nbytes + tensor.storage_offset() * tensor.itemsize <= tensor.untyped_storage().nbytes()
        and tensor.dim() <= MAX_DIMENSIONS
    )


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """A DTensor's local shard, or the tensor itself."""
    if not is_dtensor(tensor):
        return tensor
    # What `to_local` returns where no gradient is recorded; to turn that off and on would cost more than all the rest.
    local: torch.Tensor = tensor._local_tensor
    # The result of a collective that may still be under way.
    return local.wait() if hasattr(local, "wait") else local


def memory_of(tensor: torch.Tensor) -> Hashable:
    """Equal for tensors that read the same memory alike."""
    bits = (tensor.is_conj(), tensor.is_neg())
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device, bits


def check_dtype(tensor: torch.Tensor, where: str) -> None:
    """Refuses a dtype that cannot be stored.

    Raises:
        UnsupportedType: says how to store such a tensor.
    """
    if tensor.is_quantized:
        raise UnsupportedType(
            f"{where}: a quantized tensor cannot be stored; store tensor.int_repr() with its scale and zero point, "
            f"or tensor.dequantize()"
        )
    if not dtypes.is_known(dtype_name(tensor)):
        raise UnsupportedType(
            f"{where}: a tensor of {tensor.dtype} cannot be stored; store tensor.view(torch.uint8) instead"
        )


def dtype_name(tensor: torch.Tensor) -> str:
    """A tensor's dtype as specs name it: "bfloat16"."""
    return _NAMES.get(tensor.dtype) or str(tensor.dtype).removeprefix("torch.")


def check_plain(tensor: torch.Tensor, where: str) -> None:
    """Refuses what is no strided tensor with data of its own.

    Raises:
        UnsupportedType: says what to store instead.
    """
    if isinstance(tensor, UninitializedTensorMixin):
        raise UnsupportedType(f"{where}: a lazy parameter has no shape yet; run a forward pass first")
    if tensor.is_meta:
        raise UnsupportedType(
            f"{where}: a meta tensor has no data; give its module memory first (module.to_empty(device=...))"
        )
    if tensor.is_nested:
        raise UnsupportedType(f"{where}: a nested tensor cannot be stored; store its values and offsets")
    if tensor.layout is not torch.strided:
        raise UnsupportedType(
            f"{where}: a tensor of layout {tensor.layout} cannot be stored; store tensor.to_dense(), or its "
            f"indices and values"
        )
    if type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__:
        return _check_memory(tensor, where)
    if _is_sharded_tensor(tensor):
        raise UnsupportedType(
            f"{where}: FSDP1's ShardedTensor cannot be stored; shard the model with "
            f"torch.distributed.fsdp.fully_shard (FSDP2) instead"
        )
    raise UnsupportedType(
        f"{where}: a {type(tensor).__qualname__} is a wrapper around other tensors and cannot be stored as one; "
        f"store those"
    )


def check_class(tensor: torch.Tensor, where: str) -> None:
    """Refuses a class of tensors that a load which makes new ones could not give back.

    What is stored is dtype, shape and elements: a Parameter and a DTensor come back as tensors.

    Raises:
        UnsupportedType: says what to store instead.
    """
    kind = type(tensor)
    if kind not in PLAIN_TENSORS and not is_dtensor(tensor):
        raise UnsupportedType(
            f"{where}: a {kind.__module__}.{kind.__qualname__} would come back as a plain tensor; store "
            f"tensor.as_subclass(torch.Tensor), which may be loaded into such a one, or the module that holds it"
        )


def _is_sharded_tensor(tensor: torch.Tensor) -> bool:
    return any(c.__name__ == "ShardedTensorBase" for c in type(tensor).__mro__)


def _find_box(shape: Shape, mesh: DeviceMesh, placements: Placements, where: str) -> Box:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if any(placement.is_partial() for placement in placements):
        raise UnsupportedType(
            f"{where}: a DTensor with the placements {placements} is not summed up yet; redistribute it to "
            f"Replicate() or Shard(...) first"
        )
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise UnsupportedType(
            f"{where}: this rank is not in the DTensor's mesh {mesh}; leave the tensor out of its state"
        )
    _check_is_box(shape, mesh, placements, coordinate, where)
    local_shape, offsets = compute_local_shape_and_global_offset(shape, mesh, placements)
    holders = _holders_at(coordinate, mesh, placements)
    first_holders = _holders_at([0] * len(placements), mesh, placements)
    layout = f"mesh {mesh.mesh.tolist()}: {', '.join(map(repr, placements))}"
    return Box(tuple(offsets), tuple(local_shape), layout, holders, first_holders)


def _holders_at(coordinate: Sequence[int], mesh: DeviceMesh, placements: Placements) -> tuple[int, ...]:
    """The ranks that hold the shard which lies at a place of the mesh."""
    pairs = zip(coordinate, placements, strict=True)
    replicas = tuple(slice(None) if placement.is_replicate() else at for at, placement in pairs)
    return tuple(sorted(mesh.mesh[replicas].flatten().tolist()))


def _check_is_box(
    shape: Shape, mesh: DeviceMesh, placements: Placements, coordinate: Sequence[int], where: str
) -> None:
    """Refuses a shard whose rows do not lie side by side in the whole tensor; torch gives such a one an offset."""
    if all(placement.is_replicate() or placement.is_shard() for placement in placements):
        return
    rows: dict[int, torch.Tensor] = {}
    for size, placement, at in zip(mesh.shape, placements, coordinate, strict=True):
        if not placement.is_replicate():
            dim = placement.dim  # type: ignore[attr-defined]  # all but Replicate and Partial have one
            kept = rows.get(dim, torch.arange(shape[dim])).view(*[1] * dim, -1)
            pieces, _ = placement._split_tensor(  # type: ignore[attr-defined]
                kept, size, with_padding=False, contiguous=False
            )
            rows[dim] = pieces[at].flatten()
    for kept in rows.values():
        if len(kept) and not torch.equal(kept, torch.arange(int(kept[0]), int(kept[0]) + len(kept))):
            raise UnsupportedType(
                f"{where}: with the placements {placements} the shard of a rank is no box of the whole tensor; "
                f"redistribute it to Shard(...) first"
            )


def require_member(box: Box, rank: int, where: str) -> None:
    """Refuses a DTensor whose mesh counts ranks otherwise than the process group that saves.

    Raises:
        InvalidArgument: the rank is not among the holders of its own shard.
    """
    if box.holders is not None and rank not in box.holders:
        raise InvalidArgument(
            f"{where}: by its mesh the shard lies on ranks {list(box.holders)}, but this is rank {rank} of those "
            f"that save; save with the process group whose ranks the mesh was made of"
        )


def _check_memory(tensor: torch.Tensor, where: str) -> None:
    """Refuses a tensor that reaches beyond its storage, as one does whose memory was given back by `resize_`."""
    if tensor.numel() == 0:
        return
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    needed = (tensor.storage_offset() + reach + 1) * tensor.element_size()
    there = tensor.untyped_storage().nbytes()
    if there < needed:
        raise UnsupportedType(
            f"{where}: the tensor needs {needed} bytes and its storage has {there}: its memory was given back "
            f"(offloaded?); bring it back first"
        )
