"""Values of torch, NumPy and the standard library through a checkpoint: exact in type and value, or refused."""

from __future__ import annotations

import io
import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_strategies
from numpy.typing import NDArray

import dtruntime_torch as dt
from dtruntime_torch.checkpoint import objects
from dtruntime_torch.checkpoint.state.codecs import register_codecs
from dtruntime_torch.checkpoint.state.numpy_codecs import MAX_ARRAY_BYTES
from dtruntime_torch.errors import CorruptCheckpoint, InvalidArgument, UnsupportedType
from tests.checkpoint.memory_checkpoint import load, load_fresh, save

register_codecs()


def through_json(value: object) -> Any:
    return objects.decode(json.loads(json.dumps(objects.encode(value, "state"))), "state")


@pytest.mark.parametrize(
    "value",
    [torch.Size([2, 3]), torch.bfloat16, torch.device("cpu"), torch.device("cuda", 3), Counter({3: 2, 1: 1})],
    ids=repr,
)
def test_values_of_torch_come_back(value):
    loaded = load_fresh(save({"a": value, "b": [value]}))
    assert loaded == {"a": value, "b": [value]}
    assert isinstance(loaded, dict)
    assert type(loaded["a"]) is type(value)


def test_a_counter_of_names_comes_back_as_one():
    loaded = load_fresh(save({"a": Counter(x=2), "b": [Counter(y=1)]}))
    assert isinstance(loaded, dict)
    assert (type(loaded["a"]), type(loaded["b"][0])) == (Counter, Counter)
    assert loaded == {"a": {"x": 2}, "b": [{"y": 1}]}


def test_a_stream_of_bytes_comes_back_where_it_stood():
    stream = io.BytesIO(b"some bytes")
    stream.seek(5)
    loaded = load_fresh(save({"a": stream}))
    assert isinstance(loaded, dict) and type(loaded["a"]) is io.BytesIO
    assert (loaded["a"].getvalue(), loaded["a"].tell()) == (b"some bytes", 5)
    assert stream.tell() == 5


@pytest.mark.parametrize(
    "held", [None, "text", ["text", 0], [[1], 0], [{"~": "bytes", "v": ""}, -1]], ids=repr
)
def test_what_is_no_stream_of_bytes_is_refused(held):
    with pytest.raises(CorruptCheckpoint, match="not a io.BytesIO"):
        objects.decode({"~": "io.BytesIO", "v": held}, "state")


SCALARS = {
    "bool": np.bool_(True),
    "int8": np.int8(-3),
    "int16": np.int16(-300),
    "int32": np.int32(7),
    "int64": np.int64(-(2**63)),
    "uint8": np.uint8(255),
    "uint16": np.uint16(1),
    "uint32": np.uint32(1),
    "uint64": np.uint64(2**64 - 1),
    "float16": np.float16(0.1),
    "float32": np.float32(-0.0),
    "float64": np.float64(1e-320),
    "inf": np.float64(np.inf),
    "complex64": np.complex64(1 - 2j),
    "complex128": np.complex128(complex(-0.0, np.inf)),
    "datetime64": np.datetime64("2026-01-02T03:04:05.678"),
    "many seconds": np.datetime64(3, "25s"),
    "timedelta64": np.timedelta64(-4, "ns"),
    "no unit": np.timedelta64(4),
    "str": np.str_("ä\ud800\0"),
    "bytes": np.bytes_(b"a\0"),
}


@pytest.mark.parametrize("name", SCALARS)
def test_a_scalar_of_numpy_comes_back_as_value_and_as_key(name):
    value = SCALARS[name]
    # Without a unit there is no hash either.
    back = through_json([value, {} if name == "no unit" else {value: 1}])
    for one in (back[0], *back[1]):
        assert type(one) is type(value)
        assert one == value
        assert not isinstance(value, (str, bytes)) or len(one) == len(value)
        if not isinstance(value, (str, bytes)):
            assert one.dtype == value.dtype
            assert one.tobytes() == value.tobytes()


@given(st.integers(0, 2**32 - 1))
def test_a_float_of_numpy_keeps_its_bits_whatever_they_are(bits):
    value = np.uint32(bits).view(np.float32)
    assert through_json(value).view(np.uint32) == bits


