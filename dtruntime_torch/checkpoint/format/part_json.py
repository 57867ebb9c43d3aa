"""Parts to JSON values and back; the types are checked here, what they mean in `checks`."""

from __future__ import annotations

from dtruntime_torch.checkpoint import objects
from dtruntime_torch.checkpoint.format import strict_json
from dtruntime_torch.checkpoint.format.records import FileRef, ObjectEntry, Part, TensorEntry
from dtruntime_torch.checkpoint.format.strict_json import Fields, Refused
from dtruntime_torch.checkpoint.objects import Json
from dtruntime_torch.checkpoint.specs import Extent, Kind, Path, PathKey

_CONTAINERS: dict[str, Kind] = {"d": "dict", "o": "ordered_dict", "l": "list", "t": "tuple"}
_LETTERS = {container: letter for letter, container in _CONTAINERS.items()}


def part_to_json(part: Part) -> dict[str, Json]:
    """The fields of a part."""
    return {
        "rank": part.rank,
        "world_size": part.world_size,
        "generation": part.generation,
        "step": part.step,
        "attempt": part.attempt,
        "completed_by": list(part.completed_by),
        "chunk_bytes": part.chunk_bytes,
        "files": [_file_to_json(file) for file in part.files],
        "tensors": [_tensor_to_json(tensor) for tensor in part.tensors],
        "objects": [_object_to_json(entry) for entry in part.objects],
    }


def part_from(fields: Fields) -> Part:
    """Reads what `part_to_json` gave."""
    return Part(
        rank=fields.integer("rank"),
        world_size=fields.integer("world_size"),
        generation=fields.integer("generation"),
        step=fields.integer("step"),
        attempt=fields.string("attempt"),
        completed_by=fields.integers("completed_by"),
        chunk_bytes=fields.integer("chunk_bytes"),
        files=tuple(_file_from(Fields(value, "a file")) for value in fields.array("files")),
        tensors=tuple(_tensor_from(Fields(value, "a tensor")) for value in fields.array("tensors")),
        objects=tuple(_object_from(Fields(value, "an object")) for value in fields.array("objects")),
    )


def _file_to_json(file: FileRef) -> Json:
    return {
        "path": file.path,
        "length": file.length,
        "header_length": file.header_length,
        "header_digest": file.header_digest.hex(),
    }


def _file_from(fields: Fields) -> FileRef:
    return FileRef(
        path=fields.string("path"),
        length=fields.integer("length"),
        header_length=fields.integer("header_length"),
        header_digest=fields.digest("header_digest"),
    )


def _tensor_to_json(tensor: TensorEntry) -> Json:
    return {
        "fqn": _text_to_json(tensor.fqn),
        "path": path_to_json(tensor.path),
        "index": tensor.index,
        "name": tensor.name,
        "dtype": tensor.dtype,
        "global_shape": list(tensor.global_shape),
        "offsets": list(tensor.offsets),
        "shape": list(tensor.shape),
        "per_rank": tensor.per_rank,
        "alias": None if tensor.alias is None else _text_to_json(tensor.alias),
        "is_bytes": tensor.is_bytes,
        "extents": [[extent.file, extent.offset, extent.length] for extent in tensor.extents],
        "digests": tensor.digests.hex(),
    }


def _tensor_from(fields: Fields) -> TensorEntry:
    return TensorEntry(
        fqn=_text_from(fields, "fqn"),
        path=path_from(fields),
        index=fields.integer("index"),
        name=fields.string("name"),
        dtype=fields.string("dtype"),
        global_shape=fields.integers("global_shape"),
        offsets=fields.integers("offsets"),
        shape=fields.integers("shape"),
        per_rank=fields.boolean("per_rank"),
        alias=None if fields.json("alias") is None else _text_from(fields, "alias"),
        is_bytes=fields.boolean("is_bytes"),
        extents=tuple(_extent_from(value) for value in fields.array("extents")),
        digests=fields.digest("digests"),
    )


def _extent_from(value: Json) -> Extent:
    file, offset, length = (
        strict_json.whole(n, "an extent") for n in strict_json.items(value, "an extent", 3)
    )
    return Extent(file, offset, length)


def _object_to_json(entry: ObjectEntry) -> Json:
    return {
        "fqn": _text_to_json(entry.fqn),
        "path": path_to_json(entry.path),
        "index": entry.index,
        "per_rank": entry.per_rank,
        "value": entry.value,
    }


def _object_from(fields: Fields) -> ObjectEntry:
    return ObjectEntry(
        fqn=_text_from(fields, "fqn"),
        path=path_from(fields),
        index=fields.integer("index"),
        per_rank=fields.boolean("per_rank"),
        value=fields.json("value"),
    )


def path_to_json(path: Path) -> Json:
    """The way to a leaf, a pair for each step."""
    # A position in a list is a small integer, which is its own encoding.
    return [[_LETTERS[step.container], objects.encode(step.key, "a key of the state")] for step in path]


def path_from(fields: Fields) -> Path:
    """Reads what `path_to_json` gave as the field `path`."""
    steps = fields.array("path")
    if len(steps) > objects.MAX_DEPTH:
        raise Refused(f"a path has more than {objects.MAX_DEPTH} steps")
    return tuple(_step_from(value) for value in steps)


def _step_from(value: Json) -> PathKey:
    letter, key = strict_json.items(value, "a step of a path", 2)
    container = _CONTAINERS.get(letter) if type(letter) is str else None
    if container is None:
        raise Refused("a step of a path enters neither a dict nor a list nor a tuple")
    if container in ("list", "tuple"):
        return PathKey(container, strict_json.whole(key, "a position in a path"))
    decoded = objects.decode(key, "a key of a path")
    try:
        hash(decoded)
    except (TypeError, ValueError):
        raise Refused(f"a {type(decoded).__qualname__} in a path cannot be a dict's key") from None
    return PathKey(container, decoded)


def _text_to_json(text: str) -> Json:
    return objects.encode(text, "a name")


def _text_from(fields: Fields, key: str) -> str:
    """A string as `objects` encodes it, for a name may come from a dict's key that holds lone surrogates."""
    text = objects.decode(fields.json(key), key)
    if type(text) is not str:
        raise Refused(f"a {key} is no string")
    return text
