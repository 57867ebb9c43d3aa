"""From a folder to what it holds: manifest and parts, each checked before it is understood."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial

from dtruntime_torch.checkpoint import catalog
from dtruntime_torch.checkpoint.dcp.contents import Contents
from dtruntime_torch.checkpoint.dcp.folder import Folder, FolderView, view_of_save
from dtruntime_torch.checkpoint.dcp.foreign_folder import open_foreign
from dtruntime_torch.checkpoint.dcp.names_in_folder import NAME, attempt_of, manifest_name
from dtruntime_torch.checkpoint.dcp.sealed import decode_sealed
from dtruntime_torch.checkpoint.dcp.state_paths import KEY, planner_data_from_json, ways_of
from dtruntime_torch.checkpoint.loading.load_plan import index_parts
from dtruntime_torch.checkpoint.manifest import Manifest, Part
from dtruntime_torch.checkpoint.names import parse_attempt
from dtruntime_torch.errors import CheckpointNotFound, CorruptCheckpoint, Damage, NotFound
from dtruntime_torch.storage import LocalBackend

_MOST_TRIES = 5


async def open_folder(folder: Folder, solo: int | None, rank: int) -> Contents:
    """Reads what a folder holds, but for the data.

    Args:
        folder: that DCP was given.
        solo: the rank whose own save is wanted, made with `use_collectives=False`; None for that of all ranks.
        rank: who loads; of what differs by rank it gets its own.

    Raises:
        CheckpointNotFound: there is no checkpoint, or what was begun there never became one.
        CorruptCheckpoint: it is damaged.
        NewerFormat: it needs a later version of this package.
    """
    path = folder.path + manifest_name(solo)
    for remaining in reversed(range(_MOST_TRIES)):
        try:
            data = await catalog.read_record(folder.backend, path)
        except NotFound as error:
            if solo is not None:
                raise _nothing(folder, path) from error
            return await _open_without_manifest(folder)
        try:
            return await _open_manifest(folder, path, data, solo, rank)
        except CorruptCheckpoint:
            # It may have been replaced, and its files taken away, since the manifest was read.
            if not remaining or await _is_current(folder, path, data):
                raise
    raise AssertionError("the last try returns or raises")


async def _open_manifest(folder: Folder, path: str, data: bytes, solo: int | None, rank: int) -> Contents:
    manifest = decode_sealed(data, path)
    if manifest.generation:
        return await _open_attempt(folder, manifest, data, rank)
    attempt = parse_attempt(manifest.attempt)
    if manifest.name != NAME or attempt is None or attempt != attempt_of(attempt.number):
        raise _misplaced(path, data, manifest)
    view = view_of_save(folder, attempt.number, solo)
    parts = await _read_parts(view, manifest)
    stored = manifest.metadata.get(KEY) if isinstance(manifest.metadata, dict) else None
    planner_data = planner_data_from_json(stored, parts.values(), path)
    contents = _contents(folder, view, manifest, parts, planner_data, rank, raw_bytes=True)
    return replace(contents, is_current=partial(_is_current, folder, path, data))


async def _is_current(folder: Folder, path: str, data: bytes) -> bool:
    """Whether the manifest is still the one that was read."""
    try:
        return await catalog.read_record(folder.backend, path) == data
    except NotFound:
        return False


async def _open_without_manifest(folder: Folder) -> Contents:
    own = await folder.own_files()
    if own:
        raise CheckpointNotFound(
            f"{folder} holds no checkpoint: a save that was begun there never ended ({min(own)} has no manifest.json). "
            f"Load another one, or save there again"
        )
    contents = await open_foreign(folder)
    if contents is None:
        names = {entry.path for entry in await folder.backend.list(f"{folder.path}.metadata")}
        if f"{folder.path}.metadata" in names:
            raise CheckpointNotFound(
                f"{folder} holds a checkpoint of DCP's own format, of which the metadata is a pickle: load it with "
                f"FileSystemReader, if you trust who wrote it, and save it with StorageWriter"
            )
        raise _nothing(folder, folder.path + manifest_name(None))
    return contents


async def _open_attempt(folder: Folder, manifest: Manifest, data: bytes, rank: int) -> Contents:
    """What a CheckpointManager saved: its folder alone if it is full, otherwise where it lies among the others."""
    nominal = f"{manifest.name}/{manifest.attempt}/"  # both were checked with the manifest
    root = _root_of(folder, nominal)
    keys = [] if root is None else await catalog.commit_keys(root, manifest.name)
    if root is not None and keys:
        view = root
        await _check_committed(root, folder, manifest)
    elif manifest.full:
        view = FolderView(folder, nominal, "")
    else:
        raise CheckpointNotFound(
            f"{folder} is a delta, of which the other files lie beside it, and it was taken out of their folder: name it "
            f"where it was saved, or load it with a CheckpointManager"
        )
    parts = await _read_parts(view, manifest)
    return _contents(folder, view, manifest, parts, ways_of(parts.values()), rank, raw_bytes=False)


def _contents(
    folder: Folder,
    view: FolderView,
    manifest: Manifest,
    parts: dict[int, Part],
    planner_data: object,
    rank: int,
    *,
    raw_bytes: bool,
) -> Contents:
    try:
        saved = index_parts(parts, rank)
    except CorruptCheckpoint as error:
        raise view.told(error) from error
    return Contents(
        view, view, manifest.name, str(folder), parts, saved, planner_data, view.told, raw_bytes=raw_bytes
    )


async def _read_parts(view: FolderView, manifest: Manifest) -> dict[int, Part]:
    numbers = range(manifest.world_size)
    try:
        read = await asyncio.gather(*(catalog.read_part(view, manifest, number) for number in numbers))
    except CorruptCheckpoint as error:
        raise view.told(error) from error
    return dict(zip(numbers, read, strict=True))


def _root_of(folder: Folder, nominal: str) -> FolderView | None:
    """The storage as the manager saw it, if the folder lies in it as it was saved."""
    if not folder.path and isinstance(folder.backend, LocalBackend):
        place = f"{folder.backend.root}/"
        if place.endswith(f"/{nominal}"):
            backend = LocalBackend(place[: -len(nominal)])
            return FolderView(Folder(backend, "", folder.target), "", "")
    elif f"/{folder.path}".endswith(f"/{nominal}"):
        above = folder.path[: -len(nominal)]
        return FolderView(Folder(folder.backend, above, folder.target), "", "")
    return None


async def _check_committed(root: FolderView, folder: Folder, manifest: Manifest) -> None:
    try:
        commit = await catalog.read_commit(root, manifest.name, manifest.key)
    except NotFound:
        commit = None
    if commit is None or commit.void or commit.attempt != manifest.attempt:
        raise CheckpointNotFound(
            f"{folder} is an attempt that is not committed: it never became a checkpoint, or is none any more"
        )
    await catalog.read_manifest(root, commit)


def _misplaced(path: str, data: bytes, manifest: Manifest) -> CorruptCheckpoint:
    damage = Damage(path, None, 0, len(data), f"an attempt of {NAME}", f"{manifest.name}/{manifest.attempt}")
    return CorruptCheckpoint(f"damaged: {damage}", [damage])


def _nothing(folder: Folder, path: str) -> CheckpointNotFound:
    return CheckpointNotFound(f"there is no checkpoint in {folder}: {path} is missing")
