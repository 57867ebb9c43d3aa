"""`dtruntime verify`: every byte of a checkpoint is read and compared with its digests."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from dtruntime_torch.checkpoint.names import CommitKey
from dtruntime_torch.checkpoint.verify import VerifyReport, find_commit
from dtruntime_torch.checkpoint.verify import verify as verify_checkpoint
from dtruntime_torch.cli.place import Place, find_place
from dtruntime_torch.cli.screen import count, one_line, screen
from dtruntime_torch.errors import CheckpointNotFound
from dtruntime_torch.storage import StorageBackend, run_sync


def verify(
    path: Annotated[str, typer.Argument(help="The folder of checkpoints, or one <name> below it.")],
    step: Annotated[int | None, typer.Option(min=0, help="Which step; the newest without it.")] = None,
) -> None:
    """Checks the newest checkpoint of each name, or that of one step.

    Prints a line for each damaged range and exits with 1 when there is one.
    """
    place = find_place(path)
    sound = True
    for name, key in _chosen(place, step):
        report = _check(place.backend, name, key)
        _print(report)
        sound = sound and report.ok
    if not sound:
        raise typer.Exit(1)


def _chosen(place: Place, step: int | None) -> list[tuple[str, CommitKey]]:
    """The newest commit of each name that has one."""
    chosen, missing = [], []
    for name in place.names:
        try:
            chosen.append((name, run_sync(find_commit(place.backend, name, step))))
        except CheckpointNotFound as error:
            missing.append(error)
    if not chosen:
        raise missing[0]
    return chosen


def _check(backend: StorageBackend, name: str, key: CommitKey) -> VerifyReport:
    """Checks one checkpoint, with a bar where somebody watches."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"{name} step {key.step}", total=None)
        return run_sync(
            verify_checkpoint(
                backend,
                name,
                key,
                lambda done, total: progress.update(task, completed=done, total=total),
            )
        )


def _print(report: VerifyReport) -> None:
    out = screen()
    for damage in report.damage:
        out.print(one_line(str(damage)))
    verdict = "sound" if report.ok else f"damaged in {count(len(report.damage), 'place')}"
    out.print(
        f"{report.name} step {report.step} generation {report.generation}: {verdict}; checked "
        f"{count(report.tensors, 'tensor')}, {count(report.chunks, 'chunk')}, {decimal(report.nbytes)}"
    )
