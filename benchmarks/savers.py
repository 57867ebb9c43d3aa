"""The ways to save, each as its documentation has it: ours, torch's, safetensors', torch_checkpointing's.

Ours has a digest for each chunk and is durable when it says so. No peer has digests. DCP syncs its files; the others do
not, so theirs are synced here, before their clock stops: all totals are until the data is durable.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from concurrent.futures import Future
from contextlib import AbstractContextManager
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import (
    AsyncCheckpointerType,
    AsyncSaveResponse,
    async_save,
)
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

import dtruntime_torch as dt
from benchmarks.way import AT_ONCE, Pending, Way, sync_file, sync_files

TORCH_CHECKPOINTING = "torch_checkpointing"


class Ours(Way):
    """`save_async`."""

    def __init__(self, folder: Path, state: dict[str, Tensor], rank: int) -> None:
        super().__init__(folder, state, rank)
        self._manager = dt.CheckpointManager(folder, keep_last_n=None)

    def start(self, step: int) -> Pending:
        handle = self._manager.save_async(self.state, step)
        return Pending(handle.done, handle.result)

    def tidy(self) -> None:
        # One stays, for a manager does not expect that its last checkpoint is gone.
        if self.rank == 0 and any(self.folder.iterdir()):
            command = [
                sys.executable,
                "-m",
                "dtruntime_torch.cli",
                "prune",
                str(self.folder),
                "--keep-last",
                "1",
            ]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    def close(self) -> None:
        self._manager.close()


class OursAtOnce(Ours):
    """`save`."""

    def start(self, step: int) -> Pending:
        self._manager.save(self.state, step)
        return AT_ONCE


class TorchSave(Way):
    """A file a rank."""

    def start(self, step: int) -> Pending:
        torch.save(self.state, self.file_at(step))
        sync_file(self.file_at(step))
        return AT_ONCE


class Safetensors(Way):
    """A file a rank."""

    def start(self, step: int) -> Pending:
        safetensors.torch.save_file(self.state, self.file_at(step))
        sync_file(self.file_at(step))
        return AT_ONCE


class DCP(Way):
    """`dcp.save`."""

    threads = 1

    def start(self, step: int) -> Pending:
        dcp_save(self.state, storage_writer=FileSystemWriter(self.at(step), thread_count=self.threads))
        return AT_ONCE


class DCPFourThreads(DCP):
    """Four files a rank."""

    threads = 4


class DCPAsync(Way):
    """`dcp.async_save` as it comes: new memory for each copy, which is made before it returns, and a thread that writes."""

    def start(self, step: int) -> Pending:
        future = async_save(self.state, checkpoint_id=self.at(step))
        assert isinstance(future, Future)
        return Pending(future.done, future.result)


class DCPAsyncReused(Way):
    """`dcp.async_save` with shared memory that is kept, copied before it returns, and a process that writes."""

    in_background = False

    def __init__(self, folder: Path, state: dict[str, Tensor], rank: int) -> None:
        super().__init__(folder, state, rank)
        options = StagingOptions(
            use_pinned_memory=False,
            use_shared_memory=True,
            use_async_staging=self.in_background,
            use_non_blocking_copy=False,
        )
        self._stager = DefaultStager(options)
        self._staging: Future[None] | None = None

    def start(self, step: int) -> Pending:
        response = async_save(
            self.state,
            checkpoint_id=self.at(step),
            async_checkpointer_type=AsyncCheckpointerType.PROCESS,
            async_stager=self._stager,
        )
        if isinstance(response, AsyncSaveResponse):
            self._staging = response.staging_completion
            return Pending(response.upload_completion.done, response.upload_completion.result)
        return Pending(response.done, response.result)

    def close(self) -> None:
        self._stager.close()


class DCPAsyncBackground(DCPAsyncReused):
    """The same with a thread that copies, for which the loop waits before the optimizer's step."""

    in_background = True

    def guard(self) -> AbstractContextManager[object]:
        if self._staging is not None:
            self._staging.result()
            self._staging = None
        return super().guard()


class TorchCheckpointing(Way):
    """Shared memory that is kept, a thread that copies, a process that writes, a lock around the optimizer's step."""

    in_background = True

    def __init__(self, folder: Path, state: dict[str, Tensor], rank: int) -> None:
        super().__init__(folder, state, rank)
        # On demand, for it is installed only for this.
        package: Any = importlib.import_module(TORCH_CHECKPOINTING)
        configs: Any = importlib.import_module(f"{TORCH_CHECKPOINTING}.config")
        staging: Any = importlib.import_module(f"{TORCH_CHECKPOINTING}.staging")
        storage: Any = importlib.import_module(f"{TORCH_CHECKPOINTING}.storage.filesystem")
        if self.in_background:
            # What a machine without CUDA needs.
            on_host = staging.CheckpointStagerConfig(use_pinned_memory=False, use_non_blocking_copy=False)
            save = configs.AsyncCheckpointSaverConfig(staging_config=on_host)
        else:
            save = configs.SyncCheckpointSaverConfig()
        self._manager: Any = package.CheckpointManager(
            package.CheckpointManager.Config(
                save=save, storage_config=storage.LocalFileSystemStorageConfig(use_direct_io=False)
            )
        )

    def start(self, step: int) -> Pending:
        future = self._manager.save(str(self.at(step)), {"state": self.state})
        if future is None:
            sync_files(self.at(step))
            return AT_ONCE
        return Pending(future.done, future.result, partial(sync_files, self.at(step)))

    def guard(self) -> AbstractContextManager[object]:
        lock: AbstractContextManager[object] = self._manager.lock()
        return lock

    def close(self) -> None:
        self._manager.close()


class TorchCheckpointingAtOnce(TorchCheckpointing):
    """Writes before it returns."""

    in_background = False


def installed(way: type[Way]) -> bool:
    """Whether what this way needs is there; says so if not."""
    return not issubclass(way, TorchCheckpointing) or _find_torch_checkpointing()


@cache
def _find_torch_checkpointing() -> bool:
    found = find_spec(TORCH_CHECKPOINTING) is not None
    if not found:
        print(
            f"{TORCH_CHECKPOINTING} is not installed, its cases are left out: pip install '.[bench]'",
            file=sys.stderr,
        )
    return found
