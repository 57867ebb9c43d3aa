"""Whose fault it is when a recursion ends: that of what is nested too deep, or that of a caller who left it no room."""

from __future__ import annotations

import sys
from types import FrameType


def raise_if_caller_is_deep(error: Exception, what: str) -> None:
    """Returns if an error tells of what was decoded, and not of how deep the caller is.

    What is sound nests in a few hundred frames at most: a caller who has used less than half of the stack left enough.

    Args:
        error: why something was refused.
        what: names what was refused.

    Raises:
        RecursionError: a recursion ended, and that may be the caller's fault.
    """
    used, limit = _depth(), sys.getrecursionlimit()
    if isinstance(error.__context__, RecursionError) and used > limit // 2:
        raise RecursionError(
            f"{what} could not be decoded: the stack has room for {limit} frames, and {used} of them were in use; call "
            f"it from a place less deep, or raise the limit by sys.setrecursionlimit"
        ) from error


def _depth() -> int:
    """How many frames are in use."""
    frame: FrameType | None = sys._getframe()
    depth = 0
    while frame is not None:
        depth, frame = depth + 1, frame.f_back
    return depth
