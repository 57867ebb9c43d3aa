"""What a device cannot read, and how often it is asked before that counts as damage.

Only EIO counts, and only from a device of this host: it is what a bad sector ends in. Over a network it also ends an outage
(soft mounts, FUSE). That and all other failures say nothing of the bytes, and stay errors.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from typing import TypeVar

from dtruntime_torch.errors import StorageError
from dtruntime_torch.retry import RetryPolicy, retrying
from dtruntime_torch.storage.backend import StorageBackend

R = TypeVar("R")

REREADS = RetryPolicy(attempts=4, initial=0.1, max=2.0, factor=4.0)
"""For each read: some two seconds, in which a cable or a controller may come to itself."""

UNREADABLE = "nothing: the device could not read it (EIO)"
"""What there is, as `Damage` says it."""


def is_unreadable(backend: StorageBackend, error: BaseException) -> bool:
    """Whether this is how a read of a bad sector ends."""
    return _has_failed(error) and backend.settle_seconds == 0.0


def _has_failed(error: BaseException) -> bool:
    return isinstance(error, StorageError) and error.errno == errno.EIO


async def reread(read: Callable[[], Awaitable[R]]) -> R:
    """Reads, and while the device fails again, as `REREADS` says: a passing hiccup is no damage.

    Args:
        read: called for each try.

    Raises:
        StorageError: what the last try ended with; `is_unreadable` says whether that is damage.
    """
    return await retrying(REREADS, read, _has_failed)
