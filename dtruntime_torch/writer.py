"""Checkpoints from asynchronous code, one process at a time, many names."""

from __future__ import annotations

import asyncio
import os
import threading

from torch.distributed import HashStore  # type: ignore[attr-defined]  # torch leaves it out of its exports

from dtruntime_torch.checkpoint.info import CheckpointInfo
from dtruntime_torch.checkpoint.objects import Json
from dtruntime_torch.checkpoint.saving.handle import SaveHandle
from dtruntime_torch.manager import CheckpointManager
from dtruntime_torch.storage import StorageBackend, backend_for


class CheckpointWriter:
    """Writes checkpoints of this process alone, also where torch.distributed is initialised.

    Args:
        storage: a local folder, or a storage backend.
        keep_last_n: how many of the newest checkpoints of a name stay; None keeps all.

    Example:
        >>> import asyncio, tempfile
        >>> writer = CheckpointWriter(tempfile.mkdtemp())
        >>> info = asyncio.run(writer.write_checkpoint("blob", 3, b"anything"))
        >>> info.step, info.nbytes
        (3, 8)
    """

    def __init__(
        self, storage: str | os.PathLike[str] | StorageBackend, *, keep_last_n: int | None = 3
    ) -> None:
        self._backend = backend_for(storage)
        self._keep_last_n = keep_last_n
        self._managers: dict[str, CheckpointManager] = {}
        self._lock = threading.Lock()

    async def write_checkpoint(
        self, name: str, step: int, data: object, metadata: Json = None
    ) -> CheckpointInfo:
        """Saves and waits for the commit without blocking the event loop.

        Args:
            name: of the checkpoint.
            step: above the newest step of that name.
            data: bytes, or a state as for `CheckpointManager.save`; it may change when this returns.
            metadata: JSON that the manifest keeps; its floats may be NaN or infinite.

        Raises:
            CommitConflict: the step is not above the newest one of that name.
        """
        handle = await asyncio.to_thread(self._start, name, step, data, metadata)
        return await handle

    def _start(self, name: str, step: int, data: object, metadata: Json) -> SaveHandle:
        with self._lock:
            if name not in self._managers:
                self._managers[name] = CheckpointManager(
                    self._backend, name, keep_last_n=self._keep_last_n, store=HashStore()
                )
            return self._managers[name].save_async(data, step, metadata)
