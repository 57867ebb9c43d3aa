"""Whose fault it is when a recursion ends: that of what is nested too deep, or that of a caller who left it no room."""

from __future__ import annotations

import sys
import traceback


def blame_deep_caller(error: Exception, what: str) -> None:
    """Returns if an error tells of what was decoded, and not of how deep the caller is.

    What is sound nests in a few hundred frames at most: a caller who has used less than half of the stack left enough.

    Args:
        error: why something was refused.
        what: it is that was refused, for the error.

    Raises:
        RecursionError: a recursion ended, and that may be the caller's fault.
    """
    used, limit = sum(1 for _ in traceback.walk_stack(None)), sys.getrecursionlimit()
    if isinstance(error.__context__, RecursionError) and used > limit // 2:
        raise RecursionError(
            f"{what} could not be decoded: the stack has room for {limit} frames, and {used} of them were in use; call it from less deep, "
            f"or raise the limit by sys.setrecursionlimit"
        ) from error
