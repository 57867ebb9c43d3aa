"""A checkpoint back into the objects of a state: first what is wanted of it and what differs, then filling in place.

Nothing is touched before `apply`, so that a checkpoint that does not fit changes nothing; but for what the reader puts
straight into `homes`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

import torch

from dtruntime_torch.checkpoint.loading.load_plan import SavedState, lies_in, select
from dtruntime_torch.checkpoint.state.local_shard import BoxFinder, local_part
from dtruntime_torch.checkpoint.state.module_target import module_request, tensor_request, wrapping_request
from dtruntime_torch.checkpoint.state.nest import build_state, leaves_of
from dtruntime_torch.checkpoint.state.optimizer_target import optimizer_request
from dtruntime_torch.checkpoint.state.overlaps import Fill, check_fills, shared_names
from dtruntime_torch.checkpoint.state.stateful import Survey
from dtruntime_torch.checkpoint.state.traverse import Node, is_stateful, name_clash, nodes_below
from dtruntime_torch.checkpoint.state.wanted import (
    Below,
    Loaded,
    Request,
    Wanted,
    divide,
    homes_of,
    missing,
    needed_box,
    nested_copies,
)
from dtruntime_torch.checkpoint.state.wrappers import Wrapping
from dtruntime_torch.errors import InvalidArgument

__all__ = ["Targets", "Wanted", "bind_targets", "build_state"]


def bind_targets(state: object) -> Targets:
    """Finds what a load into `state` can fill.

    Args:
        state: as for `flatten_state`, but no bytes.

    Raises:
        InvalidArgument, UnsupportedType: as `flatten_state` raises them.
    """
    if isinstance(state, bytes):
        raise InvalidArgument("bytes cannot be filled in place; use load_checkpoint")
    return Targets(Survey(state))


class Targets:
    """The places of a state, by name.

    `want` may be asked about one checkpoint after the other; `apply` fills from the last one.

    Args:
        survey: of the state.
    """

    def __init__(self, survey: Survey) -> None:
        self._survey = survey
        self._nodes: dict[str, Node] = {}
        for node in survey.nodes:
            if self._nodes.setdefault(node.fqn, node) is not node:
                raise name_clash(node.fqn, self._nodes[node.fqn].path, node.path)
        self._requests: list[tuple[Node, Request]] = []
        # Each thread has its own mode, and this is the one that will fill.
        self._in_inference = torch.is_inference_mode_enabled()

    def want(self, saved: SavedState, keys: Collection[str] | None = None) -> Wanted:
        """Compares the state with a checkpoint and says what is needed of that; nothing is changed.

        Names, shapes and dtypes of tensors must agree, in modules and in dicts. Of an optimizer the parameters
        must be those that were saved, grouped alike; its state becomes the saved one. An object, and a stateful
        one that is neither module nor optimizer, takes whatever lies under its name; if that fits, it must know.

        Args:
            saved: what the checkpoint holds.
            keys: only what lies in these is compared and wanted; None for all. Of a module that may be a part; an
                optimizer, and whatever else is filled as one, is taken whole.

        Raises:
            InvalidArgument: a key names a part of what is taken whole, or a tensor cannot be written to here.
        """
        chosen = select(saved, keys)
        divided, others = divide(leaves_of(chosen), self._nodes)
        boxes = BoxFinder()
        self._requests = [
            (node, self._ask(node, divided.get(fqn), boxes, keys))
            for fqn, node in self._nodes.items()
            if self._is_chosen(node, keys)
        ]
        total = Request(unexpected=[leaf.fqn for leaf in others])
        for _, request in self._requests:
            total.include(request)
        for key in keys or ():
            if not self._knows(key) and select(saved, (key,)) == SavedState({}, {}):
                total.differences.append(f"{key}: a key that names nothing")
        if not self._in_inference:
            filled = {spec.fqn for spec in total.tensors}
            _refuse_inference(node for node in self._tensors_filled_in_place() if node.fqn in filled)
        return Wanted(
            tuple(total.tensors),
            tuple(total.objects),
            tuple(total.differences),
            tuple(total.missing),
            tuple(total.unexpected),
        )

    def _is_chosen(self, node: Node, keys: Collection[str] | None) -> bool:
        if lies_in(node.fqn, keys):
            return True
        inside = [key for key in keys or () if lies_in(key, (node.fqn,))]
        if inside and not isinstance(node.value, torch.nn.Module):
            raise InvalidArgument(
                f"the key {inside[0]!r} names a part of {node.fqn!r} of type {type(node.value).__name__}, which is loaded "
                f"whole or not at all; give {node.fqn!r}"
            )
        return bool(inside)

    def _knows(self, key: str) -> bool:
        """Whether the state has anything that lies in a key."""
        if any(lies_in(fqn, (key,)) for fqn in self._nodes):
            return True
        modules = (node for node in self._survey.nodes if isinstance(node.value, torch.nn.Module))
        entries = (entry for node in modules for _, entry in self._survey.entries_of(node))
        return any(lies_in(entry.fqn, (key,)) for entry in entries)

    def homes(self) -> dict[str, torch.Tensor]:
        """The memory that wanted shards may be read straight into: fqn -> a contiguous tensor on the host.

        None shares memory with another tensor of the state. To be asked once after `want`, if nothing differs; of
        what an optimizer does not have yet this makes the tensors.
        """
        requests = (request for _, request in self._requests)
        homes = {fqn: local_part(home) for fqn, home in homes_of(requests).items()}
        fills = [Fill(node.fqn, local_part(node.value)) for node in self._tensors_filled_in_place()]
        shared = shared_names([*fills, *(Fill(fqn, home) for fqn, home in homes.items())])
        return {fqn: home.detach() for fqn, home in homes.items() if fqn not in shared and _is_plain(home)}

    def left_alone(self, fqns: Iterable[str]) -> list[str]:
        """Which tensors of the state `apply` would leave as they are, after the last `want`.

        What an optimizer has becomes what was saved of it, whether that has these names or not.

        Args:
            fqns: names that `homes` gave, for this checkpoint or for another.
        """
        filled = {spec.fqn for _, request in self._requests for spec in request.tensors}
        whole = [
            node.fqn
            for node, request in self._requests
            if isinstance(node.value, torch.optim.Optimizer) and request.is_filled
        ]
        return sorted(fqn for fqn in fqns if fqn not in filled and not lies_in(fqn, whole))

    def check(self, tensors: Mapping[str, torch.Tensor], values: Mapping[str, object]) -> None:
        """Finds what only shows once it was read; nothing is changed.

        Stateful objects that have `check_state_dict` are asked whether they take it, and tensors that share memory in
        the state must not differ there in the checkpoint.

        Args:
            tensors: as for `apply`, to which they may still be given.
            values: as for `apply`.

        Raises:
            InvalidArgument: two names of one tensor, or two views, have different values in the checkpoint.
            Exception: what an object raised.
        """
        loaded = Loaded(tensors, values)
        fills = (node for node in self._tensors_filled_in_place() if node.fqn in tensors)
        check_fills((Fill(node.fqn, local_part(node.value)) for node in fills), tensors)
        for _, request in self._requests:
            request.check(loaded)

    def _tensors_filled_in_place(self) -> Iterator[Node]:
        for node in self._survey.nodes:
            if isinstance(node.value, torch.nn.Module):
                for _, entry in self._survey.entries_of(node):
                    if isinstance(entry.value, torch.Tensor):
                        parts = nodes_below(entry, entry.value)
                        yield from (part for part in parts if isinstance(part.value, torch.Tensor))
            elif isinstance(node.value, torch.Tensor):
                yield node

    def apply(self, tensors: Mapping[str, torch.Tensor], values: Mapping[str, object]) -> None:
        """Fills the state from the checkpoint that `want` saw last, in which nothing may have differed.

        Modules come first, then optimizers, then the rest in the order of the state.

        Args:
            tensors: fqn -> what was wanted: on the host, contiguous, of the saved dtype. May be freed afterwards.
            values: fqn -> object.
        """
        loaded = Loaded(tensors, values)
        for _, request in sorted(self._requests, key=lambda pair: _turn(pair[0])):
            request.fill(loaded)

    def _ask(
        self, node: Node, below: Below | None, boxes: BoxFinder, keys: Collection[str] | None
    ) -> Request:
        if isinstance(node.value, torch.nn.Module) and not (below is None and node.per_rank):
            leaves = below.leaves if below is not None else []
            return module_request(node, self._survey, leaves, boxes, keys)
        if below is None:
            return missing(node.fqn, node.per_rank)
        if isinstance(node.value, torch.optim.Optimizer):
            return optimizer_request(node, self._survey.names_of(node), below, boxes)
        if is_stateful(node.value):
            return _stateful_request(node, below, boxes)
        if isinstance(node.value, torch.Tensor):
            return tensor_request(node, below, boxes)
        if isinstance(node.value, Wrapping):
            return wrapping_request(node, below)
        return _value_request(node, below)


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether its bytes lie in memory as they are stored."""
    return (
        tensor.device.type == "cpu"
        and type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.is_contiguous()
        and not (tensor.is_conj() or tensor.is_neg())
        and tensor.numel() > 0
    )


