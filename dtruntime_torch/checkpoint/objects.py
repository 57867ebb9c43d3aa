"""A pickle-free encoding, as JSON, of what is not a tensor: exact in type and value, and no code runs to read it.

Common values are plain JSON; all else is `{"~": tag, "v": ...}`. What is not listed here is refused rather than
turned into something like it: an IntEnum that came back as an int would be found out much later. It costs some
bytes beside pickle, and types of one's own need a codec.
"""

from __future__ import annotations

import base64
import json
import math
import re
import struct
from collections.abc import Callable, Container, Iterable, Mapping
from enum import Enum
from typing import NamedTuple, TypeVar, Union

from dtruntime_torch.checkpoint.names import MAX_INTEGER
from dtruntime_torch.errors import CorruptCheckpoint, InvalidArgument, UnsupportedType

Json = Union[None, bool, int, float, str, "list[Json]", "dict[str, Json]"]
T = TypeVar("T")

MAX_DEPTH = 64

_NATIVE = frozenset(
    {type(None), bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset},
)

_HEX_INTEGER = re.compile(r"-?[0-9a-f]+")
_HEX_FLOAT = re.compile(r"[0-9a-f]{16}")
_HEX_COMPLEX = re.compile(r"[0-9a-f]{32}")
_CODEC_TAG = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)+")


class _Codec(NamedTuple):
    type: type
    tag: str
    encode: Callable[[object], object]
    decode: Callable[[object], object]


_codecs_by_type: dict[type, _Codec] = {}
_codecs_by_tag: dict[str, _Codec] = {}


def register_codec(
    type_: type[T], tag: str, encode: Callable[[T], object], decode: Callable[[object], T]
) -> None:
    """Teaches checkpoints a type of values; subclasses of it stay refused.

    Call it before the first save or load, in every job that meets such values.

    Args:
        type_: the exact type.
        tag: its name on storage, with a dot in it: "torch.Size". It may never mean anything else.
        encode: gives a value that can be stored; equal values must give equal ones.
        decode: makes it again from that value. It must check what it is given: that comes from a file. Whatever
            it raises becomes CorruptCheckpoint, but for a RecursionError.

    Raises:
        InvalidArgument: the tag has no dot or names another type already; the type has another tag, is stored without
            any, or is none; or a function is none.

    Example:
        >>> register_codec(range, "builtins.range", lambda r: (r.start, r.stop, r.step), lambda v: range(*v))
        >>> decode(encode(range(3), "r"), "r")
        range(0, 3)
    """
    if not isinstance(type_, type) or not callable(encode) or not callable(decode):
        raise InvalidArgument(
            f"register_codec takes a type, its tag and two functions, and not {type_!r}, {tag!r}, ..."
        )
    if not isinstance(tag, str) or not _CODEC_TAG.fullmatch(tag):
        raise InvalidArgument(f"the codec tag {tag!r} must be dotted identifiers, such as 'package.Type'")
    if type_ in _NATIVE:
        raise InvalidArgument(f"a {type_.__qualname__} is stored as it is and needs no codec")
    for known in (_codecs_by_type.get(type_), _codecs_by_tag.get(tag)):
        if known is not None and (known.type, known.tag) != (type_, tag):
            raise InvalidArgument(f"{known.tag!r} is registered for {known.type.__qualname__} already")
    codec = _Codec(type_, tag, encode, decode)  # type: ignore[arg-type]  # looked up by exact type only
    _codecs_by_type[type_] = _codecs_by_tag[tag] = codec


def has_codec(kind: type) -> bool:
    """Whether values of exactly this type are stored by a codec."""
    return kind in _codecs_by_type


def codec_types() -> tuple[type, ...]:
    """The types whose values are stored by a codec."""
    return tuple(_codecs_by_type)


def encode(value: object, where: str) -> Json:
    """Encodes a value.

    Args:
        value: None, bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict with any of these as
            keys and values, or a type that has a codec; no subclass of them.
        where: the key path of the value, for the error.

    Returns:
        What `decode` turns into an equal value of the same types, the order of dicts included. Equal sets give
        equal JSON, in whatever order they are held.

    Raises:
        UnsupportedType: something in it is of another type, contains itself, or lies more than 64 deep.

    Example:
        >>> encode([1, None, (2.5, b"hi")], "state")
        [1, None, {'~': 'tuple', 'v': [2.5, {'~': 'bytes', 'v': 'aGk='}]}]
    """
    return _encode(value, where, ())


