"""NumPy's arrays and scalars as values: exact in dtype, byte order, shape and bits.

They lie in the part manifest, which every rank reads: made for the states of generators, for statistics and tables.
What is large belongs in a tensor, which is written in parallel, digested by chunks, and left alone where it did not
change; so arrays beyond `MAX_ARRAY_BYTES` are refused with that advice.
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dtruntime_torch.checkpoint.objects import register_codec

MAX_ARRAY_BYTES = 16 << 20

# What means the same everywhere: no objects, records, platform's long doubles.
_DTYPE = re.compile(
    r"\|b1|\|[iu]1|[<>](?:[iu][248]|f[248]|c(?:8|16)|U[1-9][0-9]{0,8}|[mM]8(?:\[[A-Za-z0-9]{1,30}\])?)|\|S[1-9][0-9]{0,8}"
)
_MAX_CODE_POINT = 0x10FFFF

_SCALARS = (
    np.bool_, np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64,
    np.float16, np.float32, np.float64, np.complex64, np.complex128, np.datetime64, np.timedelta64,
)  # fmt: skip


def register_numpy() -> None:
    """Registers the codecs of arrays and scalars."""
    register_codec(np.ndarray, "numpy.ndarray", _encode_array, _array_of)
    for kind in _SCALARS:
        register_codec(kind, f"numpy.{kind.__name__.rstrip('_')}", _encode_scalar, _scalar_decoder(kind))
    # NumPy itself forgets zeros at the ends of strings, so these go by what they inherit.
    register_codec(np.str_, "numpy.str", str.__str__, lambda text: np.str_(_checked(text, str)))
    register_codec(np.bytes_, "numpy.bytes", bytes, lambda data: np.bytes_(_checked(data, bytes)))


def _encode_array(array: NDArray[Any]) -> list[object]:
    if not _DTYPE.fullmatch(array.dtype.str) or array.dtype.names is not None:
        raise ValueError(
            f"its dtype is {array.dtype}, and stored are booleans, integers, floats of 16 to 64 bits, complex numbers, "
            f"times, and strings of a fixed width; convert it first"
        )
    if array.nbytes > MAX_ARRAY_BYTES:
        raise ValueError(
            f"it has {array.nbytes} bytes, and values are stored up to {MAX_ARRAY_BYTES}; store "
            f"torch.from_numpy(array), which shares its memory, instead"
        )
    return [array.dtype.str, list(array.shape), array.tobytes()]


def _array_of(value: object) -> NDArray[Any]:
    text, shape, data = _checked(value, list)
    if not _DTYPE.fullmatch(_checked(text, str)):
        raise ValueError(f"there is no dtype {text[:40]!r} here")
    dtype = np.dtype(text)
    if dtype.str != text:
        raise ValueError(f"the dtype {text[:40]!r} is written {dtype.str!r}")
    if any(type(size) is not int or size < 0 for size in _checked(shape, list)):
        raise ValueError(f"{str(shape)[:60]} is no shape")
    if len(_checked(data, bytes)) != dtype.itemsize * math.prod(shape):
        raise ValueError(f"{len(data)} bytes are no array of {text} and shape {str(shape)[:60]}")
    array: NDArray[Any] = np.frombuffer(bytearray(data), dtype).reshape(shape)
    if dtype.kind == "U" and array.size and _code_points(array).max() > _MAX_CODE_POINT:
        raise ValueError("it holds what is no character")
    return array


def _code_points(array: NDArray[Any]) -> NDArray[np.uint32]:
    return np.frombuffer(array.tobytes(), np.dtype(np.uint32).newbyteorder(array.dtype.byteorder))


def _encode_scalar(scalar: np.generic) -> list[object]:
    return [scalar.dtype.str, scalar.tobytes()]


def _scalar_decoder(kind: type[np.generic]) -> Any:
    def decode(value: object) -> np.generic:
        text, data = _checked(value, list)
        scalar: np.generic = _array_of([text, [], data])[()]  # type: ignore[assignment]  # of no dimension
        if type(scalar) is not kind:
            raise ValueError(f"{text} is no dtype of it")
        return scalar

    return decode


def _checked(value: object, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"there is a {type(value).__name__} where a {kind.__name__} belongs")
    return value
