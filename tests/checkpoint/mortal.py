"""Processes that die at a storage call: from there on, none of their calls takes place."""

from __future__ import annotations

import threading

from dtruntime_torch.storage import StorageBackend
from dtruntime_torch.testing.faulty_backend import Call, FaultyBackend


class Dead(BaseException):
    """What the caller of a dead process's storage sees. Nothing catches it, as nothing survives a SIGKILL."""


class Mortal(FaultyBackend):
    """A storage whose process dies at its call `at`, counted from 1: before that takes effect, or after.

    Args:
        inner: what outlives the process.
        at: which call; None for none.
        after: whether that call still takes effect.
    """

    def __init__(self, inner: StorageBackend, at: int | None = None, after: bool = False) -> None:
        super().__init__(inner)
        self._at = at
        self._after = after
        self._count = 0
        self._count_lock = threading.Lock()
        self.when("*", "*", self._meet, nth=None)

    def die_at(self, at: int, after: bool) -> None:
        """It will die at that call, counted from now."""
        with self._count_lock:
            self._at, self._after, self._count = at, after, 0

    async def _meet(self, call: Call) -> object:
        with self._count_lock:
            self._count += 1
            number = self._count
        if self._at is None or number < self._at:
            return await call.proceed()
        if number == self._at and self._after:
            await call.proceed()
        raise Dead(f"at call {self._at}, {call.operation} of {call.path}")
