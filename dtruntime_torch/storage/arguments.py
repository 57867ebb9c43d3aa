"""What every backend checks at the door: paths, ranges and buffers. One rule for all of them."""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from typing import cast

from typing_extensions import Buffer

from dtruntime_torch.errors import InvalidArgument
from dtruntime_torch.storage.backend import Data

_TEMPORARY = re.compile(r"\.tmp-[0-9a-f]{16}")


def temporary_name() -> str:
    """Draws the name of a file that is not there yet; no path may use such a name, and no listing shows it."""
    return f".tmp-{secrets.token_hex(8)}"


def is_temporary(part: str) -> bool:
    """Tells whether `temporary_name` could have drawn this.

    Example:
        >>> is_temporary(temporary_name()), is_temporary(".tmp-mine")
        (True, False)
    """
    return _TEMPORARY.fullmatch(part) is not None


def is_name(part: str) -> bool:
    """Tells whether `part` may stand between two slashes of a path."""
    return not (
        part in ("", ".", "..")
        or "\\" in part
        or "\0" in part
        or "/" in part
        or not _encodes(part)
        or is_temporary(part)
    )


def check_path(path: str) -> None:
    """Refuses a path that is not relative, "/"-separated and inside the root.

    Raises:
        InvalidArgument: `path` is empty or absolute, has an empty, "." or ".." part, a backslash, a NUL or what
            UTF-8 cannot encode, or uses the name of a temporary file.

    Example:
        >>> check_path("model/commits/0007-00000100.json")
        >>> check_path("../elsewhere")
        Traceback (most recent call last):
        dtruntime_torch.errors.InvalidArgument: '../elsewhere' is no path in a storage: use names joined by "/", ...
    """
    if not isinstance(path, str) or not all(map(is_name, path.split("/"))):
        raise InvalidArgument(
            f'{path!r} is no path in a storage: use names joined by "/", relative to its root, '
            'none of them empty, "." or "..", without backslashes and NULs'
        )


def check_prefix(prefix: str, delimiter: str | None) -> None:
    """Refuses what no listing can answer: a prefix is "" or a path that may stop anywhere.

    Raises:
        InvalidArgument: the prefix leaves the root, or `delimiter` is neither None nor "/".
    """
    if delimiter not in (None, "/"):
        raise InvalidArgument(f'the delimiter of a listing is "/" or None, not {delimiter!r}')
    whole = prefix[:-1] if isinstance(prefix, str) and prefix.endswith("/") else prefix
    if prefix != "":
        check_path(whole)


def check_range(path: str, offset: int, length: int) -> None:
    """Refuses a range that starts before the file or ends before it starts."""
    if offset < 0 or length < 0:
        raise InvalidArgument(f"offset {offset} and length {length} of a range of {path} may not be negative")


def check_target(path: str, length: int, into: memoryview | None) -> None:
    """Refuses memory in which a range of a file does not go.

    Raises:
        InvalidArgument: it is read-only, not contiguous, or not `length` bytes long.
    """
    if into is not None and (into.readonly or not into.c_contiguous or into.nbytes != length):
        raise InvalidArgument(
            f"{length} bytes of {path} go into contiguous writable memory of that length, not into "
            f"{into.nbytes} bytes{' that are read-only' if into.readonly else ''}"
        )


def as_views(data: Data) -> list[memoryview]:
    """Returns the buffers of `data` as flat bytes, in sequence, without copying and without empty ones.

    Raises:
        InvalidArgument: something is no buffer, or its elements do not lie one after the other.

    Example:
        >>> [bytes(view) for view in as_views([b"head", b"", bytearray(b"tail")])]
        [b'head', b'tail']
    """
    buffers: Sequence[Buffer] = data if isinstance(data, (list, tuple)) else [cast(Buffer, data)]
    try:
        views = [memoryview(buffer) for buffer in buffers]
    except TypeError as error:
        raise InvalidArgument(f"only buffers such as bytes can be stored: {error}") from error
    if not all(view.c_contiguous for view in views):
        raise InvalidArgument("a buffer to store is not contiguous: make a contiguous copy of it first")
    return [view.cast("B") for view in views if view.nbytes]


def _encodes(part: str) -> bool:
    try:
        part.encode()
    except UnicodeEncodeError:
        return False
    return True
