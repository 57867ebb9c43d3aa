"""Where a writer or reader of DCP works: the folder that its user named, and what each thread has begun there.

DCP gives one writer to each save that is begun, and `async_save` begins one while another may still be running in a
thread of its own. Every call of one save comes from one thread.
"""

from __future__ import annotations

import secrets
import threading
from typing import Any, Generic, TypeVar

from dtruntime_torch.checkpoint.dcp.folder import CheckpointId, Folder, Target, folder_of
from dtruntime_torch.errors import InvalidArgument
from dtruntime_torch.storage import backend_for

T = TypeVar("T")


def can_be_named(checkpoint_id: CheckpointId) -> bool:
    """Whether a `checkpoint_id` alone names a folder that there can be."""
    try:
        folder_of(None, checkpoint_id)
    except InvalidArgument:
        return False
    return True


class _Begun(threading.local):
    """What this thread has begun."""

    checkpoint_id: CheckpointId = None
    id: str = ""
    opened: Any = None


class Place(Generic[T]):
    """A folder, and for each thread what it has opened there.

    Args:
        target: a path, a URL, or a storage; None if DCP will be told.

    Raises:
        InvalidArgument: it is no place to store in.
    """

    def __init__(self, target: Target | None) -> None:
        if target is not None:
            backend_for(target)
        self._target = target
        self._checkpoint_id: CheckpointId = None
        self._begun = _Begun()

    def begin(self, checkpoint_id: CheckpointId) -> None:
        """Begins a save or load of this thread; without a `checkpoint_id` it is where the one before was."""
        if checkpoint_id is not None:
            self._checkpoint_id = checkpoint_id
        self._begun.checkpoint_id = self._checkpoint_id
        self._begun.id = secrets.token_hex(16)
        self._begun.opened = None

    @property
    def folder(self) -> Folder:
        """Where this thread works.

        Raises:
            InvalidArgument: no folder is named.
        """
        own = self._begun.checkpoint_id
        return folder_of(self._target, self._checkpoint_id if own is None else own)

    @property
    def name(self) -> CheckpointId:
        """The folder for DCP's log; None if there is none."""
        try:
            return str(self.folder)
        except InvalidArgument:
            return None

    @property
    def id(self) -> str:
        """What tells this save or load from others."""
        return self._begun.id

    @property
    def opened(self) -> T | None:
        """What this thread opened since it began."""
        found: T | None = self._begun.opened
        return found

    @opened.setter
    def opened(self, opened: T) -> None:
        self._begun.opened = opened

    def __getstate__(self) -> tuple[Target | None, CheckpointId]:
        return self._target, self._checkpoint_id

    def __setstate__(self, state: tuple[Target | None, CheckpointId]) -> None:
        self._target, self._checkpoint_id = state
        self._begun = _Begun()
