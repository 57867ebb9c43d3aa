from __future__ import annotations

import collections
import enum
import json
import math
import struct
import uuid
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dtruntime_torch.checkpoint import objects
from dtruntime_torch.errors import CorruptCheckpoint, InvalidArgument, UnsupportedType
from tests.checkpoint.bad_bytes import BAD_OBJECTS
from tests.checkpoint.record_builders import plain_values

Point = collections.namedtuple("Point", "x y")


class Colour(enum.IntEnum):
    RED = 1


class Text(str):
    pass


def through_json(value: object) -> Any:
    return objects.decode(json.loads(json.dumps(objects.encode(value, "state"))), "state")


def typed(value: object) -> str:
    """Tells 1 from 1.0 and True, and shows equal sets alike."""
    if isinstance(value, (tuple, frozenset)):
        shown = [typed(item) for item in value]
        return f"{type(value)} {shown if isinstance(value, tuple) else sorted(shown)}"
    return f"{type(value)} {value!r}"


def assert_identical(actual: object, expected: object) -> None:
    """Equal in value, in type and, for dicts, in order; NaN by its bits, and 0.0 is not -0.0."""
    assert type(actual) is type(expected)
    if isinstance(expected, dict) and isinstance(actual, dict):
        assert len(actual) == len(expected)
        for (key, value), (expected_key, expected_value) in zip(
            actual.items(), expected.items(), strict=True
        ):
            assert_identical(key, expected_key)
            assert_identical(value, expected_value)
    elif isinstance(expected, (list, tuple)) and isinstance(actual, (list, tuple)):
        assert len(actual) == len(expected)
        for item, expected_item in zip(actual, expected, strict=True):
            assert_identical(item, expected_item)
    elif isinstance(expected, (set, frozenset)) and isinstance(actual, (set, frozenset)):
        assert actual == expected
        assert sorted(map(typed, actual)) == sorted(map(typed, expected))
    elif isinstance(expected, complex) and isinstance(actual, complex):
        assert_identical([actual.real, actual.imag], [expected.real, expected.imag])
    elif isinstance(expected, float):
        assert struct.pack(">d", actual) == struct.pack(">d", expected)
    else:
        assert actual == expected


ENCODED: list[tuple[object, str]] = [
    (None, "null"),
    (True, "true"),
    (2**53 - 1, "9007199254740991"),
    (-(2**53) + 1, "-9007199254740991"),
    (2**53, '{"~": "int", "v": "20000000000000"}'),
    (-(2**70), '{"~": "int", "v": "-400000000000000000"}'),
    (1.0, "1.0"),
    (-0.0, "-0.0"),
    (5e-324, "5e-324"),
    (math.inf, '{"~": "float", "v": "7ff0000000000000"}'),
    (-math.inf, '{"~": "float", "v": "fff0000000000000"}'),
    (math.nan, '{"~": "float", "v": "7ff8000000000000"}'),
    ("ä\n😀", '"\\u00e4\\n\\ud83d\\ude00"'),
    ("\ud83d\ude00", '{"~": "str", "v": "eda0bdedb880"}'),
    (b"hi", '{"~": "bytes", "v": "aGk="}'),
    ([], "[]"),
    ([1, [None]], "[1, [null]]"),
    ((), '{"~": "tuple", "v": []}'),
    ((1, "a"), '{"~": "tuple", "v": [1, "a"]}'),
    ({}, '{"~": "dict", "v": []}'),
    ({"b": 1, "a": 2}, '{"~": "dict", "v": [["b", 1], ["a", 2]]}'),
    ({(1, None): b""}, '{"~": "dict", "v": [[{"~": "tuple", "v": [1, null]}, {"~": "bytes", "v": ""}]]}'),
    (set(), '{"~": "set", "v": []}'),
    ({2, 10, "b", b"", None}, '{"~": "set", "v": ["b", 10, 2, null, {"~": "bytes", "v": ""}]}'),
    (frozenset({(1,), 0}), '{"~": "frozenset", "v": [0, {"~": "tuple", "v": [1]}]}'),
    (
        {frozenset({1}): {frozenset()}},
        '{"~": "dict", "v": [[{"~": "frozenset", "v": [1]}, {"~": "set", "v": [{"~": "frozenset", "v": []}]}]]}',
    ),
    (1 - 2.5j, '{"~": "complex", "v": "3ff0000000000000c004000000000000"}'),
    (complex(-0.0, math.inf), '{"~": "complex", "v": "80000000000000007ff0000000000000"}'),
    ({"~": "int", "v": "0"}, '{"~": "dict", "v": [["~", "int"], ["v", "0"]]}'),
]


