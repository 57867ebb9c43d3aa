"""The one place that makes a folder a checkpoint: the manifest, created if absent or put in place of the one before."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone

import torch

from dtruntime_torch._version import __version__
from dtruntime_torch.checkpoint.dcp.folder import Folder
from dtruntime_torch.checkpoint.dcp.names_in_folder import NAME, attempt_of, manifest_name, prefix_of
from dtruntime_torch.checkpoint.dcp.sealed import decode_sealed, encode_sealed
from dtruntime_torch.checkpoint.manifest import Manifest, PartRef
from dtruntime_torch.checkpoint.names import DATA_SUFFIX, PART_SUFFIX, shard_file_name
from dtruntime_torch.checkpoint.objects import Json
from dtruntime_torch.errors import AlreadyExists, CorruptCheckpoint, InvalidArgument, NotFound, StorageError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Save:
    """One save to a folder, as one rank sees it before anything is written.

    Attributes:
        folder: where to.
        number: which save of this folder it is, counted from 1.
        rank: this rank, if it saves alone; None if all save together.
        replaces: there is a checkpoint, which may be replaced.
    """

    folder: Folder
    number: int
    rank: int | None
    replaces: bool


async def open_save(folder: Folder, rank: int | None, overwrite: bool) -> Save:
    """Looks what is in the folder; nothing is written.

    Args:
        folder: where to save.
        rank: this rank, if it saves alone.
        overwrite: a checkpoint that is there may be replaced.

    Raises:
        AlreadyExists: there is one, and it may not.
        InvalidArgument: there is one that may not be replaced in this way.
    """
    own = await folder.own_files()
    manifests = {name: file for name, file in own.items() if file.is_manifest}
    if rank is not None and manifest_name(rank) not in manifests:
        manifests = {name: file for name, file in manifests.items() if file.rank is None}
    if not manifests:
        return Save(folder, 1, rank, False)
    if not overwrite:
        raise _taken(folder, min(manifests))
    if rank is not None and manifest_name(None) in manifests:
        raise InvalidArgument(
            f"{folder} holds a checkpoint that all ranks saved together, which no rank replaces alone "
            f"(use_collectives=False): choose another folder"
        )
    await _refuse_a_managers(folder, min(manifests))
    return Save(folder, 1 + max(file.save for file in own.values()), rank, True)


async def commit(save: Save, parts: Sequence[PartRef], nbytes: int, metadata: dict[str, Json]) -> Manifest:
    """Makes what all ranks wrote the checkpoint of the folder, and takes away what other saves left there.

    Args:
        save: as `open_save` gave it.
        parts: all of it, in the order of their numbers.
        nbytes: bytes of all tensors.
        metadata: goes into the manifest.

    Raises:
        AlreadyExists: somebody else committed here meanwhile.
        StorageError: it could not be written; where its outcome is not known, a later look at the folder tells.
    """
    attempt = attempt_of(save.number)
    manifest = Manifest(
        name=NAME,
        generation=attempt.generation,
        step=attempt.step,
        attempt=attempt.path,
        run_id=secrets.token_hex(16),
        parent=None,
        world_size=len(parts),
        full=True,
        uses=(attempt.path,),
        requires=(),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        versions={"dtruntime_torch": __version__, "torch": str(torch.__version__)},
        metadata=metadata,
        nbytes=nbytes,
        written=sum(ref.data_length for ref in parts),
        parts=tuple(parts),
    )
    data = encode_sealed(manifest)
    path = save.folder.path + manifest_name(save.rank)
    if save.replaces:
        await save.folder.backend.write(path, data)
        try:
            await _clean(save, len(parts))
        except StorageError as error:
            logger.warning("files of the checkpoint that was replaced stay in %s: %s", save.folder, error)
    else:
        # What a save left that never ended would be taken for a part of this one by readers that know no manifest.
        await _clean(save, len(parts))
        await _create(save, path, data)
    return manifest


async def _create(save: Save, path: str, data: bytes) -> None:
    backend = save.folder.backend
    try:
        await backend.create(path, data)
    except AlreadyExists as error:
        raise _taken(save.folder, path) from error
    except StorageError:
        # It may have taken effect all the same.
        try:
            found = bytes(await backend.read(path))
        except NotFound:
            found = b""
        if found != data:
            raise


async def _clean(save: Save, total: int) -> None:
    """Takes away files of other saves, and none that could not be one's."""
    folder, prefix = save.folder, prefix_of(save.number, save.rank)
    names = {prefix + shard_file_name(n, total, s) for n in range(total) for s in (DATA_SUFFIX, PART_SUFFIX)}
    kept = {*names, manifest_name(save.rank)}
    own = await folder.own_files()
    there = [name for name, file in own.items() if file.is_manifest and file.rank in (None, save.rank)]
    if there and not save.replaces:
        raise _taken(folder, there[0])
    # Manifests first: what is named by one is not taken away before it.
    for name in sorted(own, key=lambda name: not own[name].is_manifest):
        if name not in kept and (save.rank is None or own[name].rank == save.rank):
            await folder.backend.delete(folder.path + name)
    if save.rank is None:  # else other ranks may still be writing here
        await folder.backend.discard_unfinished(f"{folder.path}.tmp-")


async def _refuse_a_managers(folder: Folder, name: str) -> None:
    path = folder.path + name
    try:
        manifest = decode_sealed(bytes(await folder.backend.read(path)), path)
    except CorruptCheckpoint:
        return  # what is damaged may be replaced
    if manifest.generation:
        raise InvalidArgument(
            f"{folder} is a checkpoint of a CheckpointManager, which would be lost: choose another folder"
        )


def _taken(folder: Folder, name: str) -> AlreadyExists:
    return AlreadyExists(
        f"{folder} holds a checkpoint already ({name}): choose another folder, or say StorageWriter(..., "
        f"overwrite=True)"
    )
