"""`dtruntime diff`: which tensors changed between two steps, and by how many bytes, from the manifests alone."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.filesize import decimal
from rich.table import Table

from dtruntime_torch.checkpoint.diff import Difference
from dtruntime_torch.checkpoint.diff import diff as diff_checkpoints
from dtruntime_torch.checkpoint.verify import find_commit
from dtruntime_torch.cli.place import Place, find_place
from dtruntime_torch.cli.screen import count, one_line, screen
from dtruntime_torch.errors import InvalidArgument
from dtruntime_torch.storage import run_sync

_MEANING = {
    "recut": "stored in other shards: not comparable without reading",
    "reshaped": "other dtype or shape",
}


def diff(
    path: Annotated[str, typer.Argument(help="The folder of checkpoints, or one <name> below it.")],
    old: Annotated[int, typer.Argument(min=0, metavar="A", help="The step that is compared with.")],
    new: Annotated[int, typer.Argument(min=0, metavar="B", help="The other step.")],
) -> None:
    """Says which tensors differ between steps A and B (of their newest generations), and by how many bytes.

    A byte counts as changed if its chunk did. Exits with 1 when something differs.
    """
    place = find_place(path)
    name = _only_name(place, path)
    keys = [run_sync(find_commit(place.backend, name, step)) for step in (old, new)]
    differences = run_sync(diff_checkpoints(place.backend, name, *keys))
    out = screen()
    if differences:
        out.print(_table(differences))
    changed = sum(difference.changed for difference in differences)
    steps = f"{name} step {old} and step {new}"
    out.print(
        f"{steps}: {count(len(differences), 'difference')}, {decimal(changed)} changed"
        if differences
        else f"{steps}: equal"
    )
    if differences:
        raise typer.Exit(1)


def _only_name(place: Place, path: str) -> str:
    if len(place.names) > 1:
        raise InvalidArgument(
            f"there are checkpoints called {', '.join(place.names)} in {path}: name one, as {path}/{place.names[0]}"
        )
    return place.names[0]


def _table(differences: list[Difference]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("what")
    table.add_column("changed", justify="right")
    table.add_column("of", justify="right")
    table.add_column("name")
    for difference in differences:
        table.add_row(*_cells(difference))
    return table


def _cells(difference: Difference) -> tuple[str, str, str, str]:
    what = _MEANING.get(difference.kind, difference.kind)
    if difference.is_object:
        return what, "", "", f"{one_line(difference.fqn)} (no tensor)"
    known = "?" if difference.kind == "recut" else decimal(difference.changed)
    return what, known, decimal(difference.nbytes), one_line(difference.fqn)
