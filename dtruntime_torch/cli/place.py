"""What PATH means: the root that a `CheckpointManager` was given, or the folder of one name below it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from dtruntime_torch.checkpoint import catalog, names
from dtruntime_torch.checkpoint.names import Attempt, check_name
from dtruntime_torch.errors import CheckpointNotFound, InvalidArgument
from dtruntime_torch.storage import StorageBackend, backend_for, run_sync
from dtruntime_torch.storage.targets import expand_home

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


@dataclass(frozen=True, slots=True)
class Place:
    """Where checkpoints lie.

    Attributes:
        backend: the storage.
        names: of the checkpoints there that have commits, in alphabetical order; at least one.
    """

    backend: StorageBackend
    names: tuple[str, ...]


def find_place(path: str) -> Place:
    """Finds the checkpoints at a path.

    Args:
        path: a local folder or a file:// URL.

    Raises:
        CheckpointNotFound: there are none.
        InvalidArgument: no storage can be there.
    """
    full = _full(path)
    backend = backend_for(full)
    above, _, name = full.rpartition("/")
    if above and _is_name(name):
        root = backend_for(above)
        if run_sync(catalog.commit_keys(root, name)):
            return Place(root, (name,))
    found = tuple(
        name for name in run_sync(_folders(backend)) if run_sync(catalog.commit_keys(backend, name))
    )
    if not found:
        raise CheckpointNotFound(
            f"there is no checkpoint in {path}: give the folder that the CheckpointManager was given, or one "
            f"<name> below it"
        )
    return Place(backend, found)


def find_root(path: str, name: str, attempt: Attempt) -> StorageBackend:
    """Finds the storage in which an attempt lies, be it committed or not.

    Args:
        path: the root, or the folder of `name` below it.
        name: of the checkpoint.
        attempt: that is looked for.

    Raises:
        InvalidArgument: no storage can be there.
    """
    full = _full(path)
    above, _, last = full.rpartition("/")
    if above and last == name:
        root = backend_for(above)
        if run_sync(_has(root, name, attempt)):
            return root
    return backend_for(full)


def _full(path: str) -> str:
    return path.rstrip("/") if _URL.match(path) else os.path.realpath(expand_home(path))


async def _has(backend: StorageBackend, name: str, attempt: Attempt) -> bool:
    folder = f"{names.attempt_path(name, attempt)}/"
    listed = await backend.list(folder) or await backend.unfinished(folder)
    return bool(listed) or attempt.key in await catalog.commit_keys(backend, name)


async def _folders(backend: StorageBackend) -> list[str]:
    entries = await backend.list("", delimiter="/")
    folders = (entry.path.rstrip("/") for entry in entries if entry.path.endswith("/"))
    return [folder for folder in folders if _is_name(folder)]


def _is_name(text: str) -> bool:
    try:
        check_name(text)
    except InvalidArgument:
        return False
    return True
