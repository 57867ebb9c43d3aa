"""Tensors of a state that share some memory, as views of one buffer do: may they be filled one after the other?

They may if nothing that one writes changes what another got: views that lie between each other, or overlap where the
checkpoint has the same values. It is tried out on memory of our own, which is as large as what the views span.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch

from dtruntime_torch.checkpoint.state.local_shard import memory_of
from dtruntime_torch.errors import InvalidArgument

_ALIGNMENT = 16


class Fill(NamedTuple):
    """A tensor that is to be filled in place: its name, and the memory on this rank."""

    fqn: str
    target: torch.Tensor


class _Placed(NamedTuple):
    start: int
    stop: int
    fill: Fill


def check_fills(fills: Iterable[Fill], tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuses tensors that share memory and differ there.

    Args:
        fills: what is to be filled.
        tensors: fqn -> what comes there; asked for only where memory is shared, for it may have to be put together.

    Raises:
        InvalidArgument: naming two of them; nothing was changed.
    """
    first_at: dict[Hashable, Fill] = {}
    by_device: dict[torch.device, list[_Placed]] = {}
    for fill in fills:
        if fill.target.numel():
            first = first_at.setdefault(memory_of(fill.target), fill)
            if first is fill:
                by_device.setdefault(fill.target.device, []).append(_place(fill))
            elif first.fqn != fill.fqn and not _same_bits(tensors[first.fqn], tensors[fill.fqn]):
                raise InvalidArgument(
                    f"{first.fqn} and {fill.fqn} are one tensor in the state and two different ones in the "
                    f"checkpoint; untie them before you load"
                )
    for placed in by_device.values():
        for cluster in _clusters(sorted(placed, key=lambda one: one.start)):
            _try_out(cluster, tensors)


def shared_names(fills: Iterable[Fill]) -> set[str]:
    """Names of tensors that share memory with one of another name, or reach into each other's."""
    by_device: dict[torch.device, list[_Placed]] = {}
    for fill in fills:
        if fill.target.numel():
            by_device.setdefault(fill.target.device, []).append(_place(fill))
    clusters = (
        cluster
        for placed in by_device.values()
        for cluster in _clusters(sorted(placed, key=lambda one: one.start))
    )
    names = [{one.fill.fqn for one in cluster} for cluster in clusters]
    return {name for of_cluster in names if len(of_cluster) > 1 for name in of_cluster}


def _place(fill: Fill) -> _Placed:
    target = fill.target
    reach = sum((size - 1) * stride for size, stride in zip(target.shape, target.stride(), strict=True))
    return _Placed(target.data_ptr(), target.data_ptr() + (reach + 1) * target.element_size(), fill)


def _clusters(placed: Sequence[_Placed]) -> list[list[_Placed]]:
    """Those that reach into each other, or into themselves, in ascending order of where they begin."""
    clusters: list[list[_Placed]] = []
    stop = 0
    for one in placed:
        if one.start < stop:
            clusters[-1].append(one)
        else:
            clusters.append([one])
        stop = max(stop, one.stop)
    return [
        cluster for cluster in clusters if len(cluster) > 1 or _may_overlap_itself(cluster[0].fill.target)
    ]


def _may_overlap_itself(tensor: torch.Tensor) -> bool:
    """Whether two of its elements may be one place in memory, as in sliding windows; never of a contiguous one."""
    stop = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride < stop:
            return True
        stop += (size - 1) * stride
    return False


def _try_out(cluster: Sequence[_Placed], tensors: Mapping[str, torch.Tensor]) -> None:
    base = cluster[0].start - cluster[0].start % _ALIGNMENT
    memory = torch.empty(max(one.stop for one in cluster) - base, dtype=torch.uint8)
    views = [_view(memory, one, base) for one in cluster]
    with torch.no_grad():
        for view, one in zip(views, cluster, strict=True):
            view.copy_(tensors[one.fill.fqn])
    for view, one in zip(views, cluster, strict=True):
        if not _same_bits(view, tensors[one.fill.fqn]):
            others = [other.fill.fqn for other in cluster if other is not one and _meet(one, other)] or [
                "itself"
            ]
            raise InvalidArgument(
                f"{one.fill.fqn} shares memory with {', '.join(others[:3])} in the state, and the checkpoint has other "
                f"values for them there; give them memory of their own before you load"
            )


def _view(memory: torch.Tensor, one: _Placed, base: int) -> torch.Tensor:
    target = one.fill.target
    view = torch.empty(0, dtype=target.dtype).set_(
        memory.untyped_storage(), (one.start - base) // target.element_size(), target.shape, target.stride()
    )
    view = view.conj() if target.is_conj() else view
    return torch._neg_view(view) if target.is_neg() else view


def _meet(one: _Placed, other: _Placed) -> bool:
    return one.start < other.stop and other.start < one.stop


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one is other:
        return True
    plain = (tensor.detach().resolve_conj().resolve_neg().contiguous() for tensor in (one, other))
    return torch.equal(*(tensor.reshape(-1).view(torch.uint8) for tensor in plain))
