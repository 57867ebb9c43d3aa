"""What users hand to a save or a load beside the state, checked."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from dtruntime_torch.checkpoint.format import strict_json
from dtruntime_torch.checkpoint.format.metadata_json import metadata_from_json, metadata_to_json
from dtruntime_torch.checkpoint.names import MAX_INTEGER
from dtruntime_torch.checkpoint.objects import Json
from dtruntime_torch.errors import InvalidArgument


def check_step(step: object) -> int:
    """Returns the step as an int.

    Raises:
        InvalidArgument: it is no integer from 0 to 2**53 - 1.

    Example:
        >>> check_step(7)
        7
    """
    try:
        number = operator.index(step)  # type: ignore[arg-type]
    except TypeError:
        number = -1
    if isinstance(step, bool) or not 0 <= number <= MAX_INTEGER:
        raise InvalidArgument(f"step is {step!r}; it is an integer from 0 to {MAX_INTEGER}")
    return number


def check_pinned(steps: Iterable[int]) -> frozenset[int]:
    """Returns the steps that are to stay, each once.

    Raises:
        InvalidArgument: they cannot be gone through, or are no numbers.

    Example:
        >>> sorted(check_pinned([7, 3, 7]))
        [3, 7]
    """
    try:
        return frozenset(check_step(step) for step in steps)
    except (TypeError, InvalidArgument) as error:
        raise InvalidArgument(f"pinned_steps is {steps!r}; give the steps, as [1000, 5000]") from error


def check_keys(keys: object) -> tuple[str, ...] | None:
    """Returns names to load, in order and each once; None are all.

    Raises:
        InvalidArgument: it is no collection of names, or an empty one.

    Example:
        >>> check_keys(["model.head", "epoch"])
        ('epoch', 'model.head')
    """
    if keys is None:
        return None
    if isinstance(keys, str) or not isinstance(keys, Collection) or not all(isinstance(k, str) for k in keys):
        raise InvalidArgument(f"keys is {keys!r}; give a list of names, as ['model.head', 'epoch']")
    if not keys or "" in keys:
        raise InvalidArgument("keys has no name in it, or an empty one; leave it out to load everything")
    return tuple(sorted(set(keys)))


def check_metadata(metadata: object) -> Json:
    """Returns metadata that comes back from a manifest as it is: JSON, and any float in it.

    Raises:
        InvalidArgument: it is something else, would come back as something else, or is nested more than 64 deep.
    """
    try:
        encoded = metadata_to_json(metadata)  # type: ignore[arg-type]
        kept = strict_json.parse(strict_json.dump({"metadata": encoded})).json("metadata")
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"metadata cannot be kept as JSON: {error}") from error
    if kept != encoded:
        raise InvalidArgument("metadata would not come back from JSON as it is; use str keys and lists")
    return metadata_from_json(kept)


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """What a load is asked for.

    Attributes:
        step: by number, or None for the newest sound one.
        keys: the names to fill, and what lies below them; None for all.
        strict: names that only one side has are an error.
        all_or_nothing: nothing is filled before all that is read was checked.
    """

    step: int | None = None
    keys: Collection[str] | None = None
    strict: bool = True
    all_or_nothing: bool = False

    def checked(self) -> LoadOptions:
        """These options with checked types; two that mean the same are equal.

        Raises:
            InvalidArgument: as `check_step` and `check_keys` raise it.
        """
        step = None if self.step is None else check_step(self.step)
        return LoadOptions(step, check_keys(self.keys), bool(self.strict), bool(self.all_or_nothing))

    def __str__(self) -> str:
        keys = "" if self.keys is None else f" with keys {list(self.keys)}"
        flags = "" if self.strict else " with strict=False"
        flags += " with all_or_nothing=True" if self.all_or_nothing else ""
        return f"step {self.step}{keys}{flags}"