ARRAY_DTYPES = (
    numpy_strategies.boolean_dtypes()
    | numpy_strategies.integer_dtypes(endianness="?")
    | numpy_strategies.unsigned_integer_dtypes(endianness="?")
    | numpy_strategies.floating_dtypes(endianness="?", sizes=(16, 32, 64))
    | numpy_strategies.complex_number_dtypes(endianness="?", sizes=(64, 128))
    | numpy_strategies.datetime64_dtypes(endianness="?")
    | numpy_strategies.timedelta64_dtypes(endianness="?")
    | numpy_strategies.unicode_string_dtypes(endianness="?", max_len=5)
    | numpy_strategies.byte_string_dtypes(max_len=5)
)


def assert_same_array(actual: NDArray[Any], expected: NDArray[Any]) -> None:
    assert type(actual) is np.ndarray
    assert (actual.dtype, actual.dtype.str, actual.shape) == (
        expected.dtype,
        expected.dtype.str,
        expected.shape,
    )
    assert actual.tobytes() == expected.tobytes()


@given(
    numpy_strategies.arrays(ARRAY_DTYPES, numpy_strategies.array_shapes(min_dims=0, min_side=0, max_side=3))
)
def test_any_array_comes_back_identical(array):
    assert_same_array(through_json(array), array)
    assert_same_array(through_json(array.T), array.T)


def test_an_array_of_a_checkpoint_is_the_user_s_own():
    state = {"a": {"stats": np.arange(6.0).reshape(2, 3)}, "list": [np.arange(2), 3]}
    target: dict[str, Any] = {"a": {"stats": None}, "list": []}
    load(save(state), target)
    assert_same_array(target["a"]["stats"], np.arange(6.0).reshape(2, 3))
    assert_same_array(target["list"][0], np.arange(2))
    target["a"]["stats"] += 1


def test_the_state_of_numpy_s_generator_comes_back():
    generator = np.random.Generator(np.random.PCG64(3))
    legacy = np.random.RandomState(4)
    back = through_json([generator.bit_generator.state, legacy.get_state()])
    generator.bit_generator.state, expected = back[0], generator.random()
    legacy.set_state(back[1])
    assert generator.random() == expected
    assert legacy.rand() == np.random.RandomState(4).rand()


class Matrix(np.ndarray):  # type: ignore[type-arg]
    pass


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (np.array([None, 1]), "its dtype is object"),
        (np.zeros(2, "i4,f8"), "its dtype is"),
        (np.zeros(2, np.longdouble), "its dtype is"),
        (np.zeros(2, "V3"), "its dtype is"),
        (np.zeros(MAX_ARRAY_BYTES + 1, np.int8), "torch.from_numpy"),
        (np.zeros(2).view(Matrix), "Matrix cannot be stored"),
        (np.ma.masked_array([1, 2], [True, False]), "MaskedArray cannot be stored"),
        (np.zeros(1, "i4,f8")[0], "numpy.void cannot be stored"),
        (np.longdouble(1), "longdouble cannot be stored"),
    ],
    ids=lambda value: str(type(value)),
)
def test_other_arrays_are_refused_by_their_key(value, says):
    with pytest.raises(UnsupportedType) as caught:
        objects.encode({"a": [value]}, "state")
    assert str(caught.value).startswith("state['a'][0]: ")
    assert says in str(caught.value)


def data(text: str) -> dict[str, str]:
    return {"~": "bytes", "v": text}


UNHASHABLE = {"~": "numpy.timedelta64", "v": ["<m8", {"~": "bytes", "v": "AAAAAAAAAAA="}]}


@pytest.mark.parametrize("value", [{"~": "set", "v": [UNHASHABLE]}, {"~": "dict", "v": [[UNHASHABLE, 1]]}])
def test_a_value_without_a_hash_is_no_key_and_no_member(value):
    with pytest.raises(CorruptCheckpoint, match="timedelta64 cannot be a"):
        objects.decode(value, "w")


