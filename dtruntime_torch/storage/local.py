"""A folder as a storage: every write is all or nothing, and durable when it returns.

A file is written beside its place under a temporary name, synced, and then renamed (`write`) or linked
(`create`) to where it belongs; last the folder is synced. What a crash leaves behind is at most a temporary
file, which no listing shows.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from typing_extensions import Buffer

from dtruntime_torch.errors import AlreadyExists, InvalidArgument, NotFound, StorageError, UnsuitableStorage
from dtruntime_torch.storage.arguments import (
    as_views,
    check_path,
    check_prefix,
    check_range,
    check_target,
    temporary_name,
)
from dtruntime_torch.storage.backend import Data, Entry, Listing
from dtruntime_torch.storage.failures import explained
from dtruntime_torch.storage.folders import make_folder, nearest_existing, remove_empty_folders, sync_nearest
from dtruntime_torch.storage.listing import list_files, list_temporary
from dtruntime_torch.storage.mounts import is_on_network
from dtruntime_torch.storage.sync import in_thread
from dtruntime_torch.storage.system_calls import SystemCalls

_LOG = logging.getLogger(__name__)
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_NO_RENAME = {errno.ENOSYS, errno.EINVAL}
_DIRECT_FROM = 1 << 20  # bytes; below this the page cache is quicker than O_DIRECT
_FOLDER_TRIES = 16
_NETWORK_SETTLES = (
    90.0  # seconds; NFS keeps what it knows of a folder for 60 at most, unless mounted otherwise
)


class LocalBackend:
    """Files below a folder of a local or shared file system. Linux only.

    Several processes and hosts may use one root. Links inside the root are followed where they stay inside.

    Args:
        root: made on the first write; may be there already.
        calls: how the disk is changed; tests hand in others.

    Raises:
        InvalidArgument: `root` is empty, or a file stands there or above it.
    """

    def __init__(self, root: str | os.PathLike[str], *, calls: SystemCalls | None = None) -> None:
        self._root = _checked_root(root)
        self._calls = calls if calls is not None else SystemCalls()

    def __repr__(self) -> str:
        return f"LocalBackend({self._root!r})"

    @property
    def root(self) -> str:
        """The folder, as an absolute path."""
        return self._root

    @property
    def settle_seconds(self) -> float:
        return _NETWORK_SETTLES if is_on_network(self._real_root()) else 0.0

    async def write(self, path: str, data: Data) -> None:
        await in_thread(partial(self._write, path, as_views(data)))

    async def create(self, path: str, data: Data) -> None:
        await in_thread(partial(self._create, path, as_views(data)))

    async def read(self, path: str) -> Buffer:
        return await in_thread(partial(self._read, path, 0, None))

    async def read_range(
        self, path: str, offset: int, length: int, *, into: memoryview | None = None
    ) -> Buffer:
        check_range(path, offset, length)
        check_target(path, length, into)
        return await in_thread(partial(self._read, path, offset, length, into))

    async def read_chunks(
        self, path: str, offsets: Sequence[int], into: Sequence[memoryview], chunk_bytes: int
    ) -> bytes:
        for offset, target in zip(offsets, into, strict=True):
            check_range(path, offset, target.nbytes)
            check_target(path, target.nbytes, target)
        return await in_thread(partial(self._read_chunks, path, offsets, into, chunk_bytes))

    async def size(self, path: str) -> int:
        return await in_thread(partial(self._size, path))

    async def list(self, prefix: str, delimiter: str | None = None) -> list[Entry]:
        check_prefix(prefix, delimiter)
        return await in_thread(partial(self._list, prefix, delimiter))

    async def delete(self, path: str) -> None:
        await in_thread(partial(self._delete, path))

    async def unfinished(self, prefix: str) -> Listing:
        check_prefix(prefix, None)
        return await in_thread(partial(self._list_unfinished, prefix))

    async def discard_unfinished(self, prefix: str) -> int:
        check_prefix(prefix, None)
        return await in_thread(partial(self._discard_unfinished, prefix))

    def _write(self, path: str, data: Sequence[memoryview]) -> None:
        place = self._locate(path)
        with explained("write", place), self._temporary(place, data) as temporary:
            self._calls.rename(temporary, place)
            self._calls.sync_folder(os.path.dirname(place))

    def _create(self, path: str, data: Sequence[memoryview]) -> None:
        place = self._locate(path)
        with explained("create", place), self._temporary(place, data) as temporary:
            folder = os.path.dirname(place)
            try:
                self._name(temporary, place)
            except FileExistsError as error:
                # Its creator may not have come to this sync; the error says that what is there is durable.
                self._calls.sync_folder(folder)
                raise AlreadyExists(f"could not create {place}: it exists already") from error
            self._calls.sync_folder(folder)

    def _name(self, temporary: str, place: str) -> None:
        """Gives the file its name unless something has it: by a link, or where there are none by a rename."""
        try:
            return self._calls.link(temporary, place)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
        try:
            self._calls.rename_noreplace(temporary, place)
        except OSError as error:
            if error.errno not in _NO_RENAME:
                raise
            raise UnsuitableStorage(
                f"could not create {place}: the file system there has neither hard links nor "
                "renameat2(RENAME_NOREPLACE), so nothing on it can be created exactly once; use another one"
            ) from error

    @contextmanager
    def _temporary(self, place: str, data: Sequence[memoryview]) -> Iterator[str]:
        """Writes `data` to a synced file in the folder of `place`; it goes unless the body renames it."""
        folder = os.path.dirname(place)
        temporary = os.path.join(folder, temporary_name())
        try:
            self._fill(temporary, data)
            yield temporary
        except BaseException:
            self._discard(temporary)
            remove_empty_folders(self._calls, folder, self._real_root())
            raise
        self._discard(temporary)

    def _fill(self, temporary: str, data: Sequence[memoryview]) -> None:
        folder = os.path.dirname(temporary)
        for remaining in reversed(range(_FOLDER_TRIES)):
            try:
                make_folder(self._calls, folder, self._real_root())
                self._calls.write_file(temporary, data)
                return
            except FileNotFoundError:
                # Someone deleted the folder's last file, and with it the folder, since we looked.
                if remaining == 0:
                    raise

    def _discard(self, temporary: str) -> None:
        try:
            self._calls.unlink(temporary)
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            _LOG.warning("could not remove the temporary file %s: %s", temporary, error)

    def _read(self, path: str, offset: int, length: int | None, into: memoryview | None = None) -> Buffer:
        place = self._locate(path, follow=True)
        with explained("read", place), _opened(place) as (descriptor, size):
            if length is None:
                length = size
            if offset + length > size:
                raise StorageError(
                    f"could not read bytes [{offset}, {offset + length}) of {place}: it has only {size}"
                )
            # By the descriptor's name, so that size and bytes are of one file while others replace it.
            opened = f"/proc/self/fd/{descriptor}"
            if into is not None:
                direct = length >= _DIRECT_FROM and not _is_cached(descriptor, offset, length)
                self._calls.read_into(opened, offset, into, direct)
                return into
            if length < _DIRECT_FROM:
                return _read_buffered(descriptor, offset, length)
            return self._calls.read_file(opened, offset, length)

    def _read_chunks(
        self, path: str, offsets: Sequence[int], into: Sequence[memoryview], chunk_bytes: int
    ) -> bytes:
        place = self._locate(path, follow=True)
        with explained("read", place), _opened(place) as (descriptor, _):
            opened = f"/proc/self/fd/{descriptor}"
            return self._calls.read_and_digest(opened, offsets, into, chunk_bytes)

    def _size(self, path: str) -> int:
        place = self._locate(path, follow=True)
        with explained("read", place), _opened(place) as (_, size):
            return size

    def _list(self, prefix: str, delimiter: str | None) -> Listing:
        folder = self._folder_of(prefix)
        with explained("list", folder):
            return list_files(self._real_root(), folder, prefix, delimiter)

    def _list_unfinished(self, prefix: str) -> Listing:
        folder = self._folder_of(prefix)
        with explained("list", folder):
            return list_temporary(folder, prefix)

    def _delete(self, path: str) -> None:
        self._delete_at(self._locate(path))

    def _delete_at(self, place: str) -> None:
        folder = os.path.dirname(place)
        with explained("delete", place):
            try:
                self._calls.unlink(place)
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                # An earlier delete may have been cut off before its sync: absence has to be durable too.
                stays = folder
            else:
                stays = remove_empty_folders(self._calls, folder, self._real_root())
            sync_nearest(self._calls, stays, self._real_root())

    def _discard_unfinished(self, prefix: str) -> int:
        discarded = 0
        for entry in self._list_unfinished(prefix):
            folder, name = os.path.split(os.path.join(self._root, entry.path))
            self._delete_at(os.path.join(os.path.realpath(folder), name))
            discarded += entry.size
        return discarded

    def _folder_of(self, prefix: str) -> str:
        folder = os.path.realpath(os.path.join(self._root, prefix.rpartition("/")[0]))
        self._check_inside(folder, prefix)
        return folder

    def _locate(self, path: str, *, follow: bool = False) -> str:
        """Returns the absolute path, its links resolved; with `follow` also the file's own, as a read does."""
        check_path(path)
        folder, name = os.path.split(os.path.join(self._root, path))
        place = os.path.join(os.path.realpath(folder), name)
        if follow:
            place = os.path.realpath(place)
        self._check_inside(place, path)
        return place

    def _check_inside(self, place: str, path: str) -> None:
        root = self._real_root()
        if os.path.commonpath([root, place]) != root:
            raise StorageError(
                f"{os.path.join(self._root, path)} leads through a symbolic link out of {self._root} "
                f"to {place}: replace the link by what it points to, or use that place as the root"
            )

    def _real_root(self) -> str:
        return os.path.realpath(self._root)


