"""The staging of a save: its memory, and the step in which header and tensors become the image of the data file."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch

from dtruntime_torch import _C
from dtruntime_torch.checkpoint.saving.layout import Layout
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


def stage(
    stager: Stager,
    layout: Layout,
    tensors: Mapping[str, torch.Tensor],
    timeout: float | None = None,
    only_changed: bool = False,
) -> bytes:
    """Makes the stager's arena the image of a data file.

    Returns when every byte is in the arena: the tensors may change from then on. After an error the arena may be
    used again, and the next staging copies all. `stager.last` says how much was copied.

    Args:
        stager: its arena holds at least `layout.length` bytes.
        layout: where each tensor goes.
        tensors: fqn -> this rank's shard, on any device, of any stride.
        timeout: seconds to wait; None waits as long as it takes.
        only_changed: leaves the chunks alone that the arena holds since the staging before, if it was of this
            layout and ended well.

    Returns:
        The XXH3-128 digests of all chunks, in the order of `layout.slots`, 16 bytes each.

    Raises:
        BarrierTimeout: not all bytes are there yet.
        SaveFailed: a device failed, or what arrived from it is not what it sent; it names the tensors.
    """
    pairs = [(tensors[slot.item.spec.fqn], slot.offset) for slot in layout.slots]
    staging = stager.start(pairs, only_changed, [slot.item.spec.fqn for slot in layout.slots])
    try:
        memoryview(stager.arena)[: len(layout.header)] = layout.header
        return staging.wait(timeout)
    except BaseException:
        staging.cancel(timeout)
        raise
