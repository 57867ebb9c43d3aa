"""Every error that this package raises, on one page.

Each derives from `DTRuntimeError` and from the built-in that it specialises, so that both
`except DTRuntimeError` and `except FileNotFoundError` do what a reader expects. A message says what
happened, to which file, tensor or rank, and what to do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from typing_extensions import NotRequired


class DTRuntimeError(Exception):
    """The base of all errors of this package."""


class InvalidArgument(DTRuntimeError, ValueError):
    """An argument is out of range or contradicts another; nothing was changed."""


class UnsupportedType(DTRuntimeError, TypeError):
    """A state holds something that cannot be stored; the message names its key and its type."""


class MissingExtra(DTRuntimeError, ImportError):
    """An optional dependency is not installed; the message names the extra that brings it."""


class StorageError(DTRuntimeError, OSError):
    """The storage refused or failed a call; whether the call took effect is unknown."""

    def __reduce__(self) -> tuple[Any, ...]:
        # An OSError that was made of words alone forgets its errno on the way to another process.
        return type(self), self.args, {**self.__dict__, "errno": self.errno}


class NotFound(StorageError, FileNotFoundError):
    """There is nothing at that path."""


class AlreadyExists(StorageError, FileExistsError):
    """A create found something at that path, and what it found is durable."""


class UnsuitableStorage(StorageError):
    """The storage lacks what is asked of it and always will; nothing was changed, and nothing is tried again."""


class CheckpointNotFound(DTRuntimeError, FileNotFoundError):
    """No committed checkpoint answers the request."""


class CheckpointMismatch(DTRuntimeError, ValueError):
    """A checkpoint's names, shapes or dtypes differ from the state's; the message lists every difference."""


class CommitConflict(DTRuntimeError, RuntimeError):
    """Another job committed here, or replaced this one; the message says who and how to go on."""


class CommitUnknown(DTRuntimeError, RuntimeError):
    """Storage never said whether the commit took effect; nothing was deleted."""


class CleaningBlocked(DTRuntimeError, RuntimeError):
    """Nothing is deleted as long as it is not known what is still needed; the message names the file that hides it."""


class SaveFailed(DTRuntimeError, RuntimeError):
    """A save was given up before its commit; the message says which ranks failed and why."""


class TornSnapshot(SaveFailed):
    """A save was given up since tensors changed while it read them; the message names them."""


class SaveSkipped(SaveFailed):
    """A save was left out on all ranks, since the one before it still went on on one of them."""


class LoadFailed(DTRuntimeError, RuntimeError):
    """A load was given up by all ranks together; the message says which ranks failed and why."""


class BarrierTimeout(DTRuntimeError, TimeoutError):
    """Ranks did not arrive in time; the message names them.

    Attributes:
        missing: the ranks that did not arrive, as far as this one knows.
        decided: rank 0 said that it gave up, so that what was waited for never happens. Otherwise it may.
    """

    def __init__(self, message: str, missing: Sequence[int] = (), decided: bool = False) -> None:
        super().__init__(message)
        self.missing = tuple(missing)
        self.decided = decided


class StoreUnreachable(DTRuntimeError, ConnectionError):
    """The Store that the ranks share no longer answers: the process that keeps it has ended."""


@dataclass(frozen=True, slots=True)
class Damage:
    """One damaged range of one file.

    Attributes:
        file: path of the file, relative to the root of the storage.
        tensor: fqn of the tensor that the range belongs to, or None for a header, a manifest or a commit.
        start: first damaged byte in the file.
        stop: one past the last damaged byte in the file.
        expected: what should be there: a digest or a length.
        actual: what is there.
    """

    file: str
    tensor: str | None
    start: int
    stop: int
    expected: str
    actual: str

    def __str__(self) -> str:
        what = f" (tensor {self.tensor})" if self.tensor is not None else ""
        return (
            f"{self.file} bytes [{self.start}, {self.stop}){what}: "
            f"expected {self.expected}, found {self.actual}"
        )


class CorruptCheckpoint(DTRuntimeError, ValueError):
    """What is on storage is not what was committed.

    Attributes:
        damage: the damaged ranges that this rank knows of; none where another rank found them and only told of it.
    """

    def __init__(self, message: str, damage: Sequence[Damage] = ()) -> None:
        super().__init__(message)
        self.damage = tuple(damage)


class NewerFormat(DTRuntimeError, ValueError):
    """A sound checkpoint needs what only a later version of this package knows; upgrade to read it."""


class ErrorRecord(TypedDict):
    """An error on its way to another rank.

    Attributes:
        type: the name of its class, if that is one of ours.
        message: what it says.
        errno: of what the operating system refused, if that is one of ours.
    """

    type: str
    message: str
    errno: NotRequired[int]


def to_record(error: BaseException) -> ErrorRecord:
    """Describes an error so that another rank can raise the like of it.

    Returns:
        Of an error of ours its class, its message, and its errno if it has one. Of any other no class, and a message that
        begins with its name.
    """
    name = type(error).__name__
    if not (isinstance(error, DTRuntimeError) and name in globals()):
        return {"type": "", "message": f"{name}: {error}"}
    record: ErrorRecord = {"type": name, "message": str(error)}
    if isinstance(error, OSError) and error.errno is not None:
        record["errno"] = error.errno
    return record


def from_record(record: Mapping[str, Any], fallback: type[DTRuntimeError]) -> DTRuntimeError:
    """Makes the error that `to_record` described.

    Args:
        record: what `to_record` returned, on any rank.
        fallback: the class to raise where the original was none of ours.
    """
    kind = globals().get(record.get("type", ""), fallback)
    if not (isinstance(kind, type) and issubclass(kind, DTRuntimeError)):
        kind = fallback
    error = kind(record.get("message", ""))
    code = record.get("errno")
    if isinstance(error, OSError) and isinstance(code, int):
        error.errno = code
    return error
