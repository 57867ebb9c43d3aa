"""torch's dtypes by name, with their sizes and what safetensors calls them. No torch is imported.

A dtype that safetensors lacks is stored as U8 bytes; its true name is in the part manifest.
"""

from __future__ import annotations

from dtruntime_torch.errors import UnsupportedType

# torch's name -> (bytes of an element, safetensors' code or None)
_DTYPES: dict[str, tuple[int, str | None]] = {
    "bool": (1, "BOOL"),
    "uint8": (1, "U8"),
    "int8": (1, "I8"),
    "float8_e4m3fn": (1, "F8_E4M3"),
    "float8_e5m2": (1, "F8_E5M2"),
    # safetensors has F8_E8M0, but its torch half does not map it back: DCP's reader would fail on all of a folder
    "float8_e8m0fnu": (1, None),
    "float8_e4m3fnuz": (1, None),
    "float8_e5m2fnuz": (1, None),
    "uint16": (2, "U16"),
    "int16": (2, "I16"),
    "float16": (2, "F16"),
    "bfloat16": (2, "BF16"),
    "uint32": (4, "U32"),
    "int32": (4, "I32"),
    "float32": (4, "F32"),
    "complex32": (4, None),
    "uint64": (8, "U64"),
    "int64": (8, "I64"),
    "float64": (8, "F64"),
    "complex64": (8, "C64"),
    "complex128": (16, None),
}


NAMES = frozenset(_DTYPES)
"""Of all dtypes whose tensors can be stored."""


def is_known(dtype: str) -> bool:
    """Whether tensors of this dtype can be stored."""
    return dtype in _DTYPES


def itemsize(dtype: str) -> int:
    """Bytes of one element.

    Raises:
        UnsupportedType: the dtype is not in the table.

    Example:
        >>> itemsize("bfloat16")
        2
    """
    return _lookup(dtype)[0]


def safetensors_code(dtype: str) -> str | None:
    """What safetensors calls the dtype, or None where it has no name for it and U8 is stored.

    Example:
        >>> safetensors_code("bfloat16"), safetensors_code("complex128")
        ('BF16', None)
    """
    return _lookup(dtype)[1]


def dtype_of_code(code: str) -> str | None:
    """The dtype that safetensors calls so, or None if there is none here.

    Example:
        >>> dtype_of_code("BF16"), dtype_of_code("F8_E8M0"), dtype_of_code("F4")
        ('bfloat16', 'float8_e8m0fnu', None)
    """
    # Others write it, whatever their readers make of it.
    return "float8_e8m0fnu" if code == "F8_E8M0" else _BY_CODE.get(code)


_BY_CODE = {code: dtype for dtype, (_, code) in _DTYPES.items() if code is not None}


def _lookup(dtype: str) -> tuple[int, str | None]:
    try:
        return _DTYPES[dtype]
    except KeyError:
        raise UnsupportedType(
            f"tensors of dtype torch.{dtype} cannot be stored; convert them first, "
            f"for example with tensor.dequantize() or .view(torch.uint8)"
        ) from None
