"""What of an error arrives on another rank."""

from __future__ import annotations

import errno
import json
import pickle

import pytest

from dtruntime_torch.errors import (
    AlreadyExists,
    DTRuntimeError,
    NotFound,
    SaveFailed,
    StorageError,
    UnsuitableStorage,
    from_record,
    to_record,
)
from dtruntime_torch.membership import HashStore
from dtruntime_torch.store import decode, encode_error
from tests.meeting_ranks import barriers, together


def full() -> StorageError:
    error = StorageError("the disk is full")
    error.errno = errno.ENOSPC
    return error


def test_the_errno_of_an_error_reaches_all_ranks():
    def announce() -> bytes:
        raise full()

    found = together(barriers(HashStore(), 2), lambda rank: rank.announce("pick", announce))
    assert [(type(error), error.errno) for error in found] == [(StorageError, errno.ENOSPC)] * 2


@pytest.mark.parametrize("kind", [StorageError, NotFound, AlreadyExists, UnsuitableStorage])
def test_the_errno_of_an_error_outlives_a_pickle(kind):
    error = kind("no room")
    error.errno = errno.ENOSPC
    # As torch.distributed sends it to other ranks.
    found = pickle.loads(pickle.dumps(error))  # noqa: S301  # ours
    assert (type(found), str(found), found.errno) == (kind, "no room", errno.ENOSPC)


def test_an_error_without_errno_arrives_without():
    error = decode(encode_error(StorageError("no answer")))
    assert isinstance(error, StorageError) and error.errno is None


@pytest.mark.parametrize("code", ["28", None, [28]])
def test_an_errno_that_is_no_number_is_left_out(code):
    told = b"!" + json.dumps({**to_record(full()), "errno": code}).encode()
    error = decode(told)
    assert isinstance(error, StorageError) and (str(error), error.errno) == ("the disk is full", None)


def test_what_is_none_of_ours_becomes_the_fallback_with_its_words():
    error = from_record(to_record(OSError(errno.ENOSPC, "full")), SaveFailed)
    assert type(error) is SaveFailed and str(error) == f"OSError: [Errno {errno.ENOSPC}] full"


def test_a_record_with_other_fields_is_of_another_version():
    error = decode(b"!" + json.dumps({**to_record(full()), "more": 1}).encode())
    assert type(error) is DTRuntimeError and "one version" in str(error)
