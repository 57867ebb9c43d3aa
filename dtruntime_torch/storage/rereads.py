"""What a device cannot read, and how often it is asked before that counts as damage.

Only EIO counts: it is what a bad sector ends in. All other failures say nothing of the bytes, and stay errors.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from typing import TypeVar

from dtruntime_torch.errors import StorageError
from dtruntime_torch.retry import RetryPolicy, retrying

R = TypeVar("R")

REREADS = RetryPolicy(attempts=4, initial=0.1, max=2.0, factor=4.0)
"""For each read: some two seconds, in which a cable or a controller may come to itself."""

UNREADABLE = "nothing: the device could not read it (EIO)"
"""What there is, as `Damage` says it."""


def is_unreadable(error: BaseException) -> bool:
    """Whether this is how a read of a bad sector ends."""
    return isinstance(error, StorageError) and error.errno == errno.EIO


async def reread(read: Callable[[], Awaitable[R]]) -> R:
    """Reads, and while the device fails again, as `REREADS` says: a passing hiccup is no damage.

    Args:
        read: called for each try.

    Raises:
        StorageError: what the last try ended with; `is_unreadable` says whether that is damage.
    """
    return await retrying(REREADS, read, is_unreadable)
