from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dtruntime_torch.checkpoint import manifest
from dtruntime_torch.checkpoint.format.records import ObjectEntry
from dtruntime_torch.checkpoint.specs import Extent, PathKey
from dtruntime_torch.errors import CorruptCheckpoint, InvalidArgument, NewerFormat
from tests.checkpoint.bad_bytes import BAD_RECORDS, SOUND, Bad
from tests.checkpoint.record_builders import (
    manifests,
    parts,
    sample_commit,
    sample_delta,
    sample_generation,
    sample_manifest,
    sample_part,
    sample_void,
)

RECORDS: dict[str, Any] = {
    "part": sample_part(),
    "delta": sample_delta(),
    "manifest": sample_manifest(),
    "commit": sample_commit(),
    "void": sample_void(),
    "generation": sample_generation(),
}
DECODERS: dict[str, Callable[[bytes, str], Any]] = {
    "part": manifest.decode_part,
    "delta": manifest.decode_part,
    "manifest": manifest.decode_manifest,
    "commit": manifest.decode_commit,
    "void": manifest.decode_commit,
    "generation": manifest.decode_generation,
}
ENCODERS: dict[str, Callable[[Any], bytes]] = {
    "part": manifest.encode_part,
    "delta": manifest.encode_part,
    "manifest": manifest.encode_manifest,
    "commit": manifest.encode_commit,
    "void": manifest.encode_commit,
    "generation": manifest.encode_generation,
}
VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "manifest.json").read_text())["vectors"]


def _nested(levels: int) -> object:
    return [_nested(levels - 1)] if levels else None


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["record"])
def test_the_golden_bytes_are_written(vector):
    encoded = ENCODERS[vector["record"]](RECORDS[vector["record"]])
    assert encoded == vector["bytes"].encode("ascii")
    assert hashlib.sha256(encoded).hexdigest() == vector["sha256"]


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["record"])
def test_the_golden_bytes_are_read(vector):
    record = DECODERS[vector["record"]](vector["bytes"].encode("ascii"), "file.json")
    assert record == RECORDS[vector["record"]]


def test_every_record_has_golden_bytes():
    assert {vector["record"] for vector in VECTORS} == set(RECORDS)


@settings(max_examples=50)
@given(parts())
def test_a_part_comes_back_equal(part):
    assert manifest.decode_part(manifest.encode_part(part), "part.json") == part


@settings(max_examples=50)
@given(parts())
def test_a_part_is_canonical_json(part):
    """Its tensors are put together as text."""
    encoded = manifest.encode_part(part)
    assert encoded == json.dumps(json.loads(encoded), sort_keys=True, separators=(",", ":")).encode("ascii")


@given(manifests())
def test_a_manifest_comes_back_equal(record):
    assert manifest.decode_manifest(manifest.encode_manifest(record), "manifest.json") == record


@pytest.mark.parametrize("bad", BAD_RECORDS, ids=lambda bad: bad.rule)
def test_what_must_be_refused_is_refused_by_name(bad: Bad):
    with pytest.raises((CorruptCheckpoint, NewerFormat)) as caught:
        DECODERS[bad.kind](bad.data, "model/the-file.json")
    assert bad.says in str(caught.value)
    assert "model/the-file.json" in str(caught.value)
    if bad.says == "upgrade" and bad.kind != "commit":
        assert isinstance(caught.value, NewerFormat)
        return
    assert isinstance(caught.value, CorruptCheckpoint)
    (damage,) = caught.value.damage
    assert (damage.file, damage.start, damage.stop) == ("model/the-file.json", 0, len(bad.data))


@pytest.mark.parametrize("kind", RECORDS)
def test_a_field_that_a_later_minor_change_adds_is_ignored(kind):
    data = SOUND[kind].replace(b'"version":1', b'"version":1,"zest":[1,{"a":null}]')
    assert DECODERS[kind](data, "file.json") == RECORDS[kind]


def test_an_unknown_feature_is_named_even_if_all_else_changed_its_meaning():
    data = b'{"format":"dtruntime.manifest","version":1,"requires":["encrypted"],"name":{}}'
    with pytest.raises(NewerFormat, match=r"encrypted.*upgrade"):
        manifest.decode_manifest(data, "manifest.json")


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        ("part", "chunk_bytes", 0),
        ("part", "objects", (ObjectEntry("deep", (PathKey("list", 0),) * 65, 0, False, None),)),
        ("manifest", "uses", ()),
        ("manifest", "requires", ("sparse-chunks",)),
        ("manifest", "metadata", _nested(65)),
        ("commit", "attempt", "elsewhere"),
        ("generation", "run_id", ""),
    ],
)
def test_what_no_reader_would_take_is_not_written(kind, field, value):
    record = dataclasses.replace(RECORDS[kind], **{field: value})
    with pytest.raises(InvalidArgument, match="cannot be written"):
        ENCODERS[kind](record)


