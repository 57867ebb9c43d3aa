"""The JSON files of a checkpoint, to bytes and back. Pure: no I/O, no clock.

Encoding is canonical, so that equal records have equal bytes and one SHA-256. Decoding trusts nothing: the types
of the fields in `part_json` and `manifest_json`, what they say together in `checks`. docs/FORMAT.md is the specification.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from dtruntime_torch.checkpoint.format import checks, manifest_json, part_json, strict_json
from dtruntime_torch.checkpoint.format.records import (
    Commit,
    FileRef,
    Generation,
    Manifest,
    ObjectEntry,
    Part,
    PartRef,
    TensorEntry,
)
from dtruntime_torch.checkpoint.format.strict_json import Fields, Newer, Refused
from dtruntime_torch.checkpoint.objects import Json
from dtruntime_torch.checkpoint.stack import raise_if_caller_is_deep
from dtruntime_torch.errors import CorruptCheckpoint, Damage, InvalidArgument, NewerFormat

__all__ = [
    "Commit",
    "FileRef",
    "Generation",
    "Manifest",
    "ObjectEntry",
    "Part",
    "PartRef",
    "TensorEntry",
    "decode_commit",
    "decode_generation",
    "decode_manifest",
    "decode_part",
    "encode_commit",
    "encode_generation",
    "encode_manifest",
    "encode_part",
]

VERSION = 1

# Whoever decodes these has compared their SHA-256 before: what is unknown in them is no damage.
HASHED = ("manifest", "part")

R = TypeVar("R")


def encode_part(part: Part) -> bytes:
    """Encodes a part canonically.

    Raises:
        InvalidArgument: `decode_part` would refuse it; the message says why.
    """
    return _encode(
        "part",
        part,
        checks.check_part,
        part_json.part_to_json,
        lambda: {"tensors": part_json.tensors_to_text(part.tensors)},
    )


def decode_part(data: bytes, source: str) -> Part:
    """Decodes what `encode_part` gave.

    Args:
        data: trusted in nothing.
        source: path of the file, for the error.

    Raises:
        CorruptCheckpoint: it is no part, or contradicts itself.
        NewerFormat: it is of a newer version, or has a dtype that this version does not know.
    """
    return _decode("part", data, source, part_json.part_from, checks.check_part)


def encode_manifest(manifest: Manifest) -> bytes:
    """Encodes a manifest canonically.

    Raises:
        InvalidArgument: `decode_manifest` would refuse it; the message says why.
    """
    return _encode("manifest", manifest, checks.check_manifest, manifest_json.manifest_to_json)


def decode_manifest(data: bytes, source: str) -> Manifest:
    """Decodes what `encode_manifest` gave.

    Args:
        data: trusted in nothing.
        source: path of the file, for the error.

    Raises:
        CorruptCheckpoint: it is no manifest, or contradicts itself.
        NewerFormat: it is of a newer version, or requires a feature that this version does not know.
    """
    return _decode("manifest", data, source, manifest_json.manifest_from, checks.check_manifest)


def encode_commit(commit: Commit) -> bytes:
    """Encodes a commit canonically.

    Raises:
        InvalidArgument: `decode_commit` would refuse it; the message says why.

    Example:
        >>> encode_commit(Commit("model", 7, 100, "", "", void=True))[:38]
        b'{"attempt":"","format":"dtruntime.comm'
    """
    return _encode("commit", commit, checks.check_commit, manifest_json.commit_to_json)


def decode_commit(data: bytes, source: str) -> Commit:
    """Decodes what `encode_commit` gave.

    Args:
        data: trusted in nothing.
        source: path of the file, for the error.

    Raises:
        CorruptCheckpoint: it is no commit, contradicts itself, or is of a newer version.
    """
    return _decode("commit", data, source, manifest_json.commit_from, checks.check_commit)


def encode_generation(generation: Generation) -> bytes:
    """Encodes a generation record canonically.

    Raises:
        InvalidArgument: `decode_generation` would refuse it; the message says why.
    """
    return _encode("generation", generation, checks.check_generation, manifest_json.generation_to_json)


def decode_generation(data: bytes, source: str) -> Generation:
    """Decodes what `encode_generation` gave.

    Args:
        data: trusted in nothing.
        source: path of the file, for the error.

    Raises:
        CorruptCheckpoint: it is no generation record, or is of a newer version.
    """
    return _decode("generation", data, source, manifest_json.generation_from, checks.check_generation)


def _encode(
    kind: str,
    record: R,
    check: Callable[[R], None],
    to_json: Callable[[R], dict[str, Json]],
    to_text: Callable[[], dict[str, str]] = dict,
) -> bytes:
    try:
        check(record)
        fields = {"format": f"dtruntime.{kind}", "version": VERSION, **to_json(record)}
        return strict_json.dump(fields, to_text())
    except ValueError as error:
        raise InvalidArgument(f"this {kind} cannot be written, no reader would take it: {error}") from error


def _decode(
    kind: str, data: bytes, source: str, read: Callable[[Fields], R], check: Callable[[R], None]
) -> R:
    try:
        fields = strict_json.parse(data)
        _check_version(fields, kind)
        record = read(fields)
        check(record)
        return record
    except Newer as error:
        if kind in HASHED:
            raise NewerFormat(f"{source} is sound, but {error}") from error
        raise _corrupt(kind, data, source, error) from error
    except (Refused, CorruptCheckpoint) as error:
        raise_if_caller_is_deep(error, source)
        raise _corrupt(kind, data, source, error) from error


def _corrupt(kind: str, data: bytes, source: str, error: Exception) -> CorruptCheckpoint:
    damage = Damage(source, None, 0, len(data), f"a valid {kind}", str(error))
    return CorruptCheckpoint(f"{source} is no valid {kind}: {error}", [damage])


def _check_version(fields: Fields, kind: str) -> None:
    found = fields.string("format")
    if found != f"dtruntime.{kind}":
        raise Refused(f"its format is {found[:60]!r}, not 'dtruntime.{kind}'")
    if fields.integer("version") != VERSION:
        raise Newer(f"its version is {fields.integer('version')}, not {VERSION}; upgrade dtruntime_torch")
