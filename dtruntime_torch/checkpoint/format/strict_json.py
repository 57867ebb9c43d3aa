"""JSON that is read with distrust: one form of each number, no key twice, no surprise types.

`json` alone takes NaN, 1e999, a key twice, any encoding and integers that take minutes to parse. Canonical JSON,
as `dump` writes it: ASCII, sorted keys, no spaces; equal records are equal bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

from dtruntime_torch.checkpoint.names import MAX_INTEGER
from dtruntime_torch.checkpoint.objects import Json, is_text

_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)


class Refused(ValueError):
    """Why something is no record of ours; whoever knows the file's name makes the error of it."""


class Newer(Refused):
    """The file says that it needs a later version of this package."""


def dump(value: Mapping[str, Json], ready: Mapping[str, str] | None = None) -> bytes:
    """Encodes canonically.

    Args:
        value: fields of an object.
        ready: more of its fields, none of which are in `value`; their values are canonical JSON already.

    Raises:
        ValueError: a float is not finite, or it is nested too deep.

    Example:
        >>> dump({"b": [1, 2.5], "a": None})
        b'{"a":null,"b":[1,2.5]}'
        >>> dump({"b": 1}, {"a": "[2]"})
        b'{"a":[2],"b":1}'
    """
    try:
        if not ready:
            return encoded(value).encode("ascii")
        texts = {**{key: encoded(field) for key, field in value.items()}, **ready}
        fields = ",".join(f"{quoted(key)}:{texts[key]}" for key in sorted(texts))
        return f"{{{fields}}}".encode("ascii")
    except RecursionError:
        raise Refused("it is nested too deep") from None


def quoted(text: str) -> str:
    """A string as it is in canonical JSON."""
    return json.encoder.encode_basestring_ascii(text)


def encoded(value: Json | Mapping[str, Json]) -> str:
    """A value as canonical JSON."""
    return _ENCODER.encode(value)


def parse(data: bytes) -> Fields:
    """Decodes one JSON object.

    Raises:
        Refused: it is not ASCII JSON, no object, nested too deep, has a key twice, an integer beyond 2**53 - 1
            in either direction, or a number that is not finite.
    """
    try:
        value = json.loads(
            data.decode("ascii"),
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_int=_integer,
            parse_float=_finite,
        )
    except RecursionError:
        raise Refused("it is nested too deep") from None
    except UnicodeDecodeError as error:
        raise Refused(f"byte {error.start} is not ASCII") from None
    except json.JSONDecodeError as error:
        raise Refused(f"it is no JSON: {error}") from None
    return Fields(value, "it")


class Fields:
    """A JSON object of which each field is asked for by its type; fields that nobody asks for are left alone.

    Args:
        value: parsed JSON, an object if all is well.
        where: what it is, for the error.
    """

    def __init__(self, value: Json, where: str) -> None:
        if type(value) is not dict:
            raise Refused(f"{where} is no object")
        self._value = value
        self._where = where

    def json(self, key: str) -> Json:
        """Any value."""
        if key not in self._value:
            raise Refused(f"{self._where} lacks {key!r}")
        return self._value[key]

    def integer(self, key: str) -> int:
        """An integer from 0 to 2**53 - 1."""
        return whole(self.json(key), f"{key!r} of {self._where}")

    def boolean(self, key: str) -> bool:
        """True or false."""
        value = self.json(key)
        if type(value) is not bool:
            raise Refused(f"{key!r} of {self._where} is neither true nor false")
        return value

    def string(self, key: str) -> str:
        """A string without surrogates."""
        value = self.json(key)
        if type(value) is not str or not is_text(value):
            raise Refused(f"{key!r} of {self._where} is no string")
        return value

    def digest(self, key: str) -> bytes:
        """Bytes as lower-case hex."""
        text = self.string(key)
        try:
            value = bytes.fromhex(text)
        except ValueError:
            value = b""
        if value.hex() != text:
            raise Refused(f"{key!r} of {self._where} is no lower-case hex")
        return value

    def array(self, key: str) -> list[Json]:
        """An array."""
        return items(self.json(key), f"{key!r} of {self._where}")

    def integers(self, key: str) -> tuple[int, ...]:
        """An array of integers from 0 to 2**53 - 1."""
        where = f"{key!r} of {self._where}"
        return tuple(whole(value, where) for value in items(self.json(key), where))

    def strings(self, key: str) -> tuple[str, ...]:
        """An array of strings."""
        values = self.array(key)
        if not all(type(value) is str and is_text(value) for value in values):
            raise Refused(f"{key!r} of {self._where} holds something else than strings")
        return tuple(str(value) for value in values)

    def object(self, key: str) -> dict[str, Json]:
        """An object."""
        value = self.json(key)
        if type(value) is not dict:
            raise Refused(f"{key!r} of {self._where} is no object")
        return value


def whole(value: Json, where: str) -> int:
    """Returns the value if it is an integer that is not negative."""
    if type(value) is not int or value < 0:
        raise Refused(f"{where} is no integer from 0 to {MAX_INTEGER}")
    return value


def items(value: Json, where: str, length: int | None = None) -> list[Json]:
    """Returns the value if it is an array, of that length if one is given."""
    if type(value) is not list:
        raise Refused(f"{where} is no array")
    if length is not None and len(value) != length:
        raise Refused(f"{where} has {len(value)} items in place of {length}")
    return value


def _unique(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise Refused("a key occurs twice in one object")
    return result


def _no_constant(text: str) -> Json:
    raise Refused(f"{text} is not JSON")


def _integer(text: str) -> int:
    # The length first: Python before 3.10.7 takes quadratic time for the digits.
    if len(text) > 17 or abs(int(text)) > MAX_INTEGER:
        raise Refused(f"the integer {text[:20]} lies beyond {MAX_INTEGER}")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise Refused(f"the number {text[:20]} is not finite")
    return value
