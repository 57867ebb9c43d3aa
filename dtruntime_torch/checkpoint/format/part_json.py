"""Parts to JSON values and back; the types are checked here, what they mean in `checks`.

Tensors, of which there may be tens of thousands in each save, are written at once as text: no dict is made for each
that a collection of garbage goes through, while training waits.
"""

from __future__ import annotations

from collections.abc import Sequence

from dtruntime_torch.checkpoint import objects
from dtruntime_torch.checkpoint.format import strict_json
from dtruntime_torch.checkpoint.format.records import FileRef, ObjectEntry, Part, TensorEntry
from dtruntime_torch.checkpoint.format.strict_json import Fields, Refused, quoted
from dtruntime_torch.checkpoint.objects import Json
from dtruntime_torch.checkpoint.specs import Extent, Kind, Path, PathKey, Shape

_CONTAINERS: dict[str, Kind] = {"d": "dict", "o": "ordered_dict", "l": "list", "t": "tuple"}
_TRUTHS = ("false", "true")
_LETTERS = {container: letter for letter, container in _CONTAINERS.items()}


def part_to_json(part: Part) -> dict[str, Json]:
    """The fields of a part, but for `tensors`."""
    return {
        "rank": part.rank,
        "world_size": part.world_size,
        "generation": part.generation,
        "step": part.step,
        "attempt": part.attempt,
        "completed_by": list(part.completed_by),
        "chunk_bytes": part.chunk_bytes,
        "files": [_file_to_json(file) for file in part.files],
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


def tensors_to_text(tensors: Sequence[TensorEntry]) -> str:
    """The field `tensors` of a part, as canonical JSON."""
    texts = _Texts()
    return f"[{','.join([_tensor_to_text(tensor, texts) for tensor in tensors])}]"


def _tensor_to_text(tensor: TensorEntry, texts: _Texts) -> str:
    fqn = _text_to_text(tensor.fqn)
    return (
        f'{{"alias":{"null" if tensor.alias is None else _text_to_text(tensor.alias)},'
        f'"digests":"{tensor.digests.hex()}",'
        f'"dtype":"{tensor.dtype}",'
        f'"extents":[{",".join([f"[{e.file},{e.offset},{e.length}]" for e in tensor.extents])}],'
        f'"fqn":{fqn},'
        f'"global_shape":{texts.of_numbers(tensor.global_shape)},'
        f'"index":{tensor.index},'
        f'"is_bytes":{_TRUTHS[tensor.is_bytes]},'
        f'"name":{fqn if tensor.name == tensor.fqn else quoted(tensor.name)},'
        f'"offsets":{texts.of_numbers(tensor.offsets)},'
        f'"path":[{",".join([texts.of_step(step) for step in tensor.path])}],'
        f'"per_rank":{_TRUTHS[tensor.per_rank]},'
        f'"shape":{texts.of_numbers(tensor.shape)}}}'
    )


class _Texts:
    """What tensors of one part have in common, as canonical JSON: shapes, and the steps to the containers they lie in."""

    def __init__(self) -> None:
        self._numbers: dict[Shape, str] = {}
        self._steps: dict[int, str] = {}  # by id: neighbours have the very same

    def of_numbers(self, numbers: Shape) -> str:
        text = self._numbers.get(numbers)
        if text is None:
            text = self._numbers[numbers] = f"[{','.join(map(str, numbers))}]"
        return text

    def of_step(self, step: PathKey) -> str:
        text = self._steps.get(id(step))
        if text is None:
            # The commonest key, which differs from leaf to leaf.
            key = (
                _text_to_text(step.key) if type(step.key) is str else strict_json.encoded(_key_to_json(step))
            )
            text = self._steps[id(step)] = f'["{_LETTERS[step.container]}",{key}]'
        return text


def _text_to_text(text: str) -> str:
    return quoted(text) if objects.is_text(text) else strict_json.encoded(_text_to_json(text))


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
    return [[_LETTERS[step.container], _key_to_json(step)] for step in path]


def _key_to_json(step: PathKey) -> Json:
    return objects.encode(step.key, "a key of the state")


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
