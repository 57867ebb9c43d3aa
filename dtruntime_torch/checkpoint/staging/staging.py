"""The staging of a save: its memory, and the step in which header and tensors become the image of the data file."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch

from dtruntime_torch import _C
from dtruntime_torch.checkpoint.saving.handle import SaveMetrics
from dtruntime_torch.checkpoint.saving.layout import Layout
from dtruntime_torch.checkpoint.staging.capture import Capture, Late, Patience
from dtruntime_torch.checkpoint.staging.lateness import Lateness
from dtruntime_torch.checkpoint.staging.stager import Stager

logger = logging.getLogger(__name__)


def make_room(arena: _C.Arena, nbytes: int) -> _C.Arena:
    """Gives an arena of that size whose pages are there already: `arena` itself if nobody looks into it any more.

    It is not there in forked children. In a process that uses CUDA it is pinned; where that is refused, copies
    from a device stall training, and a warning says why, once.

    Raises:
        MemoryError: the system refuses.

    Example:
        >>> make_room(_C.Arena(0), 10_000).nbytes
        10000
    """
    # Pinning makes a context on a device, hundreds of megabytes there: not in a process that uses none.
    pin = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    refused = arena.pin_refusal is not None
    as_asked = arena.nbytes > 0 and pin == (arena.pinned or refused)
    if not (as_asked and _resize(arena, nbytes)):
        arena = _C.Arena(nbytes, pin=pin, dont_fork=True)
    if arena.pin_refusal is not None and not refused:
        logger.warning(
            "staging memory is not pinned, so copies from a device will stall training: %s", arena.pin_refusal
        )
    arena.populate()
    return arena


def _resize(arena: _C.Arena, nbytes: int) -> bool:
    """Says whether it could be done. If not, the arena is as it was, and lives as long as somebody has it."""
    try:
        arena.resize(nbytes)
    except BufferError:
        # The traceback of a failed save may still look at it.
        return False
    except RuntimeError as error:
        logger.warning("new staging memory is made, for the old is stuck: %s", error)
        return False
    return True


def begin(
    stager: Stager,
    layout: Layout,
    tensors: Mapping[str, torch.Tensor],
    lateness: Lateness | None,
    patience: Patience,
    metrics: SaveMetrics,
    only_changed: bool = False,
) -> Capture:
    """Begins to make the stager's arena the image of a data file.

    The tensors may change when the capture says so. After an error, here or there, the arena may be used again, and
    the next staging copies all.

    Args:
        stager: its arena holds at least `layout.length` bytes.
        layout: where each tensor goes.
        tensors: fqn -> this rank's shard, on any device, of any stride.
        lateness: tells which of the tensors may still be read when this has returned; None: nothing is late.
        patience: how these are treated.
        metrics: told what it cost.
        only_changed: leaves the chunks alone that the arena holds since the staging before, if it was of this
            layout and ended well.

    Raises:
        SaveFailed: a device refused a copy; it names the tensor.
    """
    names = [slot.item.spec.fqn for slot in layout.slots]
    sources = [tensors[name] for name in names]
    late = Late() if lateness is None else lateness.choose_late(sources)
    pairs = list(zip(sources, [slot.offset for slot in layout.slots], strict=True))
    staging = stager.start(pairs, only_changed, names, late.numbers)
    try:
        memoryview(stager.arena)[: len(layout.header)] = layout.header
        capture = Capture(staging, sources, names, late, patience, stager.chunk_bytes, metrics)
    except BaseException:
        staging.cancel()
        raise
    try:
        capture.stand_at_the_door()
    except BaseException:
        capture.cancel()
        raise
    return capture