def decode(value: Json, where: str) -> object:
    """Decodes what `encode` gave.

    Args:
        value: parsed JSON; it is trusted in nothing.
        where: the key path of the value, for the error.

    Raises:
        CorruptCheckpoint: no value is encoded like that.

    Example:
        >>> decode({"~": "tuple", "v": [2.5, {"~": "bytes", "v": "aGk="}]}, "state")
        (2.5, b'hi')
    """
    return _decode(value, where, 0)


def is_text(value: str) -> bool:
    """Whether every JSON parser gives the string back: it has no surrogates.

    (Two lone ones side by side would come back as one character.)
    """
    return value.isascii() or not any("\ud800" <= c <= "\udfff" for c in value)


def _encode(value: object, where: str, inside: tuple[int, ...]) -> Json:
    if type(value) is int:
        return value if abs(value) <= MAX_INTEGER else {"~": "int", "v": format(value, "x")}
    if type(value) is float:
        return value if math.isfinite(value) else {"~": "float", "v": struct.pack(">d", value).hex()}
    if type(value) is str:
        return value if is_text(value) else {"~": "str", "v": value.encode("utf-8", "surrogatepass").hex()}
    if type(value) is bool or value is None:
        return value
    if type(value) is bytes:
        return {"~": "bytes", "v": base64.b64encode(value).decode("ascii")}
    if type(value) is complex:
        return {"~": "complex", "v": struct.pack(">dd", value.real, value.imag).hex()}
    return _encode_nested(value, where, inside)


def _encode_nested(value: object, where: str, inside: tuple[int, ...]) -> Json:
    if id(value) in inside:
        raise UnsupportedType(f"{where}: a {type(value).__qualname__} that contains itself cannot be stored")
    if len(inside) == MAX_DEPTH:
        raise UnsupportedType(f"{where}: more than {MAX_DEPTH} containers in each other cannot be stored")
    inside = (*inside, id(value))
    if type(value) is list:
        return _encode_items(value, where, inside)
    if type(value) is tuple:
        return {"~": "tuple", "v": _encode_items(value, where, inside)}
    if type(value) is dict:
        return {"~": "dict", "v": _encode_pairs(value, where, inside)}
    if type(value) is set or type(value) is frozenset:
        return {"~": type(value).__name__, "v": _encode_members(value, where, inside)}
    kind = type(value)
    if kind in _codecs_by_type:
        return _encode_by_codec(_codecs_by_type[kind], value, where, inside)
    raise UnsupportedType(
        f"{where}: a {kind.__module__}.{kind.__qualname__} cannot be stored; {_advice(kind)}, or teach it: "
        f"dtruntime_torch.register_codec"
    )


def _advice(kind: type) -> str:
    if issubclass(kind, Enum):
        return "store its .value"
    if issubclass(kind, Mapping):
        return "store dict(...) of it"
    plain = next((base for base in kind.__mro__ if base in _NATIVE), None)
    if plain is not None:
        return f"store {plain.__name__}(...) of it"
    return (
        "turn it into a plain int, float, str, bytes, list, tuple, set or dict first (tensors lie in dicts, lists and "
        "tuples)"
    )


def _encode_by_codec(codec: _Codec, value: object, where: str, inside: tuple[int, ...]) -> Json:
    try:
        plain = codec.encode(value)
    except Exception as error:  # what somebody registered may raise anything
        raise UnsupportedType(
            f"{where}: this {codec.type.__module__}.{codec.type.__qualname__} cannot be stored: {error}"
        ) from error
    return {"~": codec.tag, "v": _encode(plain, where, inside)}


def _encode_items(items: Iterable[object], where: str, inside: tuple[int, ...]) -> list[Json]:
    return [_encode(item, f"{where}[{i}]", inside) for i, item in enumerate(items)]


def _encode_members(members: Iterable[object], where: str, inside: tuple[int, ...]) -> list[Json]:
    """Sorted by what they are encoded as: a set has no order, and equal states have equal bytes."""
    encoded = [_encode(member, f"{where}, a member of it", inside) for member in members]
    return sorted(encoded, key=lambda member: json.dumps(member, sort_keys=True, separators=(",", ":")))


def _encode_pairs(pairs: dict[object, object], where: str, inside: tuple[int, ...]) -> list[Json]:
    return [
        [_encode(key, f"{where}, a key of it", inside), _encode(item, f"{where}[{_show(key)}]", inside)]
        for key, item in pairs.items()
    ]


def _show(key: object) -> str:
    """A dict's key in an error: repr floods the message for some, and raises for a very long int."""
    if type(key) is str or type(key) is bytes:
        return repr(key[:60])
    if type(key) is int and abs(key) > MAX_INTEGER:
        return hex(key)[:60]
    return f"<{type(key).__qualname__}>" if type(key) in (tuple, frozenset) else repr(key)[:60]