def _checked_root(root: str | os.PathLike[str]) -> str:
    name = os.fspath(root)
    if not isinstance(name, str) or name == "" or "\0" in name:
        raise InvalidArgument(f"{root!r} is no folder to store in: give a path")
    absolute = os.path.abspath(name)
    there = nearest_existing(absolute)
    if not os.path.isdir(there):
        raise InvalidArgument(
            f"{absolute} cannot be a storage: {there} is not a folder; move it away, or choose another path"
        )
    return absolute


@contextmanager
def _opened(place: str) -> Iterator[tuple[int, int]]:
    """Opens a regular file: its descriptor and its size."""
    try:
        # A pipe that someone put there would block an open without O_NONBLOCK for ever.
        descriptor = os.open(place, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFound(f"could not read {place}: nothing is there") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise NotFound(f"could not read {place}: there is something, but no file")
        yield descriptor, status.st_size
    finally:
        os.close(descriptor)


def _read_buffered(descriptor: int, offset: int, length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        piece = os.pread(descriptor, length - len(data), offset + len(data))
        if not piece:
            raise EOFError(f"the file ends {length - len(data)} bytes early")
        data += piece
    return bytes(data)


def _is_cached(descriptor: int, offset: int, length: int) -> bool:
    """Whether a range seems to be in the page cache, from where it comes sooner than from the disk.

    Only its ends are looked at: a wrong guess costs time and nothing else.
    """
    byte = bytearray(1)
    try:
        return all(os.preadv(descriptor, [byte], at, os.RWF_NOWAIT) for at in (offset, offset + length - 1))
    except OSError:
        # It is not there, or the file system cannot tell.
        return False
