"""`dtruntime verify`: every byte of a checkpoint is read and compared with its digests."""

from __future__ import annotations

from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from dtruntime_torch.checkpoint import catalog
from dtruntime_torch.checkpoint.names import CommitKey
from dtruntime_torch.checkpoint.verify import VerifyReport, find_commit, is_committed
from dtruntime_torch.checkpoint.verify import verify as verify_checkpoint
from dtruntime_torch.cli.place import Place, find_place
from dtruntime_torch.cli.screen import count, one_line, screen
from dtruntime_torch.errors import CheckpointNotFound, InvalidArgument, NewerFormat
from dtruntime_torch.storage import StorageBackend, run_sync

Verdict = Literal["sound", "damaged", "newer", "gone"]


def verify(
    path: Annotated[str, typer.Argument(help="The folder of checkpoints, or one <name> below it.")],
    step: Annotated[int | None, typer.Option(min=0, help="Which step; the newest without it.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Every checkpoint, not only the newest.")] = False,
) -> None:
    """Checks the newest checkpoint of each name, or that of one step, or all of them, oldest first.

    Prints a line for each damaged range and one for each checkpoint. Exits with 1 when one is damaged or needs a
    later version of this package ("newer").
    """
    if every and step is not None:
        raise InvalidArgument("--all is every step, and --step one of them: give one of the two")
    place = find_place(path)
    chosen = _all_of(place) if every else _chosen(place, step)
    verdicts = set()
    for name, key in chosen:
        verdicts.add(_judge(place.backend, name, key))
    if not verdicts - {"gone"}:
        raise CheckpointNotFound(f"there is no checkpoint in {path}: each was given up or removed")
    if verdicts & {"damaged", "newer"}:
        raise typer.Exit(1)


def _all_of(place: Place) -> list[tuple[str, CommitKey]]:
    """Every commit that is not void, in the order of `ls`."""
    listed = [
        (name, key) for name in place.names for key in run_sync(catalog.commit_keys(place.backend, name))
    ]
    return [(name, key) for name, key in listed if run_sync(is_committed(place.backend, name, key))]


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


def _judge(backend: StorageBackend, name: str, key: CommitKey) -> Verdict:
    """Checks one checkpoint and prints what was found."""
    out = screen()
    which = f"{name} step {key.step} generation {key.generation}"
    try:
        report = _check(backend, name, key)
    except NewerFormat as error:
        out.print(f"{which}: newer; {one_line(str(error))}")
        return "newer"
    except CheckpointNotFound:
        out.print(f"{which}: gone; it was given up or removed meanwhile")
        return "gone"
    for damage in report.damage:
        out.print(one_line(str(damage)))
    verdict = "sound" if report.ok else f"damaged in {count(len(report.damage), 'place')}"
    out.print(
        f"{which}: {verdict}; checked {count(report.tensors, 'tensor')}, {count(report.chunks, 'chunk')}, "
        f"{decimal(report.nbytes)}"
    )
    return "sound" if report.ok else "damaged"


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
