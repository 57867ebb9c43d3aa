"""How the saves of one manager keep a snapshot whole: what they may read late, and when nothing may be late."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Sequence

import torch

from dtruntime_torch.checkpoint.door import DOOR, OwnedMemory
from dtruntime_torch.checkpoint.saving.policies import Consistency
from dtruntime_torch.checkpoint.staging.capture import Late, choose_late
from dtruntime_torch.errors import InvalidArgument


class Lateness:
    """Decides what may be late.

    Args:
        mode: "optimizer": what optimizers own that come by the door, and what was deferred; "immediate": nothing.
    """

    def __init__(self, mode: Consistency) -> None:
        self._mode = mode
        self._deferred: list[weakref.ref[torch.Tensor]] = []
        self._lost = ""
        self._warned = False
        if mode == "optimizer":
            DOOR.stand()

    def trust(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Takes these for optimizers that come by the door, before they have done so.

        Raises:
            InvalidArgument: one is no optimizer.
        """
        for one in optimizers:
            if not isinstance(one, torch.optim.Optimizer):
                raise InvalidArgument(
                    f"only the steps of a torch.optim.Optimizer can wait, and this is a {type(one).__qualname__}"
                )
        if self._mode == "optimizer":
            DOOR.trust(optimizers)

    def defer(self, tensors: Iterable[torch.Tensor]) -> None:
        """Lets these be late, as long as they live.

        Raises:
            InvalidArgument: one is no tensor.
        """
        named = list(tensors)
        for one in named:
            if not isinstance(one, torch.Tensor):
                raise InvalidArgument(f"only tensors can be deferred, and this is a {type(one).__qualname__}")
        kept = {id(tensor): tensor for tensor in (*self._still_there(), *named)}
        self._deferred = [weakref.ref(tensor) for tensor in kept.values()]

    def give_up(self, why: str) -> None:
        """From now on nothing is late, for something changes memory unasked."""
        self._lost = self._lost or why

    def is_immediate(self) -> bool:
        """Whether nothing may be late; warns once if that was not the user's choice."""
        if self._mode == "immediate":
            return True
        if DOOR.bypassed:
            self.give_up("a CUDA graph holds the step of an optimizer, and its replay asks nobody")
        if self._lost and not self._warned:
            self._warned = True
            warnings.warn(
                f"saves now wait until all is staged, as with consistency='immediate': {self._lost}",
                RuntimeWarning,
                stacklevel=6,
            )
        return bool(self._lost)

    def choose_late(self, tensors: Sequence[torch.Tensor]) -> Late:
        """As `capture.choose_late`, of the optimizers that there are now."""
        deferred = OwnedMemory()
        for tensor in self._still_there():
            deferred.add(tensor)
        deferred.leave_out(DOOR.changing())
        return choose_late(tensors, DOOR.owned(), deferred)

    def _still_there(self) -> list[torch.Tensor]:
        return [there for one in self._deferred if (there := one()) is not None]
