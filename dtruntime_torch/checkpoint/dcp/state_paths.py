"""Where in a nested state each name belongs: DCP's `planner_data`, and the paths of our records.

A default planner flattens a state and keeps in `planner_data` the way to each leaf: keys of dicts and positions in lists.
That is what our records say too, so it is made from them again. What another planner keeps there is stored as a value.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import TypeGuard

from dtruntime_torch.checkpoint import objects
from dtruntime_torch.checkpoint.format import strict_json
from dtruntime_torch.checkpoint.manifest import ObjectEntry, Part, TensorEntry
from dtruntime_torch.checkpoint.objects import MAX_DEPTH, Json
from dtruntime_torch.checkpoint.specs import Path, PathKey
from dtruntime_torch.errors import CorruptCheckpoint

KEY = "planner_data"
"""The name of this in a manifest's metadata: "paths", null, or an encoded value as text in {"value": ...}."""

_FROM_PATHS = "paths"

Way = tuple[str | int, ...]


def mapping_of(planner_data: object) -> Mapping[object, object]:
    """The planner data of a plan, if it names leaves."""
    return planner_data if isinstance(planner_data, Mapping) else {}


def path_of(planner_data: object, fqn: str) -> Path:
    """The way to a leaf as our records have it; the empty path where the planner tells none."""
    way = mapping_of(planner_data).get(fqn)
    if not _is_way(way):
        return ()
    return tuple(PathKey("list" if type(step) is int else "dict", step) for step in way)


def ways_of(parts: Iterable[Part]) -> dict[str, Way]:
    """Name -> the way to it, for all leaves whose way is known, in the order of the state."""
    leaves: dict[str, TensorEntry | ObjectEntry] = {}
    for part in parts:
        of_part: list[TensorEntry | ObjectEntry] = [*part.tensors, *part.objects]
        for leaf in of_part:
            leaves.setdefault(leaf.fqn, leaf)
    ordered = sorted(leaves.values(), key=lambda leaf: leaf.index)
    return {leaf.fqn: tuple(map(_step, leaf.path)) for leaf in ordered if leaf.path}


def planner_data_to_json(planner_data: object, fqns: Iterable[str]) -> Json:
    """What a manifest keeps of planner data.

    Args:
        planner_data: of the metadata that the planner made.
        fqns: all names in that.

    Raises:
        UnsupportedType: it is another planner's, and cannot be stored.
    """
    if planner_data is None:
        return None
    ways = mapping_of(planner_data)
    if type(planner_data) is dict and ways.keys() == set(fqns) and all(map(_is_way, ways.values())):
        return _FROM_PATHS
    encoded = objects.encode(planner_data, "the planner's planner_data")
    return {"value": json.dumps(encoded)}


def planner_data_from_json(stored: Json, parts: Iterable[Part], source: str) -> object:
    """Reads what `planner_data_to_json` gave.

    Args:
        stored: parsed JSON.
        parts: of the checkpoint.
        source: path of the manifest, for the error.

    Raises:
        CorruptCheckpoint: it is nothing of that kind.
    """
    if stored is None:
        return None
    if stored == _FROM_PATHS:
        return ways_of(parts)
    text = stored.get("value") if type(stored) is dict else None
    if type(text) is not str:
        raise CorruptCheckpoint(f"{source}: its {KEY} is none")
    try:
        fields = strict_json.parse(f'{{"value":{text}}}'.encode())
    except strict_json.Refused as error:
        raise CorruptCheckpoint(f"{source}: its {KEY} is none: {error}") from error
    return objects.decode(fields.json("value"), f"{source}: {KEY}")


def _is_way(way: object) -> TypeGuard[Way]:
    if type(way) is not tuple or not 0 < len(way) <= MAX_DEPTH:
        return False
    return all(type(step) is str or (type(step) is int and step >= 0) for step in way)


def _step(step: PathKey) -> str | int:
    if step.container in ("list", "tuple"):
        return step.key  # type: ignore[return-value]  # a position
    return str(step.key)
