"""Records to JSON values and back, field by field; the types are checked here, what they mean in `checks`."""

from __future__ import annotations

from dtruntime_torch.checkpoint import checks, objects, strict_json
from dtruntime_torch.checkpoint.names import CommitKey
from dtruntime_torch.checkpoint.objects import Json
from dtruntime_torch.checkpoint.records import (
    Commit,
    FileRef,
    Generation,
    Manifest,
    ObjectEntry,
    Part,
    PartRef,
    TensorEntry,
)
from dtruntime_torch.checkpoint.specs import Extent, Kind, Path, PathKey
from dtruntime_torch.checkpoint.strict_json import Fields, Refused

_CONTAINERS: dict[str, Kind] = {"d": "dict", "l": "list", "t": "tuple"}
_LETTERS = {container: letter for letter, container in _CONTAINERS.items()}


def manifest_to_json(manifest: Manifest) -> dict[str, Json]:
    """The fields of a manifest."""
    return {
        "name": manifest.name,
        "generation": manifest.generation,
        "step": manifest.step,
        "attempt": manifest.attempt,
        "run_id": manifest.run_id,
        "parent": None if manifest.parent is None else list(manifest.parent),
        "world_size": manifest.world_size,
        "full": manifest.full,
        "uses": list(manifest.uses),
        "requires": list(manifest.requires),
        "created": manifest.created,
        "versions": dict(manifest.versions),
        "metadata": manifest.metadata,
        "nbytes": manifest.nbytes,
        "written": manifest.written,
        "parts": [_part_ref_to_json(ref) for ref in manifest.parts],
    }


def manifest_from(fields: Fields) -> Manifest:
    """Reads what `manifest_to_json` gave; what it requires first, for that may change the meaning of the rest."""
    requires = fields.strings("requires")
    checks.check_features(requires)
    return Manifest(
        name=fields.string("name"),
        generation=fields.integer("generation"),
        step=fields.integer("step"),
        attempt=fields.string("attempt"),
        run_id=fields.string("run_id"),
        parent=_parent_from(fields),
        world_size=fields.integer("world_size"),
        full=fields.boolean("full"),
        uses=fields.strings("uses"),
        requires=requires,
        created=fields.string("created"),
        versions=_versions_from(fields),
        metadata=fields.json("metadata"),
        nbytes=fields.integer("nbytes"),
        written=fields.integer("written"),
        parts=tuple(_part_ref_from(Fields(value, "a part")) for value in fields.array("parts")),
    )


def commit_to_json(commit: Commit) -> dict[str, Json]:
    """The fields of a commit."""
    return {
        "name": commit.name,
        "generation": commit.generation,
        "step": commit.step,
        "attempt": commit.attempt,
        "manifest_sha256": commit.manifest_sha256,
        "void": commit.void,
    }


def commit_from(fields: Fields) -> Commit:
    """Reads what `commit_to_json` gave."""
    return Commit(
        name=fields.string("name"),
        generation=fields.integer("generation"),
        step=fields.integer("step"),
        attempt=fields.string("attempt"),
        manifest_sha256=fields.string("manifest_sha256"),
        void=fields.boolean("void"),
    )


def generation_to_json(record: Generation) -> dict[str, Json]:
    """The fields of a generation record."""
    return {
        "generation": record.generation,
        "run_id": record.run_id,
        "host": record.host,
        "pid": record.pid,
        "created": record.created,
    }


def generation_from(fields: Fields) -> Generation:
    """Reads what `generation_to_json` gave."""
    return Generation(
        generation=fields.integer("generation"),
        run_id=fields.string("run_id"),
        host=fields.string("host"),
        pid=fields.integer("pid"),
        created=fields.string("created"),
    )


def part_to_json(part: Part) -> dict[str, Json]:
    """The fields of a part."""
    return {
        "rank": part.rank,
        "world_size": part.world_size,
        "generation": part.generation,
        "step": part.step,
        "attempt": part.attempt,
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
        "path": _path_to_json(tensor.path),
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
        path=_path_from(fields),
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
        "path": _path_to_json(entry.path),
        "index": entry.index,
        "per_rank": entry.per_rank,
        "value": entry.value,
    }


def _object_from(fields: Fields) -> ObjectEntry:
    return ObjectEntry(
        fqn=_text_from(fields, "fqn"),
        path=_path_from(fields),
        index=fields.integer("index"),
        per_rank=fields.boolean("per_rank"),
        value=fields.json("value"),
    )


def _path_to_json(path: Path) -> Json:
    # A position in a list is a small integer, which is its own encoding.
    return [[_LETTERS[step.container], objects.encode(step.key, "a key of the state")] for step in path]


def _path_from(fields: Fields) -> Path:
    steps = fields.array("path")
    if len(steps) > objects.MAX_DEPTH:
        raise Refused(f"a path has more than {objects.MAX_DEPTH} steps")
    return tuple(_step_from(value) for value in steps)


def _step_from(value: Json) -> PathKey:
    letter, key = strict_json.items(value, "a step of a path", 2)
    container = _CONTAINERS.get(letter) if type(letter) is str else None
    if container is None:
        raise Refused("a step of a path enters neither a dict nor a list nor a tuple")
    if container != "dict":
        return PathKey(container, strict_json.whole(key, "a position in a path"))
    decoded = objects.decode(key, "a key of a path")
    try:
        hash(decoded)
    except TypeError:
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


def _part_ref_to_json(ref: PartRef) -> Json:
    return {
        "rank": ref.rank,
        "path": ref.path,
        "length": ref.length,
        "sha256": ref.sha256,
        "data_length": ref.data_length,
    }


def _part_ref_from(fields: Fields) -> PartRef:
    return PartRef(
        rank=fields.integer("rank"),
        path=fields.string("path"),
        length=fields.integer("length"),
        sha256=fields.string("sha256"),
        data_length=fields.integer("data_length"),
    )


def _parent_from(fields: Fields) -> CommitKey | None:
    if fields.json("parent") is None:
        return None
    generation, step = strict_json.items(fields.json("parent"), "the parent", 2)
    return CommitKey(strict_json.whole(generation, "the parent"), strict_json.whole(step, "the parent"))


def _versions_from(fields: Fields) -> dict[str, str]:
    versions = Fields(fields.json("versions"), "versions")
    return {software: versions.string(software) for software in fields.object("versions")}
