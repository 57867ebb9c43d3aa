"""What one manager knows of its own line of checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, field

from dtruntime_torch.checkpoint.names import CommitKey
from dtruntime_torch.checkpoint.saving.delta import Base
from dtruntime_torch.checkpoint.specs import Members
from dtruntime_torch.errors import InvalidArgument


@dataclass(slots=True)
class Lineage:
    """Where the next save of a manager stands; every rank keeps the same, but for its own part in `base`.

    Attributes:
        loaded: whether a checkpoint was loaded, so that saves go on from it.
        seen: the newest commit that there was when it was loaded.
        generation: claimed for this line, or None before its first save.
        parent: the last commit that this manager knows of.
        last_step: the highest step of this generation whose commit is decided or unknown.
        base: this rank's part of `parent`, against which the next delta is; None if this manager did not save that.
        damaged: commits that were found to be damaged; a base that goes back to one is none. Any thread adds to it,
            also while a save is under way, which has its base already.
    """

    loaded: bool = False
    seen: CommitKey | None = None
    generation: int | None = None
    parent: CommitKey | None = None
    last_step: int = -1
    base: Base | None = None
    damaged: set[CommitKey] = field(default_factory=set)

    def follow(self, loaded: CommitKey, newest: CommitKey) -> None:
        """Goes on from a checkpoint; the next save claims a generation of its own.

        Args:
            loaded: what was loaded.
            newest: the newest commit that there was at that time.
        """
        self.loaded, self.seen, self.parent = True, newest, loaded
        self.generation, self.last_step, self.base = None, -1, None

    def deltas_with(self, full: bool) -> int:
        """How many deltas there are since the last full save, one more counted that is `full` or not."""
        return 0 if full or self.base is None else self.base.deltas + 1

    def distrust(self, key: CommitKey) -> None:
        """Notes that a commit is damaged: nothing is built on it any more."""
        self.damaged.add(key)

    def base_of(self, members: Members) -> Base | None:
        """The base of a save of ranks that hold what `members` says; None if it is to be in full.

        Sizes of what is a rank's own are not in there, so that all ranks choose alike when it grows on some of them.
        Where ranks know of different damage they come with different bases, and the leader has all save in full.
        """
        base = self.base
        if base is None or base.members != members:
            return None
        goes_back = any(base.since <= key <= base.commit.key for key in tuple(self.damaged))
        return None if goes_back else base

    def check_step(self, step: int) -> None:
        """Refuses a step that does not rise.

        Raises:
            InvalidArgument: naming both steps.
        """
        if step <= self.last_step:
            raise InvalidArgument(
                f"step {step} is not above {self.last_step}, the last step that this manager saved; "
                f"steps must rise; to go back, load an earlier checkpoint first"
            )
