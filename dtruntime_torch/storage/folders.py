"""Folders that are durable before anything in them is, and that go when they are empty.

An object store has no folders; here they come and go with the files, while other processes make and remove
the same ones. The rule that keeps this cheap: a folder is made only in one whose own name was synced before.
So whoever finds a folder there need sync only that folder's name, not the whole way up.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from dtruntime_torch.storage.system_calls import SystemCalls


def make_folder(calls: SystemCalls, folder: str, root: str) -> None:
    """Makes `folder` and those above it that are missing; all their names are durable when it returns.

    Args:
        calls: how the disk is changed.
        folder: an absolute path, `root` or below it.
        root: the storage's root. Folders above it need not be readable, if they were there.
    """
    missing = []
    while not os.path.isdir(folder) and folder != os.path.dirname(folder):
        missing.append(folder)
        folder = os.path.dirname(folder)
    _sync_name(calls, folder, root)
    for made in reversed(missing):
        # Another process may be first; and a file in the way is what the next call names.
        with suppress(FileExistsError):
            calls.mkdir(made)
        calls.sync_folder(os.path.dirname(made))


def remove_empty_folders(calls: SystemCalls, folder: str, root: str) -> str:
    """Removes `folder` and those above it as long as they are empty, never the root.

    Returns:
        The folder that stays, whose sync makes the removals durable.
    """
    while folder != root and _is_gone(calls, folder):
        folder = os.path.dirname(folder)
    return folder


def sync_nearest(calls: SystemCalls, folder: str, root: str) -> None:
    """Makes the state of `folder` durable, also if that state is its absence."""
    while not _is_synced(calls, folder) and folder != root:
        folder = os.path.dirname(folder)


def nearest_existing(path: str) -> str:
    """Returns `path` or the closest thing above it that is there."""
    return next(str(place) for place in (Path(path), *Path(path).parents) if os.path.lexists(place))


def _sync_name(calls: SystemCalls, folder: str, root: str) -> None:
    parent = os.path.dirname(folder)
    try:
        calls.sync_folder(parent)
    except PermissionError:
        if not _is_above(parent, root):
            raise
        # Not ours to sync: this folder was there before the storage was.


def _is_synced(calls: SystemCalls, folder: str) -> bool:
    try:
        calls.sync_folder(folder)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _is_gone(calls: SystemCalls, folder: str) -> bool:
    try:
        calls.rmdir(folder)
    except FileNotFoundError:
        return True  # another process was first
    except OSError:
        return False  # it holds something, or may not go: an empty folder does no harm
    return True


def _is_above(folder: str, root: str) -> bool:
    return folder != root and os.path.commonpath([folder, root]) == folder
