"""`dtruntime prune`: checkpoints that are not to stay are deleted, and what died while it was saved."""

from __future__ import annotations

from typing import Annotated, Literal

import typer
from rich.filesize import decimal

from dtruntime_torch.checkpoint.cleaning.cleaner import Cleaner
from dtruntime_torch.checkpoint.cleaning.prune_plan import PruneReport
from dtruntime_torch.checkpoint.cleaning.retention import KeepBest, RetentionPolicy
from dtruntime_torch.cli.place import find_place
from dtruntime_torch.cli.screen import count, one_line, screen
from dtruntime_torch.errors import CheckpointNotFound, InvalidArgument
from dtruntime_torch.storage import StorageBackend, run_sync

BEST = "Keep the one with the least METRIC of its metadata, or the greatest with METRIC:max."


def prune(
    path: Annotated[str, typer.Argument(help="The folder of checkpoints, or one <name> below it.")],
    name: Annotated[str | None, typer.Argument(help="Which name; all of them without it.")] = None,
    *,
    keep_last: Annotated[int | None, typer.Option(min=1, help="Keep that many of the newest.")] = None,
    keep_every: Annotated[
        int | None, typer.Option(min=1, help="Keep those whose step is a multiple of it.")
    ] = None,
    keep_best: Annotated[str | None, typer.Option(metavar="METRIC[:max]", help=BEST)] = None,
    pin: Annotated[list[int] | None, typer.Option(min=0, help="Keep this step; may be repeated.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Delete nothing, only tell.")] = False,
) -> None:
    """Deletes what no option keeps, and what jobs left that died; the newest checkpoint always stays.

    At least one option must say what to keep. Works beside a job that saves. Exits with 1 when something stays that should go.
    """
    best = None if keep_best is None else _parse_best(keep_best)
    if keep_last is None and keep_every is None and best is None and not pin:
        raise InvalidArgument("say what to keep: give --keep-last, --keep-every, --keep-best or --pin")
    policy = RetentionPolicy(1 if keep_last is None else keep_last, keep_every, best, frozenset(pin or ()))
    place = find_place(path)
    if name is not None and name not in place.names:
        raise CheckpointNotFound(f"there is no checkpoint called {name} in {path}")
    say_if_slow(place.backend, dry_run)
    blocked = False
    for one in place.names if name is None else (name,):
        report = run_sync(Cleaner(place.backend, one, policy).prune(dry_run=dry_run))
        print_report(one, report)
        blocked = blocked or bool(report.blocked)
    if blocked:
        raise typer.Exit(1)


def say_if_slow(backend: StorageBackend, dry_run: bool = False) -> None:
    """Tells who waits why it takes so long."""
    if backend.settle_seconds and not dry_run:
        typer.echo(
            f"on a network file system files go only when other hosts see that their commits are gone: this takes "
            f"{backend.settle_seconds:g} s for each name where something is deleted",
            err=True,
        )


def print_report(name: str, report: PruneReport) -> None:
    """A line for each checkpoint and each reason why something stays, and one with the sum."""
    out = screen()
    verb = "would be deleted" if report.dry_run else "deleted"
    for key in report.commits:
        out.print(f"{name} step {key.step} generation {key.generation}: {verb}")
    for reason in report.blocked:
        out.print(one_line(reason))
    for reason in report.in_use:
        out.print(f"{name}: {one_line(reason)}")
    out.print(
        f"{name}: {count(len(report.commits), 'checkpoint')} and the files of "
        f"{count(len(report.attempts), 'attempt')} {verb}, {decimal(report.nbytes)}"
    )


def _parse_best(text: str) -> KeepBest:
    metric, _, mode = text.rpartition(":")
    modes: dict[str, Literal["min", "max"]] = {"min": "min", "max": "max"}
    if mode in modes and metric:
        return KeepBest(metric, mode=modes[mode])
    if not text:
        raise InvalidArgument("--keep-best needs the name of a metric")
    return KeepBest(text)
