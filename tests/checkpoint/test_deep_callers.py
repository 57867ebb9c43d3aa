"""Callers who are deep in a recursion themselves: they may hear of that, but not that a sound file is damaged."""

from __future__ import annotations

import dataclasses
import sys
import traceback
from collections.abc import Callable
from typing import TypeVar

import pytest

from dtruntime_torch.checkpoint import objects
from dtruntime_torch.checkpoint.manifest import decode_manifest, encode_manifest
from tests.checkpoint.record_builders import sample_manifest

R = TypeVar("R")

# From where nothing can be called any more to where there is room for everything.
ROOMS = range(8, 140)


def nested(depth: int) -> list[object]:
    value: list[object] = []
    for _ in range(depth):
        value = [value]
    return value


def with_room_for(frames: int, call: Callable[[], R]) -> R:
    """Calls something when that many frames of the stack are left."""

    def descend(left: int) -> R:
        return call() if left <= 0 else descend(left - 1)

    used = sum(1 for _ in traceback.walk_stack(None))
    return descend(sys.getrecursionlimit() - used - frames)


def outcomes(call: Callable[[], object]) -> list[object]:
    """What a call gave with ever more room: what it returned, or that it told of recursion."""
    found: list[object] = []
    for room in ROOMS:
        try:
            found.append(with_room_for(room, call))
        except RecursionError:
            found.append(RecursionError)
    return found


MANIFEST = dataclasses.replace(sample_manifest(), metadata=nested(40))  # type: ignore[arg-type]


def check(found: list[object], expected: object) -> None:
    assert found[0] is RecursionError and found[-1] == expected
    assert all(one is RecursionError or one == expected for one in found)


def test_a_sound_manifest_is_not_called_damaged():
    data = encode_manifest(MANIFEST)
    check(outcomes(lambda: decode_manifest(data, "a manifest")), MANIFEST)


@pytest.mark.usefixtures("own_codecs")
def test_a_value_of_a_codec_is_not_called_damaged():
    def decode(value: object) -> range:
        return with_frames(20, lambda: range(value))  # type: ignore[call-overload, no-any-return]

    objects.register_codec(range, "tests.deep.range", lambda value: value.stop, decode)
    encoded = objects.encode(range(3), "r")
    check(outcomes(lambda: objects.decode(encoded, "r")), range(3))


def with_frames(frames: int, call: Callable[[], R]) -> R:
    return call() if frames == 0 else with_frames(frames - 1, call)


def test_the_error_says_how_deep_the_caller_is():
    data = encode_manifest(MANIFEST)
    told = []
    for room in ROOMS:
        try:
            with_room_for(room, lambda: decode_manifest(data, "model/manifest.json"))
        except RecursionError as error:
            told.append("model/manifest.json could not be decoded: the stack has room for" in str(error))
    assert any(told)