@settings(max_examples=400)
@given(st.sampled_from(sorted(SOUND)), st.data())
def test_mutated_bytes_give_a_sound_record_or_the_one_error(kind, data):
    mutated = data.draw(_mutations(SOUND[kind]))
    try:
        record = DECODERS[kind](mutated, "file.json")
    except (CorruptCheckpoint, NewerFormat):
        return
    # What got through holds together well enough to be written again.
    assert DECODERS[kind](ENCODERS[kind](record), "file.json") == record


@settings(max_examples=400)
@given(st.sampled_from(sorted(SOUND)), st.data())
def test_a_record_with_any_json_in_a_field_is_sound_or_the_one_error(kind, data):
    record = json.loads(SOUND[kind])
    target, key = data.draw(st.sampled_from(list(_places(record))))
    target[key] = data.draw(_WILD)
    try:
        decoded = DECODERS[kind](json.dumps(record).encode(), "file.json")
    except (CorruptCheckpoint, NewerFormat):
        return
    assert DECODERS[kind](ENCODERS[kind](decoded), "file.json") == decoded


@pytest.mark.parametrize(
    "hostile",
    [
        b"[" * 2_000_000,
        b'{"a":' * 500_000,
        b'{"step":' + b"1" * 2_000_000 + b"}",
        b'{"step":-' + b"1" * 2_000_000 + b"}",
        b'{"f":1' + b"0" * 2_000_000 + b".0}",
        SOUND["part"].replace(b'"shape":[2,5]', b'"shape":[' + b"9007199254740991," * 100_000 + b"5]"),
        SOUND["part"].replace(b'"path":[', b'"path":[' + b'["l",0],' * 100_000),
        SOUND["part"].replace(b"[0,128,40]", b"[0,128,40]," * 100_000 + b"[0,128,40]"),
    ],
    ids=["arrays", "objects", "digits", "minus", "float", "shape", "path", "extents"],
)
def test_a_large_hostile_file_is_refused_quickly(hostile):
    began = time.process_time()
    with pytest.raises(CorruptCheckpoint):
        manifest.decode_part(hostile, "part.json")
    assert time.process_time() - began < 2


def test_ten_thousand_tensors_take_no_time_to_speak_of():
    part = _part_of(10_000)
    began = time.process_time()
    encoded = manifest.encode_part(part)
    assert manifest.decode_part(encoded, "part.json") == part
    assert time.process_time() - began < 5


_WILD = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 2)
    | st.integers(2**52, 2**54)
    | st.floats()
    | st.sampled_from(["", "d", "..", "step-00000100/0007-1", "00" * 16, "float32", "int8", "\ud800", "~"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["~", "v", "path", "step"]), inner, max_size=2),
    max_leaves=6,
)


def _places(value):
    """Every (container, key) in a tree of JSON."""
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def _mutations(sound: bytes) -> st.SearchStrategy[bytes]:
    """A few bytes replaced, taken away, put in or doubled."""
    places = st.integers(0, len(sound))
    pieces = st.binary(max_size=3) | st.sampled_from(
        [b"null", b"-1", b"1e9", b'"', b"[", b"}", b",", b"\\ud800"]
    )
    edits = st.lists(st.tuples(places, st.integers(0, 4), pieces), min_size=1, max_size=4)

    def apply(changes: list[tuple[int, int, bytes]]) -> bytes:
        data = sound
        for place, length, piece in changes:
            data = data[:place] + piece + data[place + length :]
        return data

    return edits.map(apply) | st.tuples(places, places).map(lambda cut: sound[min(cut) : max(cut)])


def _part_of(count: int) -> manifest.Part:
    sample = sample_part()
    (file,), tensor = sample.files, sample.tensors[0]
    tensors = tuple(
        dataclasses.replace(
            tensor,
            fqn=f"layers.{i}.weight",
            path=(PathKey("dict", "layers"), PathKey("list", i), PathKey("dict", "weight")),
            index=i,
            name=f"layers.{i}.weight",
            extents=(Extent(0, 128 + 40 * i, 40),),
        )
        for i in range(count)
    )
    return dataclasses.replace(
        sample, files=(dataclasses.replace(file, length=128 + 40 * count),), tensors=tensors, objects=()
    )
