"""DCP's calls in one process, for the tests beside this file."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

import dtruntime_torch as dt
from dtruntime_torch.errors import DTRuntimeError

State = dict[str, Any]


def save(state: State, writer: dt.StorageWriter | Path, **options: Any) -> Metadata:
    """Saves through DCP; to a folder by a writer with the defaults."""
    writer = dt.StorageWriter(writer) if isinstance(writer, Path) else writer
    with _alone():
        return dcp_save(state, storage_writer=writer, no_dist=True, **options)


def load(state: State, reader: dt.StorageReader | HuggingFaceStorageReader | Path, **options: Any) -> State:
    """Loads through DCP, in place; from a folder by a reader of ours."""
    reader = dt.StorageReader(reader) if isinstance(reader, Path) else reader
    with _alone():
        dcp_load(state, storage_reader=reader, no_dist=True, **options)
    return state


def load_stock(state: State, folder: Path) -> State:
    """Loads by the stock reader of safetensors files."""
    return load(state, HuggingFaceStorageReader(str(folder)))


def load_whole(folder: Path) -> State:
    """Loads all that there is, without a state to fill."""
    with _alone():
        return _load_state_dict_from_keys(storage_reader=dt.StorageReader(folder))


def equal(left: Any, right: Any) -> bool:
    """Whether two states are of the same types, with the same bits."""
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor):
        return (left.dtype, left.shape) == (right.dtype, right.shape) and raw(left) == raw(right)
    if isinstance(left, dict):
        return list(left) == list(right) and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(equal, left, right))
    return bool(left == right)


def raw(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor."""
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


@contextmanager
def refused(kind: type[DTRuntimeError], match: str | None = None) -> Iterator[list[DTRuntimeError]]:
    """What DCP wraps must be of this kind; the list holds it afterwards."""
    found: list[DTRuntimeError] = []
    with pytest.raises(CheckpointException, match=match) as caught:
        yield found
    ((error, _),) = caught.value.failures.values()
    assert isinstance(error, kind), error
    found.append(error)


@contextmanager
def refused_to_read(match: str) -> Iterator[None]:
    """DCP keeps what was wrong with the metadata only in words."""
    with pytest.raises(CheckpointException, match=match) as caught:
        yield
    ((error, _),) = caught.value.failures.values()
    assert isinstance(error, AssertionError) and "metadata read failed" in str(error)


@contextmanager
def _alone() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*single process.*")
        yield
