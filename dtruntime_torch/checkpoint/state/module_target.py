"""A checkpoint into a module, by `load_state_dict`, so that hooks and extra states are honoured."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence

import torch

from dtruntime_torch.checkpoint.format.records import ObjectEntry
from dtruntime_torch.checkpoint.loading.load_plan import lies_in
from dtruntime_torch.checkpoint.objects import decode
from dtruntime_torch.checkpoint.state.local_shard import BoxFinder, dtype_name, is_dtensor, local_tensor
from dtruntime_torch.checkpoint.state.nest import SavedLeaf
from dtruntime_torch.checkpoint.state.stateful import Survey
from dtruntime_torch.checkpoint.state.traverse import Node, nodes_below
from dtruntime_torch.checkpoint.state.wanted import (
    Below,
    Loaded,
    Request,
    describe,
    divide,
    fill_tensor,
    homes_of,
    missing,
    nested_copies,
)
from dtruntime_torch.checkpoint.state.wrappers import Wrapping, is_wrapper, mismatch

_EXTRA_STATE = "_extra_state"


def module_request(
    node: Node,
    survey: Survey,
    leaves: Sequence[SavedLeaf],
    boxes: BoxFinder,
    keys: Collection[str] | None = None,
) -> Request:
    """Asks for all that a module's state has, and compares names, shapes and dtypes.

    Args:
        node: where the module lies.
        survey: knows its state.
        leaves: what the checkpoint holds under the module's name.
        boxes: finds the shards of DTensors.
        keys: only what lies in these is asked for and filled; None for all.
    """
    state = survey.module_states[node.fqn]
    entries = {key: entry for key, entry in survey.entries_of(node) if lies_in(entry.fqn, keys)}
    divided, others = divide(leaves, {entry.fqn for entry in entries.values()})
    request = Request(unexpected=[leaf.fqn for leaf in others])
    requests = {
        key: _entry_request(key, entry, divided.get(entry.fqn), boxes) for key, entry in entries.items()
    }
    for entry_request in requests.values():
        request.include(entry_request)

    def fill(loaded: Loaded) -> None:
        new = OrderedDict(
            (key, _loaded_entry(key, entry, divided[entry.fqn], requests[key], loaded))
            for key, entry in entries.items()
            if entry.fqn in divided
        )
        # The versions of the modules that `load_state_dict` may look at.
        new._metadata = getattr(state, "_metadata", None)  # type: ignore[attr-defined]
        node.value.load_state_dict(new, strict=len(new) == len(state))

    request.fill = fill
    request.homes = lambda: homes_of(requests.values())
    return request


def tensor_request(node: Node, below: Below, boxes: BoxFinder) -> Request:
    """Asks for one tensor, of a DTensor for this rank's shard, and fills it in place."""
    tensor, leaf = node.value, below.leaves[0]
    local = local_tensor(tensor, node.fqn)
    if any(stride == 0 and size > 1 for size, stride in zip(local.shape, local.stride(), strict=True)):
        return Request(differences=[f"{node.fqn}: an expanded tensor, in whose place no values fit"])
    here = describe(tuple(tensor.shape), dtype_name(tensor))
    if isinstance(leaf, ObjectEntry) or leaf.is_bytes or len(leaf.path) > below.depth:
        return Request(differences=[f"{node.fqn}: checkpoint no tensor, state {here}"])
    there = describe(leaf.global_shape, leaf.dtype)
    if there != here:
        return Request(differences=[f"{node.fqn}: checkpoint {there}, state {here}"])
    request = Request(
        homes=lambda: {leaf.fqn: tensor}, fill=lambda loaded: fill_tensor(tensor, loaded.tensors[leaf.fqn])
    )
    request.want(leaf, boxes.find(tensor, node.fqn))
    return request


def wrapping_request(node: Node, below: Below) -> Request:
    """Compares what makes a wrapper, beside the tensors in it, with what was saved of one."""
    leaf = below.leaves[0]
    saved = decode(leaf.value, leaf.fqn) if isinstance(leaf, ObjectEntry) else None
    where = node.fqn.rpartition(".")[0]
    if not isinstance(saved, Wrapping):
        return Request(differences=[f"{where}: checkpoint no wrapper, state a {node.value.kind}"])
    differs = mismatch(saved, node.value)
    return Request() if differs is None else Request(differences=[f"{where}: {differs}"])


def _wrapper_request(entry: Node, below: Below, boxes: BoxFinder) -> Request:
    """Asks for what is in a wrapper, and fills it there."""
    parts = {part.fqn: part for part in nodes_below(entry, entry.value)}
    divided, others = divide(below.leaves, parts)
    total = Request(unexpected=[leaf.fqn for leaf in others])
    requests = [_part_request(part, divided.get(fqn), boxes) for fqn, part in parts.items()]
    for request in requests:
        total.include(request)

    def fill(loaded: Loaded) -> None:
        for request in requests:
            request.fill(loaded)

    total.fill = fill
    total.homes = lambda: homes_of(requests)
    return total


def _part_request(part: Node, below: Below | None, boxes: BoxFinder) -> Request:
    if below is None:
        return missing(part.fqn, per_rank=False)
    if isinstance(part.value, Wrapping):
        return wrapping_request(part, below)
    return tensor_request(part, below, boxes)


def _entry_request(key: str, entry: Node, below: Below | None, boxes: BoxFinder) -> Request:
    if below is None:
        return missing(entry.fqn, per_rank=False)
    if _is_parameter_or_buffer(key, entry):
        request_for = _wrapper_request if is_wrapper(entry.value) else tensor_request
        return request_for(entry, below, boxes)
    request = Request()
    for leaf in below.leaves:
        request.want(leaf)
    return request


def _loaded_entry(key: str, entry: Node, below: Below, request: Request, loaded: Loaded) -> object:
    if not _is_parameter_or_buffer(key, entry):
        return nested_copies(below, loaded, {})
    if is_wrapper(entry.value):
        request.fill(loaded)
        return entry.value
    data = loaded.tensors[below.leaves[0].fqn]
    if not is_dtensor(entry.value) and entry.value.device.type != "cpu":
        return data
    # Made a DTensor on its way, a second copy of the shard would lie on the device. Filled where it is, what
    # `load_state_dict` copies is the parameter itself, which torch notices. On the host that is the quicker way, too.
    fill_tensor(entry.value, data)
    return entry.value


def _is_parameter_or_buffer(key: str, entry: Node) -> bool:
    return isinstance(entry.value, torch.Tensor) and key.rpartition(".")[2] != _EXTRA_STATE
