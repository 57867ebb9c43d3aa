"""What is on its way out, in the order that keeps all that is named: it is remembered until it is done.

For each removal: first no commit, durably, then no manifest, then, once other hosts see that, the look, then the
files that nothing names. A process may die between any two calls: what is left then is swept by the next one.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from dtruntime_torch.checkpoint.cleaning import look
from dtruntime_torch.checkpoint.cleaning.look import Manifests
from dtruntime_torch.checkpoint.commit import Patience
from dtruntime_torch.storage.backend import StorageBackend


class Removal(Protocol):
    """Something that is about to go."""

    @property
    def victims(self) -> frozenset[str]:
        """The attempts whose files go unless a manifest names them."""

    async def clear(self, backend: StorageBackend, patience: Patience) -> bool:
        """Makes sure that it is not committed and has no manifest; may be called again. False: it stays."""


@dataclass(slots=True)
class Pending:
    """A removal on its way.

    Attributes:
        removal: what goes.
        cleared: when it was no longer committed and had no manifest any more; None before.
    """

    removal: Removal
    cleared: float | None = None


class Removals:
    """All removals of one process under one name.

    Args:
        backend: where they lie.
        name: of the checkpoint.
        manifests: those that were read before.
        clock: seconds that only rise.
        sleep: waits so many seconds.

    Attributes:
        pending: those that are not done.
    """

    def __init__(
        self,
        backend: StorageBackend,
        name: str,
        manifests: Manifests,
        clock: Callable[[], float],
        sleep: Callable[[float], Awaitable[object]],
    ) -> None:
        self._backend = backend
        self._name = name
        self._manifests = manifests
        self._clock = clock
        self._sleep = sleep
        self._patience = Patience(clock=clock, sleep=sleep)
        self.pending: list[Pending] = []

    def note(self, removal: Removal) -> Pending:
        """Remembers what is to go, before the first of it does."""
        self.pending.append(Pending(removal))
        return self.pending[-1]

    async def work_off(self, faults: list[str], wait: bool = False) -> set[str]:
        """Takes everything as far as it goes now; the rest stays noted.

        Args:
            faults: why something stays; more are added.
            wait: until other hosts are sure to see what was cleared; else that is left for a later call.

        Returns:
            The attempts whose files were deleted.
        """
        await self._clear_all(faults)
        while wait and (left := max(map(self._seconds_left, self.pending), default=0.0)) > 0:
            await self._sleep(left)
        return await self._delete_all(faults)

    async def _clear_all(self, faults: list[str]) -> None:
        for pending in [pending for pending in self.pending if pending.cleared is None]:
            try:
                if await pending.removal.clear(self._backend, self._patience):
                    pending.cleared = self._clock()
                else:
                    self.pending.remove(pending)
            except Exception as error:
                faults.append(explain(error))

    def _seconds_left(self, pending: Pending) -> float:
        """Until other hosts are sure to see that it was cleared."""
        if pending.cleared is None:
            return 0.0
        return pending.cleared + self._backend.settle_seconds - self._clock()

    async def _delete_all(self, faults: list[str]) -> set[str]:
        """Deletes the files of what was cleared long enough ago; returns the attempts of which none is left."""
        due = [p for p in self.pending if p.cleared is not None and self._seconds_left(p) <= 0]
        if not due:
            return set()
        try:
            needed = await look.needed(self._backend, self._name, self._manifests)
        except Exception as error:
            faults.append(explain(error))
            return set()
        victims = frozenset[str]().union(*(pending.removal.victims for pending in due)) - needed
        deleted = set()
        for victim in sorted(victims):
            try:
                await _delete_files(self._backend, self._name, victim)
                deleted.add(victim)
            except Exception as error:
                faults.append(explain(error))
        remaining = victims - deleted
        self.pending = [p for p in self.pending if p not in due or p.removal.victims & remaining]
        return deleted


async def _delete_files(backend: StorageBackend, name: str, attempt: str) -> None:
    """Deletes all that lies in the folder of an attempt, also what was never finished."""
    folder = f"{name}/{attempt}/"
    for entry in await backend.list(folder):
        await backend.delete(entry.path)
    await backend.discard_unfinished(folder)


def explain(error: Exception) -> str:
    """What an error says, or at least what it is."""
    return str(error) or repr(error)
