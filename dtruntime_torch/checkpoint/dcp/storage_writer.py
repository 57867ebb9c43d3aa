"""Saves through `torch.distributed.checkpoint` into our files: each chunk with a digest, one file as the commit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter as TorchStorageWriter
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from dtruntime_torch.checkpoint.dcp.commit_folder import Save, commit, open_save
from dtruntime_torch.checkpoint.dcp.folder import CheckpointId, Target, view_of_save
from dtruntime_torch.checkpoint.dcp.names_in_folder import attempt_of
from dtruntime_torch.checkpoint.dcp.place import Place, can_be_named
from dtruntime_torch.checkpoint.dcp.rank_files import write_file
from dtruntime_torch.checkpoint.dcp.state_paths import KEY, planner_data_to_json
from dtruntime_torch.checkpoint.dcp.write_items import ShardFile, files_needed, resolve
from dtruntime_torch.checkpoint.manifest import PartRef
from dtruntime_torch.counts import check_count
from dtruntime_torch.errors import InvalidArgument, SaveFailed
from dtruntime_torch.storage import run_sync


@dataclass(frozen=True, slots=True)
class PartNumbers:
    """Which parts of a save a rank writes; goes with its plan.

    Attributes:
        own: their numbers; the first is the rank's.
        total: how many there are.
    """

    own: tuple[int, ...]
    total: int


@dataclass(frozen=True, slots=True)
class WrittenParts:
    """What a rank wrote; goes to the coordinator with its results.

    Attributes:
        save: which save of the folder this rank took it for.
        total: how many parts it took the save to have.
        refs: its parts.
        nbytes: bytes of its tensors.
    """

    save: int
    total: int
    refs: tuple[PartRef, ...]
    nbytes: int


class StorageWriter(TorchStorageWriter):
    """Writes a checkpoint of `torch.distributed.checkpoint` to a folder.

    The folder is the checkpoint, and `manifest.json` in it, which comes last and in one step, makes it one. Its files open
    with stock safetensors, and load with stock `HuggingFaceStorageReader`. No pickle is stored. Several threads may save
    through one writer at once, each to a folder of its own.

    Args:
        target: a path, a URL, or a storage. In a storage the `checkpoint_id` given to DCP is the path of the folder;
            else it takes the place of the path.
        overwrite: replaces a checkpoint that is there, in one step for our reader. Otherwise that is an error.
        chunk_bytes: bytes of a chunk, each of which has a digest.

    Raises:
        InvalidArgument: `target` is no place to store in, or `chunk_bytes` no number of bytes.

    Example:
        >>> import torch, torch.distributed.checkpoint as dcp
        >>> state = {"w": torch.arange(3)}
        >>> _ = dcp.save(state, storage_writer=StorageWriter("checkpoints/1000"), no_dist=True)
    """

    def __init__(
        self, target: Target | None = None, *, overwrite: bool = False, chunk_bytes: int = 1 << 20
    ) -> None:
        super().__init__()
        check_count("chunk_bytes", chunk_bytes, 1, 1 << 30)
        self._place: Place[Save] = Place(target)
        self._overwrite = overwrite
        self._chunk_bytes = chunk_bytes

    def reset(self, checkpoint_id: CheckpointId = None) -> None:
        self._place.begin(checkpoint_id)

    @property
    def checkpoint_id(self) -> CheckpointId:
        """The folder that is written to, for DCP's log."""
        return self._place.name

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        rank = None if kwargs.get("use_collectives", True) else kwargs.get("rank")
        self._place.opened = run_sync(open_save(self._place.folder, rank, self._overwrite))

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        # A plan that is not usable stands for one that its rank knows, and the numbers with it.
        needed = [files_needed(plan) if getattr(plan, "usable", True) else 1 for plan in plans]
        total, extra, numbered = sum(needed), len(plans), []
        for rank, plan in enumerate(plans):
            more = range(extra, extra + needed[rank] - 1)
            extra += len(more)
            numbered.append(replace(plan, storage_data=PartNumbers((rank, *more), total)))
        return numbered

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        files, numbers = resolve(plan, planner), plan.storage_data
        if not isinstance(numbers, PartNumbers) or len(files) > len(numbers.own):
            raise InvalidArgument(
                "the plan that is to be written is not the one that this writer prepared: a planner's finish_plan has to "
                "keep the items of the plan that it is given, and its storage_data; and what planners keep in the process "
                "(enable_plan_caching) may not be of a save by another kind of writer"
            )
        # What was asked for in a plan that had more of a name stays a part, if an empty one.
        files += [ShardFile() for _ in numbers.own[len(files) :]]
        written = run_sync(self._write(files, numbers))
        results = [WriteResult(item.index, _nbytes_of(files, item.index.fqn), None) for item in plan.items]
        # Last, and also of a rank that has nothing to write: what the coordinator needs to know.
        results.append(WriteResult(MetadataIndex(""), written.nbytes, written))
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        save = self._opened()
        written = [rank[-1].storage_data for rank in results]
        refs = _all_parts(save, written)
        kept = planner_data_to_json(metadata.planner_data, metadata.state_dict_metadata)
        run_sync(commit(save, refs, sum(one.nbytes for one in written), {KEY: kept}))
        metadata.storage_meta = self.storage_meta()

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(checkpoint_id=self.checkpoint_id, save_id=self._place.id)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: CheckpointId) -> bool:
        return can_be_named(checkpoint_id)

    async def _write(self, files: Sequence[ShardFile], numbers: PartNumbers) -> WrittenParts:
        save = self._opened()
        view, attempt = view_of_save(save.folder, save.number, save.rank), attempt_of(save.number)
        refs, nbytes = [], 0
        for number, file in zip(numbers.own, files, strict=True):
            shard = await write_file(view, attempt, file, number, numbers.total, self._chunk_bytes)
            refs.append(shard.ref)
            nbytes += sum(entry.nbytes for entry in shard.part.tensors)
        return WrittenParts(save.number, numbers.total, tuple(refs), nbytes)

    def _opened(self) -> Save:
        save = self._place.opened
        if save is None:
            raise InvalidArgument("set_up_storage_writer comes first, in the same thread")
        return save


def _nbytes_of(files: Sequence[ShardFile], fqn: str) -> int:
    held = [file.tensors[fqn][0].nbytes for file in files if fqn in file.tensors]
    return held[0] if held else 0


def _all_parts(save: Save, written: Sequence[WrittenParts]) -> list[PartRef]:
    """The parts of all ranks in the order of their numbers.

    Raises:
        SaveFailed: the ranks did not write one save.
    """
    refs = sorted((ref for one in written for ref in one.refs), key=lambda ref: ref.rank)
    if {one.save for one in written} != {save.number}:
        raise SaveFailed(
            f"the ranks found different things in {save.folder}: somebody else saves there. Give each save a folder of "
            f"its own, and save again"
        )
    alike = {one.total for one in written} == {len(refs)}
    if not alike or [ref.rank for ref in refs] != list(range(len(refs))):
        raise SaveFailed(
            f"the plans of the ranks for {save.folder} do not fit together: a planner that keeps its plans "
            f"(enable_plan_caching) does not know that some rank now has more or fewer shards of one tensor; save "
            f"with a planner that keeps none"
        )
    return refs
