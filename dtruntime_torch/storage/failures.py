"""What an error of the operating system says to the reader: what happened, to which file, what to do."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from dtruntime_torch.errors import DTRuntimeError, StorageError

_ADVICE = {
    errno.ENOSPC: "The disk is full: free space on it, then save again",
    errno.EDQUOT: "The quota is used up: free space, or ask for more",
    errno.EACCES: "Give this user permission to read and write there, or choose another place",
    errno.EPERM: "Give this user permission to read and write there, or choose another place",
    errno.EROFS: "The file system is mounted read-only: mount it writable, or choose another place",
    errno.ENOENT: "Its folder is not there, or no longer: see whether another job saves or cleans up there",
    errno.ENOTDIR: "A file stands where a folder is needed: move it away, or choose another place",
    errno.EISDIR: "A folder stands where a file is needed: move it away, or choose another place",
    errno.ENAMETOOLONG: "Choose a shorter name or a root less deep",
    errno.EMFILE: "Too many files are open: raise the limit (ulimit -n)",
    errno.EIO: "The device failed: see the kernel's log, and check the disk",
    errno.ESTALE: "The network file system lost the file: mount it again",
}


@contextmanager
def explained(action: str, path: str) -> Iterator[None]:
    """Turns an `OSError` of the body into a `StorageError` that a reader can act on.

    Args:
        action: what was tried: "write", "read".
        path: the absolute path that it was tried on.

    Raises:
        StorageError: its errno is that of its cause, None if that has none. An error of ours passes as it is.
    """
    try:
        yield
    except DTRuntimeError:
        raise
    except EOFError as error:
        raise StorageError(f"could not {action} {path}: {error}. It is shorter than it should be") from error
    except OSError as error:
        raise _explain(action, path, error) from error


def _explain(action: str, path: str, cause: OSError) -> StorageError:
    code = cause.errno
    if code is None:
        return StorageError(f"could not {action} {path}: {cause}. Check the file system there")
    advice = _ADVICE.get(code, "Check the file system there")
    explained = StorageError(
        f"could not {action} {path}: {cause.strerror or os.strerror(code)} "
        f"({errno.errorcode.get(code, code)}). {advice}"
    )
    explained.errno = code
    return explained
