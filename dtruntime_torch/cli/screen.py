"""What is printed, to a terminal or into a pipe."""

from __future__ import annotations

from rich.console import Console

# Into a pipe nothing is cut: who reads it may look for a word.
PIPE_COLUMNS = 100_000


def screen() -> Console:
    """Where results go."""
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = PIPE_COLUMNS
    return console


def count(number: int, what: str) -> str:
    """A number of things, in words.

    Example:
        >>> count(1, "chunk"), count(0, "chunk")
        ('1 chunk', '0 chunks')
    """
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def one_line(text: str) -> str:
    r"""Text as it may be shown: on one line, and with nothing in it that a terminal would obey.

    Example:
        >>> print(one_line("a tensor\nnamed \x1b[2J"))
        a tensor\nnamed \x1b[2J
    """
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
