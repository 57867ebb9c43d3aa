"""What the user of a manager chose about its saves, as one value: made at the manager's door and handed on whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from dtruntime_torch.checkpoint.cleaning.retention import KEEP_ALL, RetentionPolicy
from dtruntime_torch.checkpoint.saving.delta import DeltaPolicy
from dtruntime_torch.counts import check_seconds
from dtruntime_torch.errors import InvalidArgument
from dtruntime_torch.retry import RetryPolicy

OnFailure = Literal["warn", "raise"]
OnBusy = Literal["wait", "skip"]
Consistency = Literal["optimizer", "immediate"]
ONCE = RetryPolicy(attempts=1)


@dataclass(frozen=True, slots=True)
class SavePolicies:
    """How checkpoints are saved, and which of them stay.

    Attributes:
        chunk_bytes: bytes of a chunk.
        retention: which checkpoints stay.
        delta: when to save in full; None: always.
        retry: how often a save that storage failed is tried.
        on_failure: what becomes, at the next save, of a failure that nobody was told of.
        on_busy: what becomes of a save that finds the one before it under way.
        consistency: whether what optimizers own may be read until one steps, or all is read before the call returns.
        door_timeout: seconds that a step waits for what is read late; then that save is given up.
        paranoid: what is read late is digested before the call returns, too.

    Raises:
        InvalidArgument: one of the last five is none of what it may be.
    """

    chunk_bytes: int = 1 << 20
    retention: RetentionPolicy = KEEP_ALL
    delta: DeltaPolicy | None = None
    retry: RetryPolicy = ONCE
    on_failure: OnFailure = "warn"
    on_busy: OnBusy = "wait"
    consistency: Consistency = "optimizer"
    door_timeout: float = 60.0
    paranoid: bool = False

    def __post_init__(self) -> None:
        _check_choice("on_failure", self.on_failure, OnFailure)
        _check_choice("on_busy", self.on_busy, OnBusy)
        _check_choice("consistency", self.consistency, Consistency)
        check_seconds("door_timeout", self.door_timeout)
        if not isinstance(self.paranoid, bool):
            raise InvalidArgument(f"paranoid is {self.paranoid!r}; give True or False")


def choose_delta(delta: object) -> DeltaPolicy | None:
    """Makes a policy of what the user said.

    Raises:
        InvalidArgument: it says nothing.

    Example:
        >>> choose_delta(False), choose_delta(True) == DeltaPolicy()
        (None, True)
    """
    if isinstance(delta, bool):
        return DeltaPolicy() if delta else None
    if isinstance(delta, DeltaPolicy):
        return delta
    raise InvalidArgument(f"delta is {delta!r}; give True, False or a DeltaPolicy")


def choose_retry(retry: object) -> RetryPolicy:
    """Makes a policy of what the user said.

    Raises:
        InvalidArgument: it says nothing.

    Example:
        >>> choose_retry(None).attempts
        1
    """
    if not (retry is None or isinstance(retry, RetryPolicy)):
        raise InvalidArgument(f"retry is {retry!r}; give a RetryPolicy or None")
    return retry or ONCE


def _check_choice(name: str, value: object, choices: object) -> None:
    allowed = get_args(choices)
    if value not in allowed:
        named = " or ".join(f'"{choice}"' for choice in allowed)
        raise InvalidArgument(f"{name} is {value!r}; it is {named}")
