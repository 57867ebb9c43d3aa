"""Which checkpoints stay, as a value. Pure: what is known of them comes in, what to keep goes out."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from dtruntime_torch.checkpoint.names import CommitKey
from dtruntime_torch.checkpoint.objects import Json
from dtruntime_torch.counts import check_count
from dtruntime_torch.errors import InvalidArgument


@dataclass(frozen=True, slots=True)
class KeepBest:
    """Keeps those with the best value of a metric.

    A checkpoint whose metadata lacks it, or has NaN or no number there, counts as the worst. Of equals the newest is best.

    Attributes:
        metric: its key in the metadata that was given to `save`.
        n: how many stay.
        mode: whether the least or the greatest value is the best.

    Raises:
        InvalidArgument: one of them is out of range.

    Example:
        >>> KeepBest("accuracy", n=2, mode="max")
        KeepBest(metric='accuracy', n=2, mode='max')
    """

    metric: str
    n: int = 1
    mode: Literal["min", "max"] = "min"

    def __post_init__(self) -> None:
        if type(self.metric) is not str or not self.metric:
            raise InvalidArgument(f"the metric of keep_best is {self.metric!r}; it is a key of the metadata")
        check_count("n of keep_best", self.n)
        if self.mode not in ("min", "max"):
            raise InvalidArgument(f"the mode of keep_best is {self.mode!r}; it is 'min' or 'max'")


@dataclass(frozen=True, slots=True)
class RetentionPolicy:
    """What stays is all that any of these keeps, and always the newest checkpoint.

    A step that several generations saved, since a job went back and came by again, stays as the newest saved it.

    Attributes:
        keep_last_n: that many of the newest; None keeps all.
        keep_every_n_steps: those whose step is a multiple of this.
        keep_best: those with the best values of a metric.
        pinned_steps: these steps.

    Raises:
        InvalidArgument: one of them is out of range.

    Example:
        >>> policy = RetentionPolicy(keep_last_n=1, keep_every_n_steps=100)
        >>> sorted(policy.kept({CommitKey(1, step): None for step in (100, 150, 160)}))
        [CommitKey(generation=1, step=100), CommitKey(generation=1, step=160)]
    """

    keep_last_n: int | None = None
    keep_every_n_steps: int | None = None
    keep_best: KeepBest | None = None
    pinned_steps: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if self.keep_last_n is not None:
            check_count("keep_last_n", self.keep_last_n)
        if self.keep_every_n_steps is not None:
            check_count("keep_every_n_steps", self.keep_every_n_steps)
        if not (self.keep_best is None or isinstance(self.keep_best, KeepBest)):
            raise InvalidArgument(
                f"keep_best is {self.keep_best!r}; it is a KeepBest, such as KeepBest('loss')"
            )
        for step in self.pinned_steps:
            if type(step) is not int or step < 0:
                raise InvalidArgument(f"{step!r} of pinned_steps is no step; a step is an integer from 0")

    def kept(self, metadata: Mapping[CommitKey, Json]) -> set[CommitKey]:
        """Chooses what stays.

        Args:
            metadata: of every checkpoint that there is, as it was given to `save`.
        """
        if self.keep_last_n is None:
            return set(metadata)
        in_order = sorted(metadata)
        kept = set(in_order[-self.keep_last_n :])
        kept |= {key for key in _newest_of_each_step(in_order) if self._keeps_step(key.step)}
        if self.keep_best is not None:
            ranked = sorted(in_order, key=lambda key: _rank(self.keep_best, metadata[key], key))
            kept |= set(ranked[-self.keep_best.n :])
        return kept

    def missed_metric(self, metadata: Mapping[CommitKey, Json]) -> str | None:
        """What is amiss if `keep_best` has nothing to choose by; None if some checkpoint has the metric.

        Args:
            metadata: as for `kept`.
        """
        best = self.keep_best
        if best is None or not metadata or any(_value(best, one) is not None for one in metadata.values()):
            return None
        newest = max(metadata)
        told = metadata[newest]
        keys = sorted(told) if isinstance(told, dict) else []
        return (
            f"keep_best goes by {best.metric!r}, and no checkpoint has a number of that name in its metadata: that "
            f"of the newest, step {newest.step}, has the keys {keys}"
        )

    def _keeps_step(self, step: int) -> bool:
        every = self.keep_every_n_steps
        return step in self.pinned_steps or (every is not None and step % every == 0)


KEEP_ALL = RetentionPolicy()


def _newest_of_each_step(in_order: Collection[CommitKey]) -> Collection[CommitKey]:
    return {key.step: key for key in in_order}.values()


def _rank(best: KeepBest | None, metadata: Json, key: CommitKey) -> tuple[float, CommitKey]:
    """Greater is better; of equals the newest."""
    value = _value(best, metadata)
    if best is None or value is None or math.isnan(value):
        return -math.inf, key
    return (value if best.mode == "max" else -value), key


def _value(best: KeepBest | None, metadata: Json) -> float | None:
    """The metric; None where there is no number."""
    value = metadata.get(best.metric) if best is not None and isinstance(metadata, dict) else None
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
