"""The few calls that we make to a `torch.distributed` Store, and what we put there.

A value is its kind in one byte, then bytes; so none is empty and none is taken for another. Errors travel as JSON.
What is read comes from other processes: it is bounded and checked, and none of it is a pickle.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from dtruntime_torch import errors
from dtruntime_torch.errors import DTRuntimeError, InvalidArgument, StoreUnreachable

MAX_VALUE_BYTES = 64 << 20

_VALUE, _ERROR = b"=", b"!"

# A FileStore says it in words only; its error is a plain RuntimeError.
_FILE_STORE_TIMEOUT = "Wait timeout"


class StoreClient:
    """A connection to a Store of its own, for one thread at a time. The Store's errors become ours.

    Args:
        store: the Store to connect to. It is cloned: a client that waits blocks its other users.

    Raises:
        StoreUnreachable: it cannot be connected to.
    """

    def __init__(self, store: Store) -> None:
        try:
            self._store: Store = store.clone()  # type: ignore[attr-defined]  # torch's stub lacks it
        except RuntimeError as error:
            raise _unreachable("another connection") from error

    def create(self, key: str, value: bytes) -> bytes:
        """Stores the value if there is none; returns what is there. Unlike a plain set, it is answered."""
        try:
            return self._store.compare_set(key, "", value)  # type: ignore[arg-type]  # it takes bytes as well
        except RuntimeError as error:
            raise _unreachable(key) from error

    def read(self, key: str) -> bytes:
        """Returns what is there; something is."""
        try:
            value = self._store.get(key)
        except RuntimeError as error:
            raise _unreachable(key) from error
        if len(value) > MAX_VALUE_BYTES + 1:
            raise DTRuntimeError(f"the Store has {len(value)} bytes at {key!r}; we never put so many there")
        return value

    def exist(self, keys: list[str]) -> bool:
        """Whether there is something at each of the keys."""
        try:
            return not keys or self._store.check(keys)
        except RuntimeError as error:
            raise _unreachable(keys[0]) from error

    def wait(self, keys: list[str], seconds: float) -> bool:
        """Waits until there is something at each of the keys; returns whether there is."""
        if not keys:
            return True
        try:
            # Less than a millisecond would be taken for no limit.
            self._store.wait(keys, timedelta(seconds=max(seconds, 0.01)))
        except dist.DistStoreError:
            return False
        except RuntimeError as error:
            if str(error) == _FILE_STORE_TIMEOUT:
                return False
            raise _unreachable(keys[0]) from error
        return True

    def delete(self, keys: Iterable[str]) -> None:
        """Deletes what is there."""
        for key in keys:
            try:
                self._store.delete_key(key)
            except RuntimeError as error:
                raise _unreachable(key) from error


def encode_value(value: bytes) -> bytes:
    """Makes bytes something that can be stored.

    Raises:
        InvalidArgument: there are more than 64 MiB of them.

    Example:
        >>> encode_value(b"")
        b'='
    """
    if len(value) > MAX_VALUE_BYTES:
        raise InvalidArgument(f"{len(value)} bytes are too many for the Store; {MAX_VALUE_BYTES} are allowed")
    return _VALUE + value


def encode_error(error: BaseException) -> bytes:
    """Makes an error something that can be stored.

    Example:
        >>> decode(encode_error(InvalidArgument("no")))
        InvalidArgument('no')
    """
    return _ERROR + json.dumps(errors.to_record(error)).encode()


def decode(stored: bytes, before: str = "") -> bytes | DTRuntimeError:
    """Returns the value or the error that another rank stored.

    Args:
        stored: as it was read.
        before: goes before the message of an error.
    """
    if stored[:1] == _VALUE:
        return stored[1:]
    record = parse_json(stored[1:])
    if stored[:1] != _ERROR or not isinstance(record, dict) or set(record) - {"errno"} != {"type", "message"}:
        return DTRuntimeError(
            f"the Store has {stored[:40]!r}, which says nothing; do all ranks run one version?"
        )
    fields = {**record, "type": str(record["type"]), "message": f"{before}{record['message']}"}
    return errors.from_record(fields, fallback=DTRuntimeError)


def parse_json(data: bytes) -> object:
    """Parses JSON from another rank; None where it is none."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _unreachable(key: str) -> StoreUnreachable:
    return StoreUnreachable(
        f"the Store no longer answers (asked for {key!r}): the process that keeps it, rank 0 or torchrun's agent, "
        f"has ended or cannot be reached; look at its log and start the job again"
    )
