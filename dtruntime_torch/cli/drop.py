"""`dtruntime drop`: one attempt to save is given up for good, whether or not it can be read."""

from __future__ import annotations

from typing import Annotated

import typer

from dtruntime_torch.checkpoint import names
from dtruntime_torch.checkpoint.cleaning.cleaner import Cleaner
from dtruntime_torch.cli.place import find_root
from dtruntime_torch.cli.prune import print_report, say_if_slow
from dtruntime_torch.cli.screen import screen
from dtruntime_torch.errors import InvalidArgument
from dtruntime_torch.storage import run_sync


def drop(
    path: Annotated[str, typer.Argument(help="The folder of checkpoints, or the one NAME below it.")],
    name: Annotated[str, typer.Argument(help="The name of the checkpoint.")],
    attempt: Annotated[str, typer.Argument(help="Its folder, such as step-00000100/0007-1.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do it; it cannot be undone.")] = False,
) -> None:
    """Deletes one attempt to save, committed or not, damaged or not, so that it blocks no prune.

    Files that another checkpoint needs stay. Exits with 1 when something stays that should go.
    """
    names.check_name(name)
    found = names.parse_attempt(attempt.rstrip("/"))
    if found is None:
        raise InvalidArgument(
            f"{attempt!r} is no attempt; give its folder below {name}/, such as step-00000100/0007-1"
        )
    if not yes:
        raise InvalidArgument(
            f"step {found.step} of {name}, as generation {found.generation} saved it, would be deleted for good; "
            f"repeat the command with --yes if nobody needs it"
        )
    backend = find_root(path, name, found)
    say_if_slow(backend)
    report = run_sync(Cleaner(backend, name).drop(found))
    screen().print(f"{name} {found.path}: given up")
    print_report(name, report)
    if report.blocked:
        raise typer.Exit(1)
