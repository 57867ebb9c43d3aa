"""What users hand to a save or a load beside the state, checked."""

from __future__ import annotations

import operator

from dtruntime_torch.checkpoint.format import strict_json
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


def check_metadata(metadata: object) -> Json:
    """Returns metadata that comes back from a manifest as it is.

    Raises:
        InvalidArgument: it is no JSON, or would come back as something else.
    """
    try:
        kept = strict_json.parse(strict_json.dump({"metadata": metadata})).json("metadata")  # type: ignore[dict-item]
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"metadata cannot be kept as JSON: {error}") from error
    if kept != metadata:
        raise InvalidArgument("metadata would not come back from JSON as it is; use str keys and lists")
    return kept
