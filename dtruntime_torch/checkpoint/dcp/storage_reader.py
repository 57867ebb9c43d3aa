"""Loads through `torch.distributed.checkpoint` from our files: each chunk checked, no pickle read."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader as TorchStorageReader
from torch.futures import Future

from dtruntime_torch.checkpoint.dcp.contents import Contents
from dtruntime_torch.checkpoint.dcp.folder import CheckpointId, Folder, Target
from dtruntime_torch.checkpoint.dcp.names_in_folder import manifest_name
from dtruntime_torch.checkpoint.dcp.open_folder import open_folder
from dtruntime_torch.checkpoint.dcp.place import Place, can_be_named
from dtruntime_torch.checkpoint.dcp.read_items import read_items
from dtruntime_torch.checkpoint.door import DOOR
from dtruntime_torch.errors import CorruptCheckpoint, InvalidArgument, LoadFailed, NotFound
from dtruntime_torch.storage import run_sync


class StorageReader(TorchStorageReader):
    """Reads a checkpoint for `torch.distributed.checkpoint` from a folder.

    The folder is one that `StorageWriter` wrote; the attempt of a `CheckpointManager` (`CheckpointInfo.path`), a delta too
    where it was saved; or one of safetensors files by stock `HuggingFaceStorageWriter` or from Hugging Face, in which
    there are no digests to check.

    Args:
        target: a path, a URL, or a storage. In a storage the `checkpoint_id` given to DCP is the path of the folder;
            else it takes the place of the path.

    Raises:
        InvalidArgument: `target` is no place to load from.

    Example:
        >>> import torch, torch.distributed.checkpoint as dcp, dtruntime_torch as dt
        >>> writer = dt.StorageWriter("checkpoints/2000")
        >>> _ = dcp.save({"w": torch.arange(3)}, storage_writer=writer, no_dist=True)
        >>> state = {"w": torch.zeros(3, dtype=torch.int64)}
        >>> dcp.load(state, storage_reader=StorageReader("checkpoints/2000"), no_dist=True)
        >>> state["w"]
        tensor([0, 1, 2])
    """

    def __init__(self, target: Target | None = None) -> None:
        super().__init__()
        self._place: Place[Contents] = Place(target)

    def reset(self, checkpoint_id: CheckpointId = None) -> None:
        self._place.begin(checkpoint_id)

    @property
    def checkpoint_id(self) -> CheckpointId:
        """The folder that is read, for DCP's log."""
        return self._place.name

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Reads and checks manifest and parts.

        DCP asks again with a rank where that failed, for what the rank saved alone (`use_collectives=False`).

        Raises:
            CheckpointNotFound: there is no checkpoint.
            CorruptCheckpoint: it is damaged.
        """
        solo, folder = kwargs.get("rank"), self._place.folder
        if solo is not None and run_sync(_has_manifest(folder)):
            solo = None  # what is wrong with the checkpoint of all is no reason to take another one
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        metadata = run_sync(open_folder(folder, solo, rank)).metadata()
        metadata.storage_meta = StorageMeta(checkpoint_id=self.checkpoint_id, load_id=self._place.id)
        return metadata

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        if not isinstance(metadata.storage_data, Contents):
            raise InvalidArgument("the metadata is not what this reader read")
        self._place.opened = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        contents = self._place.opened
        if contents is None:
            raise InvalidArgument("set_up_storage_reader comes first, in the same thread")
        # What is filled a manager may still save.
        DOOR.before_update()
        run_sync(_read(contents, plan, planner))
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: CheckpointId) -> bool:
        return can_be_named(checkpoint_id)


async def _read(contents: Contents, plan: LoadPlan, planner: LoadPlanner) -> None:
    try:
        await read_items(contents, plan, planner)
    except CorruptCheckpoint as error:
        if contents.is_current is None or await contents.is_current():
            raise
        raise LoadFailed(f"{contents.where} was replaced while it was loaded; load it again") from error


async def _has_manifest(folder: Folder) -> bool:
    try:
        await folder.backend.size(folder.path + manifest_name(None))
    except NotFound:
        return False
    return True
