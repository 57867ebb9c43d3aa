"""The commands, put together, and how an error looks to who types them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec

import typer

from dtruntime_torch.cli.diff import diff
from dtruntime_torch.cli.drop import drop
from dtruntime_torch.cli.ls import ls
from dtruntime_torch.cli.prune import prune
from dtruntime_torch.cli.screen import one_line
from dtruntime_torch.cli.verify import verify
from dtruntime_torch.errors import DTRuntimeError

P = ParamSpec("P")


def _with_errors_in_one_line(command: Callable[P, None]) -> Callable[P, None]:
    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except DTRuntimeError as error:
            typer.echo(f"error: {one_line(str(error))}", err=True)
            raise typer.Exit(2) from error

    return run


app = typer.Typer(
    help="Shows checkpoints, checks, compares and deletes them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(_with_errors_in_one_line(ls))
app.command()(_with_errors_in_one_line(verify))
app.command()(_with_errors_in_one_line(diff))
app.command()(_with_errors_in_one_line(prune))
app.command()(_with_errors_in_one_line(drop))