@pytest.mark.parametrize(("value", "encoded"), ENCODED, ids=lambda item: repr(item)[:30])
def test_the_encoding_is_that_of_the_format_page(value, encoded):
    assert json.dumps(objects.encode(value, "state")) == encoded
    assert_identical(objects.decode(json.loads(encoded), "state"), value)


@given(plain_values())
def test_any_value_comes_back_identical(value):
    assert_identical(through_json(value), value)


@given(st.integers(0, 2**64 - 1))
def test_a_float_keeps_its_bits_whatever_they_are(bits):
    number = struct.unpack(">d", bits.to_bytes(8, "big"))[0]
    assert_identical(through_json(number), number)


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_a_complex_number_keeps_its_bits_whatever_they_are(real, imaginary):
    parts = struct.unpack(">dd", real.to_bytes(8, "big") + imaginary.to_bytes(8, "big"))
    assert_identical(through_json(complex(*parts)), complex(*parts))


@given(st.permutations([None, True, 7, 2**60, -0.5, "a", "b", b"a", (1, "x"), (), frozenset({1, "y"}), 3j]))
def test_equal_sets_have_equal_bytes_in_whatever_order_they_were_filled(members):
    sets = [set(), frozenset(members)]
    for member in members:
        sets[0].add(member)
    first = {True, 7, None, 2**60, (), frozenset({"y", 1}), (1, "x"), b"a", "b", "a", -0.5, 3j}
    encoded = json.dumps(objects.encode(first, "state")["v"])
    assert [json.dumps(objects.encode(one, "state")["v"]) for one in sets] == [encoded, encoded]


def test_two_members_that_are_nan_stay_two():
    assert len(through_json({float("nan"), float("nan")})) == 2


def test_an_integer_of_any_size_comes_back():
    assert through_json(-(3**50_000)) == -(3**50_000)


def test_two_keys_that_are_nan_stay_two():
    value = {float("nan"): 1, float("nan"): 2}
    assert list(through_json(value).values()) == [1, 2]


