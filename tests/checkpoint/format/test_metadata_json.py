"""Metadata with every float that there is, in strict JSON and back."""

from __future__ import annotations

import dataclasses
import json
import math
import struct

import pytest
from hypothesis import example, given

from dtruntime_torch.checkpoint import manifest
from dtruntime_torch.checkpoint.format.metadata_json import metadata_from_json, metadata_to_json
from dtruntime_torch.checkpoint.format.strict_json import Refused
from dtruntime_torch.checkpoint.objects import Json
from tests.checkpoint.record_builders import json_values, sample_manifest

INF = {"~": "float", "v": "7ff0000000000000"}


def no_constant(text: str) -> object:
    raise AssertionError(f"{text} is not JSON")


def bits(value: Json) -> Json:
    """The same with its floats as bits, so that NaN equals itself."""
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    if isinstance(value, list):
        return [bits(item) for item in value]
    return ["float", struct.pack(">d", value).hex()] if isinstance(value, float) else value


@given(json_values(allow_nan=True))
@example({"~": "float", "v": "7ff8000000000000"})
@example({"~": "dict", "v": [["~", "float"]]})
@example([struct.unpack(">d", bytes.fromhex("fff8000000000123"))[0], -0.0])
def test_metadata_comes_back_with_every_bit(metadata):
    text = json.dumps(metadata_to_json(metadata), allow_nan=False)
    assert bits(metadata_from_json(json.loads(text, parse_constant=no_constant))) == bits(metadata)


@pytest.mark.parametrize(
    ("metadata", "encoded"),
    [
        ({"loss": math.inf, "n": [1, None]}, {"loss": INF, "n": [1, None]}),
        (math.nan, {"~": "float", "v": "7ff8000000000000"}),
        ({"v": 1, "~": math.inf}, {"~": "dict", "v": [["v", 1], ["~", INF]]}),
    ],
)
def test_only_what_json_lacks_looks_otherwise(metadata, encoded):
    assert metadata_to_json(metadata) == encoded
    assert bits(metadata_from_json(encoded)) == bits(metadata)


@pytest.mark.parametrize(
    "metadata",
    [
        {"loss": None, "tags": ["a"]},
        {"~": "approximately"},
        {"~": "float", "v": 1.5},
        {"~": "float", "v": "3ff0000000000000"},
        {"~": "float", "v": "7ff0000000000000", "w": 1},
        {"~": "dict", "v": [["key", 1, 2]]},
        {"~": "tuple", "v": [1, 2]},
        {"~": ["dict"], "v": []},
    ],
)
def test_what_older_manifests_hold_is_taken_as_it_is(metadata):
    assert metadata_from_json(metadata) == metadata


def test_a_manifest_with_nan_in_it_is_strict_json():
    record = dataclasses.replace(sample_manifest(), metadata={"loss": math.nan})
    encoded = manifest.encode_manifest(record)
    assert json.loads(encoded, parse_constant=no_constant)["metadata"]["loss"]["~"] == "float"
    decoded = manifest.decode_manifest(encoded, "manifest.json")
    assert bits(decoded.metadata) == bits(record.metadata)


def test_metadata_as_deep_as_it_may_be_comes_back_and_deeper_is_refused():
    deep: Json = {"~": math.inf}
    for _ in range(63):
        deep = [deep]
    assert metadata_from_json(metadata_to_json(deep)) == deep
    with pytest.raises(Refused, match="64 containers"):
        metadata_to_json([deep])


def test_what_is_too_deep_to_be_decoded_is_refused():
    deep: Json = None
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(Refused, match="too deep"):
        metadata_from_json(deep)
