"""Numbers that users hand in as options, checked where they come in: the one check of the package for each kind."""

from __future__ import annotations

import threading
from numbers import Real

from dtruntime_torch.errors import InvalidArgument


def check_count(what: str, count: object, least: int = 1, most: int | None = None) -> int:
    """Returns a count as it is.

    Args:
        what: the name that the user knows it by.
        count: True and False are none.
        least: it is not less.
        most: it is not more; None for no such limit.

    Raises:
        InvalidArgument: it is no int, or out of range.

    Example:
        >>> check_count("attempts", 3)
        3
    """
    if isinstance(count, bool) or not isinstance(count, int) or not least <= count <= (most or count):
        limit = "" if most is None else f" to {most}"
        raise InvalidArgument(f"{what} is {count!r}; it is a whole number from {least}{limit}")
    return count


def check_number(what: str, number: object) -> float:
    """Returns a number as a float; its range is the caller's to check, and "not a number" is in none.

    Raises:
        InvalidArgument: it is no number, or True or False.

    Example:
        >>> check_number("timeout", 60)
        60.0
    """
    if isinstance(number, bool) or not isinstance(number, Real):
        raise InvalidArgument(f"{what} is {number!r}; it is a number")
    return float(number)


def check_seconds(what: str, seconds: object) -> float:
    """Returns how long something is waited for.

    Raises:
        InvalidArgument: it is no number, not above 0, or longer than a thread can wait.

    Example:
        >>> check_seconds("timeout", 60)
        60.0
    """
    found = check_number(what, seconds)
    if not 0 < found <= threading.TIMEOUT_MAX:
        raise InvalidArgument(f"{what} is {seconds}; it is a positive number of seconds, and a finite one")
    return found