@pytest.mark.parametrize(
    "value",
    [
        Colour.RED,
        Text("a"),
        Point(1, 2),
        collections.defaultdict(int),
        bytearray(b"a"),
        range(3),
        uuid.uuid4(),
        int,
        object(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_not_exactly_a_known_type_is_refused_by_its_key(value):
    with pytest.raises(UnsupportedType) as caught:
        objects.encode({"groups": [0, (value,)]}, "optimizer")
    assert "optimizer['groups'][1][0]" in str(caught.value)
    assert type(value).__qualname__ in str(caught.value)
    assert "register_codec" in str(caught.value)


def test_a_key_of_an_unknown_type_is_refused():
    with pytest.raises(UnsupportedType, match=r"state, a key of it: a .*Colour"):
        objects.encode({Colour.RED: 1}, "state")


@pytest.mark.parametrize(
    "key",
    ["k" * 1000, 10**5000, (10**5000,), b"b" * 1000, frozenset({10**5000})],
    ids=["str", "int", "tuple", "bytes", "frozenset"],
)
def test_a_monstrous_key_does_not_flood_the_error(key):
    with pytest.raises(UnsupportedType) as caught:
        objects.encode({key: {range(2)}}, "state")
    assert len(str(caught.value)) < 300


def test_a_container_in_itself_is_an_error():
    ring: list[object] = [1]
    ring.append({"again": ring})
    with pytest.raises(UnsupportedType, match=r"state\[1\]\['again'\]: a list that contains itself"):
        objects.encode(ring, "state")


def test_a_member_of_an_unknown_type_is_refused():
    with pytest.raises(UnsupportedType, match=r"state\['a'\], a member of it: a .*Colour"):
        objects.encode({"a": {Colour.RED}}, "state")


def test_one_container_twice_is_no_ring():
    shared = [1]
    assert through_json([shared, shared]) == [[1], [1]]


def nested(depth: int) -> object:
    value: object = 2**60
    for i in range(depth):
        kinds = [[value], (value,), {"k": value}] if i >= 3 else [frozenset({value}), (value,), {value}]
        value = kinds[i % 3]
    return value


def test_sixty_four_containers_in_each_other_come_back():
    assert through_json(nested(64)) == nested(64)


@pytest.mark.parametrize("depth", [65, 50_000])
def test_more_containers_in_each_other_are_an_error(depth):
    with pytest.raises(UnsupportedType, match="more than 64 containers"):
        objects.encode(nested(depth), "state")


@pytest.mark.parametrize("depth", [65, 50_000])
def test_object_depth(depth):
    value: objects.Json = 1
    for i in range(depth):
        value = [value] if i % 2 else {"~": "dict", "v": [[1, value]]}
    with pytest.raises(CorruptCheckpoint, match="more than 64 containers"):
        objects.decode(value, "state")


@pytest.mark.parametrize(("rule", "value", "says"), BAD_OBJECTS)
def test_what_must_be_refused_is_refused_by_key_path(rule, value, says):
    with pytest.raises(CorruptCheckpoint) as caught:
        objects.decode({"~": "dict", "v": [["groups", [value]]]}, "optimizer")
    assert says in str(caught.value)
    assert "optimizer['groups']" in str(caught.value)


@settings(max_examples=300)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text("~v0f-a=", max_size=4),
        lambda inner: st.lists(inner, max_size=3)
        | st.builds(
            lambda tag, v: {"~": tag, "v": v},
            st.sampled_from(["int", "float", "complex", "str", "bytes", "tuple", "dict", "set", "frozenset"])
            | inner,
            inner,
        )
        | st.dictionaries(st.sampled_from(["~", "v", "w"]), inner, max_size=3),
        max_leaves=10,
    )
)
def test_any_json_decodes_or_raises_the_one_error(value):
    try:
        decoded = objects.decode(value, "state")
    except CorruptCheckpoint:
        return
    objects.encode(decoded, "state")


def uuid_from(value: object) -> uuid.UUID:
    return uuid.UUID(bytes=value)  # type: ignore[arg-type]  # what a hostile file gives it


@pytest.fixture
def uuid_codec(own_codecs):
    objects.register_codec(uuid.UUID, "uuid.UUID", lambda value: value.bytes, uuid_from)


@pytest.mark.usefixtures("uuid_codec")
class TestCodec:
    def test_a_registered_type_comes_back_as_value_and_as_key(self):
        value = {uuid.UUID(int=1): [uuid.UUID(int=2)]}
        assert_identical(through_json(value), value)

    def test_a_subclass_of_a_registered_type_stays_refused(self):
        class Special(uuid.UUID):
            pass

        with pytest.raises(UnsupportedType, match="Special"):
            objects.encode(Special(int=1), "state")

    def test_a_value_that_its_codec_cannot_encode_is_refused_by_its_key(self):
        objects.register_codec(range, "builtins.range", lambda value: value.missing, uuid_from)
        with pytest.raises(
            UnsupportedType, match=r"^state\['a'\]: this builtins\.range cannot be stored: .*missing"
        ):
            objects.encode({"a": range(3)}, "state")

    @pytest.mark.parametrize("inner", [7, "text", {"~": "bytes", "v": "aGk="}, []])
    def test_object_codec(self, inner):
        with pytest.raises(CorruptCheckpoint, match=r"state: not a uuid\.UUID"):
            objects.decode({"~": "uuid.UUID", "v": inner}, "state")

    def test_registering_again_is_no_error(self):
        objects.register_codec(
            uuid.UUID, "uuid.UUID", lambda value: value.hex, lambda value: uuid.UUID(value)
        )
        assert objects.encode(uuid.UUID(int=1), "state") == {"~": "uuid.UUID", "v": f"{1:032x}"}

    @pytest.mark.parametrize(
        ("type_", "tag"),
        [(range, "uuid.UUID"), (uuid.UUID, "uuid.Other"), (range, "range"), (range, "a..b"), (range, "")],
    )
    def test_a_tag_means_one_type_and_has_a_dot(self, type_, tag):
        with pytest.raises(InvalidArgument):
            objects.register_codec(type_, tag, str, str)

    @pytest.mark.parametrize(
        "arguments",
        [("range", "tests.Range", str, str), (range, 5, str, str), (range, "tests.Range", None, str)],
        ids=["type", "tag", "function"],
    )
    def test_what_cannot_be_a_codec_is_refused_when_it_is_registered(self, arguments):
        with pytest.raises(InvalidArgument):
            objects.register_codec(*arguments)
