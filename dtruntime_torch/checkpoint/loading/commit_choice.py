"""Which commit a load tries: the newest that did not turn out to be damaged, or that of the step it was asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dtruntime_torch.checkpoint import catalog
from dtruntime_torch.checkpoint.manifest import Commit
from dtruntime_torch.checkpoint.names import CommitKey
from dtruntime_torch.errors import CorruptCheckpoint, Damage
from dtruntime_torch.storage import StorageBackend, run_sync

OnDamage = Callable[[CommitKey], object]


class CommitChoice:
    """What one load has found out about the commits of a checkpoint.

    Args:
        backend: where the checkpoints lie.
        name: under which name.
        on_damage: called with each commit that is rejected.

    Attributes:
        backend, name: as given.
        notes: what the user has to be warned of, each once.
    """

    def __init__(self, backend: StorageBackend, name: str, on_damage: OnDamage | None) -> None:
        self.backend = backend
        self.name = name
        self.notes: list[str] = []
        self._on_damage = on_damage
        self._rejected: dict[CommitKey, Sequence[Damage]] = {}

    def pick(self, step: int | None) -> tuple[Commit, CommitKey]:
        """The newest commit that was not rejected, or the newest generation's of a step; and the newest there is.

        Raises:
            CheckpointNotFound: nothing is committed, or nothing at that step.
            CorruptCheckpoint: all that is committed is damaged, or what is committed at that step.
        """
        return run_sync(catalog.pick(self.backend, self.name, step, self._rejected, self.notes))

    def reject(self, commit: Commit, step: int | None, error: CorruptCheckpoint) -> None:
        """Goes on without a commit that is damaged.

        Raises:
            CorruptCheckpoint: that, where a step was asked for: then there is no falling back.
        """
        if self._on_damage is not None:
            self._on_damage(commit.key)
        if step is not None:
            raise error
        self._rejected[commit.key] = error.damage
        self.notes.append(f"{error}; it is passed over")

    def is_there(self, commit: Commit) -> bool:
        """Whether it is still committed: what a prune took away meanwhile is not damaged."""
        try:
            return run_sync(catalog.is_still_committed(self.backend, commit))
        except CorruptCheckpoint:
            return True
