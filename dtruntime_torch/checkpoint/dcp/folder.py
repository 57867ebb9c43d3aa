"""A folder of a storage as the place of one checkpoint, and a view of it in which its files have the records' paths."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from typing_extensions import Buffer

from dtruntime_torch import _C
from dtruntime_torch.checkpoint.dcp.names_in_folder import NAME, OwnFile, attempt_of, parse_own, prefix_of
from dtruntime_torch.checkpoint.names import attempt_path
from dtruntime_torch.errors import CorruptCheckpoint, InvalidArgument
from dtruntime_torch.storage import Entry, StorageBackend, backend_for
from dtruntime_torch.storage.arguments import check_path
from dtruntime_torch.storage.backend import Data, Listing, reads_chunks
from dtruntime_torch.storage.sync import in_thread

Target = str | os.PathLike[str] | StorageBackend
CheckpointId = str | os.PathLike[str] | None


@dataclass(frozen=True, slots=True)
class Folder:
    """Where a checkpoint lies.

    Attributes:
        backend: the storage.
        path: of the folder in it, with a "/" at its end; "" for the storage's root.
        target: as the user named it.
    """

    backend: StorageBackend
    path: str
    target: Target

    def __str__(self) -> str:
        return f"{self.target}{' ' * bool(self.path)}{self.path}"

    async def own_files(self) -> dict[str, OwnFile]:
        """What saves through DCP left here: the name of each file, and what it says."""
        listed = await self.backend.list(self.path, "/")
        found = {entry.path[len(self.path) :] for entry in listed}
        return {name: own for name in sorted(found) if (own := parse_own(name)) is not None}


def folder_of(target: Target | None, checkpoint_id: CheckpointId) -> Folder:
    """The folder that a user named.

    Args:
        target: given to the writer or reader: a path, a URL, or a storage.
        checkpoint_id: given to DCP: takes the place of a path; in a storage it is the path of a folder.

    Raises:
        InvalidArgument: no folder is named, or none can be there.
    """
    if target is not None and not isinstance(target, (str, os.PathLike)):
        backend = backend_for(target)
        path = "" if checkpoint_id is None else os.fspath(checkpoint_id).strip("/")
        if path:
            check_path(path)
        return Folder(backend, f"{path}/" if path else "", target)
    chosen = target if checkpoint_id is None else checkpoint_id
    if chosen is None:
        raise InvalidArgument(
            "no folder is named: give it to the writer or reader, or as checkpoint_id to DCP"
        )
    return Folder(backend_for(chosen), "", chosen)


class FolderView:
    """A storage of which only one save of one folder is seen, under the paths that its records have.

    Args:
        folder: where it lies.
        nominal: what the paths of its files start with in the records.
        prefix: what their names start with in the folder.
    """

    def __init__(self, folder: Folder, nominal: str, prefix: str) -> None:
        self._backend = folder.backend
        self._nominal = nominal
        self._actual = folder.path + prefix

    @property
    def settle_seconds(self) -> float:
        return self._backend.settle_seconds

    async def write(self, path: str, data: Data) -> None:
        await self._backend.write(self._at(path), data)

    async def create(self, path: str, data: Data) -> None:
        await self._backend.create(self._at(path), data)

    async def read(self, path: str) -> Buffer:
        return await self._backend.read(self._at(path))

    async def read_range(
        self, path: str, offset: int, length: int, *, into: memoryview | None = None
    ) -> Buffer:
        return await self._backend.read_range(self._at(path), offset, length, into=into)

    async def read_chunks(
        self, path: str, offsets: Sequence[int], into: Sequence[memoryview], chunk_bytes: int
    ) -> bytes:
        reader = reads_chunks(self._backend)
        if reader is not None:
            return await reader.read_chunks(self._at(path), offsets, into, chunk_bytes)
        found = b""
        for offset, target in zip(offsets, into, strict=True):
            got = await self._backend.read_range(self._at(path), offset, target.nbytes, into=target)
            found += await in_thread(partial(_C.digest, got, chunk_bytes))
        return found

    async def size(self, path: str) -> int:
        return await self._backend.size(self._at(path))

    async def list(self, prefix: str, delimiter: str | None = None) -> list[Entry]:
        return self._named(await self._backend.list(self._at(prefix), delimiter))

    async def delete(self, path: str) -> None:
        await self._backend.delete(self._at(path))

    async def unfinished(self, prefix: str) -> Listing:
        return self._named(await self._backend.unfinished(self._at(prefix)))

    async def discard_unfinished(self, prefix: str) -> int:
        return await self._backend.discard_unfinished(self._at(prefix))

    def told(self, error: CorruptCheckpoint) -> CorruptCheckpoint:
        """The same error about the files as they are called in the folder."""
        damage = [replace(found, file=self._actual_name(found.file)) for found in error.damage]
        return CorruptCheckpoint(self._actual_name(str(error)), damage)

    def _actual_name(self, text: str) -> str:
        return text.replace(self._nominal, self._actual) if self._nominal else text

    def _at(self, path: str) -> str:
        if not path.startswith(self._nominal):
            raise InvalidArgument(f"{path!r} is no file of this checkpoint")
        return self._actual + path[len(self._nominal) :]

    def _named(self, entries: Listing) -> Listing:
        return [replace(entry, path=self._nominal + entry.path[len(self._actual) :]) for entry in entries]


def view_of_save(folder: Folder, save: int, rank: int | None) -> FolderView:
    """The files of one save through DCP.

    Args:
        folder: where it lies.
        save: which save of this folder.
        rank: of a rank that saved alone.
    """
    return FolderView(folder, f"{attempt_path(NAME, attempt_of(save))}/", prefix_of(save, rank))