def _decode(value: Json, where: str, depth: int) -> object:
    if type(value) is list:
        return _decode_items(value, where, _deeper(depth, where))
    if type(value) is not dict:
        return value
    if value.keys() != {"~", "v"}:
        raise CorruptCheckpoint(f"{where}: an object with the keys {sorted(value)[:5]} encodes nothing")
    tag, inner = value["~"], value["v"]
    if type(tag) is str and tag in _SCALARS and type(inner) is str:
        return _decode_scalar(tag, inner, where)
    depth = _deeper(depth, where)
    if tag == "tuple" and type(inner) is list:
        return tuple(_decode_items(inner, where, depth))
    if tag == "dict" and type(inner) is list:
        return _decode_pairs(inner, where, depth)
    if (tag == "set" or tag == "frozenset") and type(inner) is list:
        members = _decode_members(inner, where, depth)
        return members if tag == "set" else frozenset(members)
    if type(tag) is str and tag in _codecs_by_tag:
        return _decode_by_codec(_codecs_by_tag[tag], inner, where, depth)
    raise CorruptCheckpoint(
        f"{where}: there is no type {str(tag)[:60]!r} here; if the checkpoint is sound, upgrade dtruntime_torch "
        f"or import what registers that type"
    )


def _decode_scalar(tag: str, text: str, where: str) -> object:
    try:
        return _SCALARS[tag](text)
    except ValueError as error:
        raise CorruptCheckpoint(f"{where}: {text[:40]!r} encodes no {tag}") from error


def _decode_by_codec(codec: _Codec, inner: Json, where: str, depth: int) -> object:
    plain = _decode(inner, where, depth)
    try:
        return codec.decode(plain)
    except RecursionError:  # what is decoded is shallow by now: the caller is too deep
        raise
    except Exception as error:  # a codec's own constructor may raise anything on what it is not made for
        raise CorruptCheckpoint(f"{where}: not a {codec.tag}: {error}") from error


def _decode_items(items: list[Json], where: str, depth: int) -> list[object]:
    return [_decode(item, where, depth) for item in items]


def _decode_pairs(pairs: list[Json], where: str, depth: int) -> dict[object, object]:
    result: dict[object, object] = {}
    for pair in pairs:
        if type(pair) is not list or len(pair) != 2:
            raise CorruptCheckpoint(f"{where}: a dict holds something that is no pair of key and value")
        key = _decode(pair[0], where, depth)
        _check_new(key, result, where, "dict", "key")
        result[key] = _decode(pair[1], f"{where}[{_show(key)}]", depth)
    return result


def _decode_members(items: list[Json], where: str, depth: int) -> set[object]:
    result: set[object] = set()
    for item in items:
        member = _decode(item, where, depth)
        _check_new(member, result, where, "set", "member")
        result.add(member)
    return result


def _check_new(value: object, known: Container[object], where: str, container: str, role: str) -> None:
    """Refuses a key or a member that cannot be one, or that is there already."""
    try:
        hash(value)  # looked up in a set, a set would pass for a frozenset
        twice = value in known
    except (TypeError, ValueError) as error:
        raise CorruptCheckpoint(
            f"{where}: a {type(value).__qualname__} cannot be a {container}'s {role}"
        ) from error
    if twice:
        raise CorruptCheckpoint(f"{where}: a {container} holds the {role} {_show(value)} twice")


def _deeper(depth: int, where: str) -> int:
    if depth == MAX_DEPTH:
        raise CorruptCheckpoint(f"{where}: more than {MAX_DEPTH} containers in each other")
    return depth + 1


def _decode_integer(text: str) -> int:
    if not _HEX_INTEGER.fullmatch(text):
        raise ValueError(text[:40])
    return int(text, 16)


def _decode_float(text: str) -> float:
    if not _HEX_FLOAT.fullmatch(text):
        raise ValueError(text[:40])
    return float(struct.unpack(">d", bytes.fromhex(text))[0])


def _decode_complex(text: str) -> complex:
    if not _HEX_COMPLEX.fullmatch(text):
        raise ValueError(text[:40])
    return complex(*struct.unpack(">dd", bytes.fromhex(text)))


def _decode_text(text: str) -> str:
    return bytes.fromhex(text).decode("utf-8", "surrogatepass")


def _decode_bytes(text: str) -> bytes:
    return base64.b64decode(text, validate=True)


_SCALARS: dict[str, Callable[[str], object]] = {
    "int": _decode_integer,
    "float": _decode_float,
    "complex": _decode_complex,
    "str": _decode_text,
    "bytes": _decode_bytes,
}
