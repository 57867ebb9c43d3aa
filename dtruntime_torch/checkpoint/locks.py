"""A lock that is held for the length of a block, with a time-out, and given back however the block ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def held(lock: threading.RLock, timeout: float | None) -> Iterator[bool]:
    """Takes a lock for a block.

    Args:
        lock: its own thread may take it again.
        timeout: seconds to wait for it; None waits as long as it takes.

    Returns:
        Whether it was taken; if not, another thread has it.

    Example:
        >>> with held(threading.RLock(), timeout=1.0) as taken:
        ...     taken
        True
    """
    try:
        yield lock.acquire(timeout=-1 if timeout is None else max(0.0, timeout))
    finally:
        # A signal may come when it is taken already and nothing yet says so; to give back what this thread does not
        # have is refused.
        with suppress(RuntimeError):
            lock.release()
