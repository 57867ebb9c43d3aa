"""From what a user writes as the place of checkpoints to the backend that keeps them."""

from __future__ import annotations

import os
import re
from urllib.parse import unquote, urlsplit

from dtruntime_torch.errors import InvalidArgument
from dtruntime_torch.storage.backend import StorageBackend
from dtruntime_torch.storage.local import LocalBackend

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/(/?)")
_MEMBERS = tuple(member for member in vars(StorageBackend) if not member.startswith("_"))


def backend_for(target: str | os.PathLike[str] | StorageBackend) -> StorageBackend:
    """Returns the backend that `target` names: itself, or one for a local path or a file:// URL.

    A path that begins with `~` or `~user` is below that home.

    Raises:
        InvalidArgument: it is neither, or no folder can be there.

    Example:
        >>> backend_for("/tmp/checkpoints")
        LocalBackend('/tmp/checkpoints')
    """
    if not isinstance(target, (str, os.PathLike)):
        if isinstance(target, StorageBackend):
            return target
        lacks = [member for member in _MEMBERS if not hasattr(target, member)]
        if len(lacks) < len(_MEMBERS):
            raise InvalidArgument(f"{target!r} is no StorageBackend: it lacks {', '.join(lacks)}")
        raise InvalidArgument(f"{target!r} is no place to store in: give a path, a URL or a StorageBackend")
    url = _URL.match(os.fspath(target))
    if url is None:
        return LocalBackend(expand_home(os.fspath(target)))
    scheme, second_slash = url.groups()
    if not second_slash:
        raise InvalidArgument(
            f"{os.fspath(target)!r} looks like a URL that lost a slash, as one does in a pathlib.Path: "
            "give it as a str, or begin a local path with './'"
        )
    if scheme.lower() != "file":
        raise InvalidArgument(
            f"{target} is not supported: give a local path, a file:// URL or a StorageBackend"
        )
    return LocalBackend(_path_of(str(target)))


def expand_home(path: str) -> str:
    """Puts the home in place of a `~` or `~user` at the beginning of a local path, as a shell does.

    Raises:
        InvalidArgument: there is no such user.

    Example:
        >>> expand_home("./~"), expand_home("~root/x").endswith("/x")
        ('./~', True)
    """
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise InvalidArgument(
            f"{path!r}: there is no such home; begin a local path with './' if that is its name"
        )
    return expanded


def _path_of(url: str) -> str:
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
        raise InvalidArgument(f"{url} names no local folder: write file:///path (a '#' or '?' as %23 or %3F)")
    return unquote(parts.path)
