"""Values of many types: what a state may hold, what it may not, and whether two are the same in type and value."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import fractions
import pathlib
import struct
import types
import uuid
from collections import (
    ChainMap,
    Counter,
    OrderedDict,
    UserDict,
    UserList,
    UserString,
    defaultdict,
    deque,
    namedtuple,
)
from typing import Any, NamedTuple

import numpy as np
import torch


class Pair(NamedTuple):
    left: object
    right: object


class Dict(dict):  # type: ignore[type-arg]
    pass


class Ordered(OrderedDict):  # type: ignore[type-arg]
    pass


class List(list):  # type: ignore[type-arg]
    pass


class Tuple(tuple):  # type: ignore[type-arg]
    pass


class Set(set):  # type: ignore[type-arg]
    pass


class Frozen(frozenset):  # type: ignore[type-arg]
    pass


class Text(str):
    pass


class Bytes(bytes):
    pass


class Int(int):
    pass


class Float(float):
    pass


class Complex(complex):
    pass


class Colour(enum.Enum):
    RED = 1


class Level(enum.IntEnum):
    LOW = 1


class Flags(enum.IntFlag):
    A = 1


class Word(str, enum.Enum):
    A = "a"


class Tensor(torch.Tensor):
    pass


class Parameter(torch.nn.Parameter):
    pass


@dataclasses.dataclass
class Config:
    lr: float = 0.1


Point = namedtuple("Point", "x y")


def same(actual: Any, expected: Any) -> bool:
    """Equal in type and value, all the way down: NaN by its bits, dicts in their order, tensors bit for bit."""
    if type(actual) is not type(expected):
        return False
    if isinstance(expected, dict):
        return len(actual) == len(expected) and all(map(same, actual.items(), expected.items()))
    if isinstance(expected, (list, tuple)):
        return len(actual) == len(expected) and all(map(same, actual, expected))
    if isinstance(expected, (set, frozenset)):
        return sorted(map(shown, actual)) == sorted(map(shown, expected))
    if isinstance(expected, torch.Tensor):
        return (
            actual.dtype == expected.dtype
            and actual.shape == expected.shape
            and bits(actual) == bits(expected)
        )
    if isinstance(expected, (np.ndarray, np.generic)):
        return (actual.dtype.str, actual.shape, actual.tobytes()) == (
            expected.dtype.str, expected.shape, expected.tobytes()
        )  # fmt: skip
    if type(expected) is float:
        return struct.pack("d", actual) == struct.pack("d", expected)
    if type(expected) is complex:
        return same([actual.real, actual.imag], [expected.real, expected.imag])
    return bool(actual == expected)


def shown(member: object) -> str:
    """Tells 1 from 1.0 and True, also in a tuple or a frozenset in a set."""
    if isinstance(member, frozenset):
        return f"{type(member)} {sorted(map(shown, member))}"
    if isinstance(member, tuple):
        return f"{type(member)} {list(map(shown, member))}"
    return f"{type(member)} {member!r}"


def bits(tensor: torch.Tensor) -> bytes:
    return (
        tensor.detach().resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    )


ONE = torch.ones(2)

KEPT: dict[str, object] = {
    "none": None,
    "bool": True,
    "int": 7,
    "a long int": -(2**200),
    "float": 0.1,
    "minus zero": -0.0,
    "nan": float("nan"),
    "complex": complex(-0.0, float("inf")),
    "str": "ä\0\ud800",
    "bytes": b"\0\xff",
    "list": [1, [2.0], "x"],
    "an empty list": [],
    "tuple": (1, (2, ())),
    "set": {1, "a", (2.0, None), frozenset({b""})},
    "frozenset": frozenset({1}),
    "dict": {"a": {"b": 1}},
    "an empty dict": {},
    "a dict of any keys": {1: 1, None: 2, (True, "a"): 3, b"b": 4, 2.5: 5, frozenset({1}): 6},
    "OrderedDict": OrderedDict(b=1, a=OrderedDict()),
    "an OrderedDict of int": OrderedDict({2: "a", 1: OrderedDict({3: 4})}),
    "an OrderedDict of tensors": OrderedDict(b=ONE, a=[OrderedDict(c=ONE), 1]),
    "an OrderedDict in a tuple": (OrderedDict(a=1), ONE),
    "an OrderedDict in a list": [OrderedDict(a=1), {"b": OrderedDict()}],
    "Counter": Counter({"a": 2, 3: -1}),
    "torch.Size": torch.Size([2, 3]),
    "torch.dtype": torch.bfloat16,
    "torch.device": torch.device("cuda", 1),
    "tensor": ONE,
    "a list of tensors": [ONE, (ONE, 1), {"x": ONE}],
    "a dict of int and tensors": {1: ONE, 2: 3},
    "np.float64": np.float64(0.1),
    "np.float16": np.float16(0.1),
    "np.int64": np.int64(3),
    "np.bool": np.bool_(True),
    "np.str": np.str_("a"),
    "np.bytes": np.bytes_(b"a"),
    "np.complex64": np.complex64(1j),
    "np.datetime64": np.datetime64("2026-01-02"),
    "np.timedelta64": np.timedelta64(3, "s"),
    "an array": np.arange(6, dtype=">i2").reshape(2, 3),
    "an array without dimensions": np.array(2.5),
    "an array in Fortran's order": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "an array of str": np.array(["a", "bc"]),
}

REFUSED: dict[str, object] = {
    "defaultdict": defaultdict(list, a=[1]),
    "an empty defaultdict": defaultdict(int),
    "a defaultdict of int": defaultdict(int, {1: 2}),
    "a defaultdict of tensors": defaultdict(list, a=ONE),
    "a defaultdict in a list": [1, defaultdict(list)],
    "ChainMap": ChainMap({"a": 1}),
    "UserDict": UserDict(a=1),
    "mappingproxy": types.MappingProxyType({"a": 1}),
    "a subclass of dict": Dict(a=1),
    "a subclass of dict, empty": Dict(),
    "a subclass of dict with a tensor": Dict(a=ONE),
    "a subclass of OrderedDict": Ordered(a=ONE),
    "a subclass of Counter": type("Tally", (Counter,), {})({"a": 1}),
    "a subclass of list": List([1]),
    "a subclass of list with a tensor": List([ONE]),
    "UserList": UserList([1]),
    "deque": deque([1]),
    "array": memoryview(b"a"),
    "a subclass of tuple": Tuple((1,)),
    "a subclass of tuple with a tensor": Tuple((ONE,)),
    "namedtuple": Point(1, 2),
    "a NamedTuple with a tensor": Pair(ONE, 1),
    "what torch.max returns": torch.max(torch.ones(2, 2), 0),
    "a subclass of set": Set({1}),
    "a subclass of frozenset": Frozen({1}),
    "a set of tensors": {ONE},
    "a subclass of str": Text("a"),
    "UserString": UserString("a"),
    "a subclass of bytes": Bytes(b"a"),
    "bytearray": bytearray(b"a"),
    "a subclass of int": Int(1),
    "a subclass of float": Float(1),
    "a subclass of complex": Complex(1),
    "Enum": Colour.RED,
    "IntEnum": Level.LOW,
    "IntFlag": Flags.A,
    "a str Enum": Word.A,
    "a key that is an Enum": {Level.LOW: 1},
    "a key that is a subclass of str": {Text("a"): ONE},
    "a key that is a str Enum": {Word.A: 1},
    "a member that is an Enum": {Level.LOW},
    "matrix": np.matrix([[1]]),
    "masked array": np.ma.masked_array([1, 2], [True, False]),
    "recarray": np.rec.array([(1, 2.0)]),
    "an array of objects": np.array([None]),
    "a structured array": np.zeros(1, "i4,f8"),
    "np.longdouble": np.longdouble(1),
    "np.void": np.zeros(1, "i4,f8")[0],
    "a subclass of Tensor": torch.ones(2).as_subclass(Tensor),
    "a subclass of Parameter": Parameter(torch.ones(2)),
    "a subclass of Tensor in a list": [torch.ones(2).as_subclass(Tensor)],
    "Storage": ONE.untyped_storage(),
    "Generator": torch.Generator(),
    "torch.layout": torch.strided,
    "Decimal": decimal.Decimal(1),
    "Fraction": fractions.Fraction(1, 2),
    "datetime": datetime.datetime(2026, 1, 2),
    "Path": pathlib.PurePosixPath("a"),
    "UUID": uuid.UUID(int=1),
    "range": range(3),
    "slice": slice(3),
    "a dataclass": Config(),
    "SimpleNamespace": types.SimpleNamespace(a=1),
    "a function": shown,
    "a class": Config,
    "a module": types,
    "keys of a dict": {"a": 1}.keys(),
    "an iterator": iter([1]),
    "Ellipsis": ...,
    "object": object(),
}  # fmt: skip