HOSTILE = [
    ("torch.dtype", "save"),
    ("torch.dtype", 3),
    ("torch.device", "nowhere"),
    ("torch.device", 0),
    ("torch.Size", 3),
    ("torch.Size", ["a"]),
    ("torch.Size", {"~": "dict", "v": [[1, 2]]}),
    ("collections.Counter", "abc"),
    ("numpy.ndarray", ["<i4", [1]]),
    ("numpy.ndarray", {"~": "tuple", "v": ["<i4", [1], data("AAAAAA==")]}),
    ("numpy.ndarray", ["|O", [1], data("AAAAAAAAAAA=")]),
    ("numpy.ndarray", ["i4,f8", [1], data("AAAAAAAAAAA=")]),
    ("numpy.ndarray", ["i4", [1], data("AAAAAA==")]),
    ("numpy.ndarray", ["=i4", [1], data("AAAAAA==")]),
    ("numpy.ndarray", ["<i1", [1], data("AA==")]),
    ("numpy.ndarray", ["<f16", [1], data("AAAAAAAAAAAAAAAAAAAAAA==")]),
    ("numpy.ndarray", ["|S0", [0], data("")]),
    ("numpy.ndarray", ["<M8[parsec]", [1], data("AAAAAAAAAAA=")]),
    ("numpy.ndarray", ["<M8[1s]", [1], data("AAAAAAAAAAA=")]),
    ("numpy.ndarray", [3, [1], data("AAAAAA==")]),
    ("numpy.ndarray", ["<i4", 1, data("AAAAAA==")]),
    ("numpy.ndarray", ["<i4", [-1, -1], data("AAAAAA==")]),
    ("numpy.ndarray", ["<i4", [True], data("AAAAAA==")]),
    ("numpy.ndarray", ["<i4", [1.0], data("AAAAAA==")]),
    ("numpy.ndarray", ["<i4", [2**40, 2**40], data("AAAAAA==")]),
    ("numpy.ndarray", ["<i4", [2], data("AAAAAA==")]),
    ("numpy.ndarray", ["<i4", [1], "AAAA"]),
    ("numpy.ndarray", ["<i4", [1] * 65, data("AAAAAA==")]),
    ("numpy.ndarray", ["<U1", [1], data("AAARAA==")]),
    ("numpy.int64", ["<i4", data("AAAAAA==")]),
    ("numpy.int64", [7, data("AAAAAA==")]),
    ("numpy.int64", 7),
    ("numpy.float32", ["<f4", data("AAAA")]),
    ("numpy.str", 7),
    ("numpy.bytes", "a"),
]


@pytest.mark.parametrize(("tag", "value"), HOSTILE, ids=lambda part: str(part)[:40])
def test_hostile_values_are_refused(tag, value):
    with pytest.raises(CorruptCheckpoint, match="^w: not a "):
        objects.decode({"~": tag, "v": value}, "w")


class Rate:
    """A type of a user's own, that no test but these knows."""

    def __init__(self, value: float) -> None:
        self.value = value


class Config(dict):  # type: ignore[type-arg]
    pass


@pytest.fixture
def taught(own_codecs):
    dt.register_codec(Rate, "tests.Rate", lambda rate: rate.value, lambda value: Rate(float(str(value))))
    dt.register_codec(Config, "tests.Config", dict, lambda value: Config(value))  # type: ignore[call-overload]


@pytest.mark.usefixtures("taught")
def test_a_type_of_one_s_own_goes_through_a_checkpoint_once_it_was_taught(tmp_path):
    with dt.CheckpointManager(tmp_path) as manager:
        manager.save({"rate": Rate(0.5), "config": Config(a=1), "more": [Config(b=2)]}, 1)
        state: dict[str, Any] = {"rate": None, "config": None, "more": None}
        manager.load(state)
    assert (type(state["rate"]), state["rate"].value) == (Rate, 0.5)
    assert (type(state["config"]), state["config"]) == (Config, {"a": 1})
    assert (type(state["more"][0]), state["more"]) == (Config, [{"b": 2}])


def test_our_own_tags_are_taken():
    with pytest.raises(InvalidArgument, match="torch.Size"):
        dt.register_codec(torch.Size, "mine.Size", list, torch.Size)
