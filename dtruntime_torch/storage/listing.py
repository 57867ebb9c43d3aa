"""Listings of a folder by prefix, as an object store gives them: files only, no temporary ones; or only those."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator

from dtruntime_torch.storage.arguments import is_name, is_temporary
from dtruntime_torch.storage.backend import Entry, Listing


def list_files(root: str, folder: str, prefix: str, delimiter: str | None) -> Listing:
    """Lists the files below `folder` whose path starts with `prefix`.

    Args:
        root: the storage's root, without links; a link to a file outside it is not listed.
        folder: the folder that the prefix names up to its last "/", without links.
        prefix: what the paths start with, relative to the root.
        delimiter: None: all files; "/": those further down come as one entry for each folder that has some.
    """
    parent, slash, start = prefix.rpartition("/")
    entries: list[Entry] = []
    for item in _scan(folder):
        if not item.name.startswith(start):
            continue
        path = f"{parent}{slash}{item.name}"
        if not item.is_dir(follow_symlinks=False):
            entries += _file(root, item, path)
        elif delimiter is None:
            entries += _walk(root, item.path, path)
        elif any(True for _ in _walk(root, item.path, path)):
            entries.append(Entry(path + delimiter, 0, 0.0))
    return sorted(entries, key=lambda entry: entry.path)


def list_temporary(folder: str, prefix: str) -> Listing:
    """Lists the temporary files below `folder` whose path starts with `prefix`.

    Args:
        folder: the folder that the prefix names up to its last "/", without links.
        prefix: what the paths start with, relative to the root.
    """
    parent, slash, _ = prefix.rpartition("/")
    found = sorted(_temporaries(folder, f"{parent}{slash}"), key=lambda entry: entry.path)
    return [entry for entry in found if entry.path.startswith(prefix)]


def _temporaries(folder: str, path: str) -> Iterator[Entry]:
    for item in _scan(folder, lambda name: is_name(name) or is_temporary(name)):
        if item.is_dir(follow_symlinks=False):
            yield from _temporaries(item.path, f"{path}{item.name}/")
        elif is_temporary(item.name):
            # No link is ever made under such a name: what is one is not ours.
            yield from [] if item.is_symlink() else _file(folder, item, path + item.name)


def _walk(root: str, folder: str, path: str) -> Iterator[Entry]:
    for item in _scan(folder):
        below = f"{path}/{item.name}"
        if item.is_dir(follow_symlinks=False):
            yield from _walk(root, item.path, below)
        else:
            yield from _file(root, item, below)


def _scan(folder: str, wanted: Callable[[str], bool] = is_name) -> list[os.DirEntry[str]]:
    """Reads a folder at once: the descriptor is closed before anyone goes deeper."""
    try:
        with os.scandir(folder) as items:
            return [item for item in items if wanted(item.name)]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _file(root: str, item: os.DirEntry[str], path: str) -> list[Entry]:
    if item.is_symlink() and os.path.commonpath([root, os.path.realpath(item.path)]) != root:
        return []
    try:
        status = os.stat(item.path)
    except FileNotFoundError:  # deleted since the folder was read, or a link to nothing
        return []
    return [Entry(path, status.st_size, status.st_mtime)] if stat.S_ISREG(status.st_mode) else []
