"""`dtruntime ls`: one line for each checkpoint, from its manifest alone; no data is read."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Annotated

import typer
from rich.filesize import decimal
from rich.table import Table

from dtruntime_torch.checkpoint import catalog
from dtruntime_torch.checkpoint.format.metadata_json import metadata_to_json
from dtruntime_torch.checkpoint.format.records import Manifest
from dtruntime_torch.checkpoint.info import CheckpointInfo
from dtruntime_torch.checkpoint.names import CommitKey
from dtruntime_torch.checkpoint.verify import is_committed
from dtruntime_torch.cli.place import Place, find_place
from dtruntime_torch.cli.screen import one_line, screen
from dtruntime_torch.errors import CheckpointNotFound, CorruptCheckpoint, NewerFormat, NotFound
from dtruntime_torch.storage import StorageBackend, run_sync

SHA256_DIGITS = 12
TITLES = ("name", "step", "generation", "when", "ranks", "size", "written", "kind", "sha256")
NUMBERS = ("step", "generation", "ranks", "size", "written")


@dataclass(frozen=True, slots=True)
class _Line:
    """A checkpoint: its manifest and that one's SHA-256 in hex, or what it is instead, and why."""

    name: str
    key: CommitKey
    manifest: Manifest | None
    sha256: str
    instead: str
    fault: str


def ls(
    path: Annotated[str, typer.Argument(help="The folder of checkpoints, or one <name> below it.")],
    as_json: Annotated[bool, typer.Option("--json", help="All of each manifest, as JSON.")] = False,
) -> None:
    """Lists the checkpoints, oldest first.

    With --json each is an object on a line of its own: run, parent, versions, metadata and the ranks' parts, too. One
    that cannot be read has "fault" and "message" in their place.

    Exits with 1 when a manifest is damaged, or needs a later version of this package ("newer"). Whether the data is sound, `verify` tells.
    """
    lines = run_sync(_look(find_place(path)))
    if not lines:
        raise CheckpointNotFound(f"there is no checkpoint in {path}: each was given up or removed")
    if as_json:
        for line in lines:
            typer.echo(json.dumps(_object(line), allow_nan=False))
    else:
        _print_table(lines)
    if any(line.manifest is None for line in lines):
        raise typer.Exit(1)


async def _look(place: Place) -> list[_Line]:
    found = []
    for name in place.names:
        for key in await catalog.commit_keys(place.backend, name):
            line = await _line(place.backend, name, key)
            if line is not None:
                found.append(line)
    return found


async def _line(backend: StorageBackend, name: str, key: CommitKey) -> _Line | None:
    """One checkpoint; None where it was given up, or removed since it was listed."""
    try:
        commit = await catalog.read_commit(backend, name, key)
        if commit.void:
            return None
        manifest = await catalog.read_manifest(backend, commit)
    except NotFound:
        return None
    except CorruptCheckpoint as error:
        fault = _Line(name, key, None, "", "damaged", str(error))
        return fault if await is_committed(backend, name, key) else None
    except NewerFormat as error:
        return _Line(name, key, None, "", "newer", str(error))
    return _Line(name, key, manifest, commit.manifest_sha256, "", "")


def _print_table(lines: list[_Line]) -> None:
    table = Table(box=None, pad_edge=False)
    for title in TITLES:
        table.add_column(title, justify="right" if title in NUMBERS else "left")
    for line in lines:
        table.add_row(line.name, str(line.key.step), str(line.key.generation), *_cells(line))
    out = screen()
    out.print(table)
    for line in lines:
        if line.manifest is None:
            out.print(one_line(line.fault))


def _object(line: _Line) -> dict[str, object]:
    """What `CheckpointInfo` tells; metadata as the manifest has it, for JSON has no NaN."""
    if line.manifest is None:
        where = {"name": line.name, "step": line.key.step, "generation": line.key.generation}
        return {**where, "fault": line.instead, "message": line.fault}
    info = asdict(CheckpointInfo.of(line.manifest, line.sha256))
    return {**info, "metadata": metadata_to_json(line.manifest.metadata)}


def _cells(line: _Line) -> tuple[str, ...]:
    if line.manifest is None:
        return line.instead, "", "", "", "", ""
    manifest = line.manifest
    return (
        manifest.created.replace("T", " "),
        str(manifest.world_size),
        decimal(manifest.nbytes),
        decimal(manifest.written),
        "full" if manifest.full else "delta",
        line.sha256[:SHA256_DIGITS],
    )