def _refuse_inference(nodes: Iterable[Node]) -> None:
    """Refuses what torch would refuse to fill, when other tensors are filled already."""
    for node in nodes:
        if local_part(node.value).is_inference():
            raise InvalidArgument(
                f"{node.fqn}: it was made under torch.inference_mode(), and outside of that it cannot be filled; make "
                f"it anew or clone it outside of inference mode, or load under torch.inference_mode()"
            )


def _turn(node: Node) -> int:
    if isinstance(node.value, torch.nn.Module):
        return 0
    return 1 if isinstance(node.value, torch.optim.Optimizer) else 2


def _value_request(node: Node, below: Below) -> Request:
    request = Request(fill=lambda loaded: node.replace(nested_copies(below, loaded, {})))
    for leaf in below.leaves:
        request.want(leaf)
    return request


def _stateful_request(node: Node, below: Below, boxes: BoxFinder) -> Request:
    current = {leaf.fqn: leaf.value for leaf in nodes_below(node, node.value.state_dict())}
    request = Request(fill=lambda loaded: node.value.load_state_dict(nested_copies(below, loaded, current)))
    if hasattr(node.value, "check_state_dict"):
        request.check = lambda loaded: node.value.check_state_dict(nested_copies(below, loaded, current))
    for leaf in below.leaves:
        request.want(leaf, needed_box(leaf, current.get(leaf.fqn), boxes))
    return request
