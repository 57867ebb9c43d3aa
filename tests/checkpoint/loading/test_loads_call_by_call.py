"""Loads straight into place during which something happens at one storage call: at each of them in turn."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from typing_extensions import Buffer

import dtruntime_torch as dt
from dtruntime_torch.checkpoint.loading.load_together import HALF_FILLED
from dtruntime_torch.errors import DTRuntimeError, StorageError
from dtruntime_torch.storage import LocalBackend
from dtruntime_torch.storage.backend import Entry

State = dict[str, Any]


class Meeting(LocalBackend):
    """Lets something happen before its n-th call, counted from 0."""

    def __init__(self, root: Path, nth: int, event: Callable[[], object]) -> None:
        super().__init__(root)
        self._left, self._event = nth, event

    @property
    def happened(self) -> bool:
        return self._left < 0

    def _meet(self) -> None:
        self._left -= 1
        if self._left == -1:
            self._event()

    async def read(self, path: str) -> Buffer:
        self._meet()
        return await super().read(path)

    async def read_range(
        self, path: str, offset: int, length: int, *, into: memoryview | None = None
    ) -> Buffer:
        self._meet()
        return await super().read_range(path, offset, length, into=into)

    async def read_chunks(
        self, path: str, offsets: Sequence[int], into: Sequence[memoryview], chunk_bytes: int
    ) -> bytes:
        self._meet()
        return await super().read_chunks(path, offsets, into, chunk_bytes)

    async def size(self, path: str) -> int:
        self._meet()
        return await super().size(path)

    async def list(self, prefix: str, delimiter: str | None = None) -> list[Entry]:
        self._meet()
        return await super().list(prefix, delimiter)


def state_of(value: int) -> State:
    return {"a": torch.full((3000,), float(value)), "b": torch.full((5000,), float(value)), "value": value}


def is_whole(state: State) -> bool:
    return all(bool((state[name] == state["value"]).all()) for name in ("a", "b"))


def test_a_job_that_saves_and_deletes_at_any_call_leaves_no_mixture(tmp_path: Path) -> None:
    for nth in itertools.count():
        folder = tmp_path / str(nth)
        with dt.CheckpointManager(folder, keep_last_n=1, chunk_bytes=4096) as other:
            other.save(state_of(1), 1)
            backend = Meeting(folder, nth, partial(other.save, state_of(2), 2))
            state = state_of(0)
            with dt.CheckpointManager(backend) as manager:
                step = manager.load(state).step
        assert state["value"] == step and is_whole(state), nth
        if not backend.happened:
            assert nth > 5
            return


def test_a_storage_that_fails_at_any_call_leaves_the_state_whole_or_says_that_it_is_not(
    tmp_path: Path,
) -> None:
    with dt.CheckpointManager(tmp_path, chunk_bytes=4096) as manager:
        manager.save(state_of(1), 1)
        manager.save(state_of(2), 2)
    half_filled = 0
    for nth in itertools.count():
        backend, state, failure = Meeting(tmp_path, nth, fail), state_of(0), ""
        try:
            with dt.CheckpointManager(backend) as manager:
                manager.load(state)
        except DTRuntimeError as error:
            failure = str(error)
        if not backend.happened:
            assert state["value"] == 2 and is_whole(state) and not failure
            assert half_filled and nth > 5
            return
        assert "scripted" in failure and state["value"] == 0, nth
        assert is_whole(state) or HALF_FILLED in failure, nth
        half_filled += HALF_FILLED in failure


def fail() -> None:
    raise StorageError("scripted failure")
