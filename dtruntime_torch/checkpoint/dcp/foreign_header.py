"""The header of a safetensors file that somebody else wrote, read with distrust."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

from dtruntime_torch.checkpoint.dtypes import dtype_of_code, itemsize
from dtruntime_torch.checkpoint.saving.layout import MAX_HEADER_BYTES
from dtruntime_torch.checkpoint.specs import MAX_DIMENSIONS, Shape
from dtruntime_torch.errors import CorruptCheckpoint, Damage, UnsupportedType
from dtruntime_torch.storage import StorageBackend

_LENGTH_BYTES = 8


@dataclass(frozen=True, slots=True)
class ForeignTensor:
    """A tensor as a header has it.

    Attributes:
        name: of the tensor.
        dtype: torch's name of it.
        offsets: where it starts in the whole tensor; zeros unless DCP cut it.
        shape: its own.
        begin: its first byte in the file.
    """

    name: str
    dtype: str
    offsets: Shape
    shape: Shape
    begin: int

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return math.prod(self.shape) * itemsize(self.dtype)


async def read_header(backend: StorageBackend, path: str) -> tuple[int, int, list[ForeignTensor]]:
    """Reads and checks a header; nothing else of the file is read.

    Args:
        backend: where it lies.
        path: of the file.

    Returns:
        The file's length, the length of its header, and its tensors.

    Raises:
        CorruptCheckpoint: it is no header, or does not fit the file.
        UnsupportedType: a tensor has a dtype that is unknown here.
    """
    size = await backend.size(path)
    if size < _LENGTH_BYTES:
        raise _damaged(path, size, "at least 8 bytes", f"{size} bytes")
    length = int.from_bytes(bytes(await backend.read_range(path, 0, _LENGTH_BYTES)), "little")
    if length > min(MAX_HEADER_BYTES, size - _LENGTH_BYTES):
        raise _damaged(path, _LENGTH_BYTES, f"a header within {size} bytes", f"one of {length}")
    text = bytes(await backend.read_range(path, _LENGTH_BYTES, length))
    begin = _LENGTH_BYTES + length
    try:
        table = json.loads(text, object_pairs_hook=_unique)
        starts = _saved_offsets(table.pop("__metadata__", {}))
        tensors = [_tensor(name, fields, starts, begin, size) for name, fields in table.items()]
    except UnsupportedType:
        raise
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise _damaged(path, begin, "a safetensors header", f"none: {error}") from error
    return size, begin, tensors


def _saved_offsets(metadata: dict[str, str]) -> dict[str, list[int]]:
    """Where DCP says that a shard starts: name -> offsets."""
    text = metadata.get("DCP_SHARDING_INFO")
    return {name: info["saved_offsets"] for name, info in json.loads(text).items()} if text else {}


def _tensor(
    name: str, fields: dict[str, object], starts: dict[str, list[int]], begin: int, size: int
) -> ForeignTensor:
    code = str(fields["dtype"])
    dtype = dtype_of_code(code)
    if dtype is None:
        raise UnsupportedType(f"{name}: the dtype {code[:20]!r} is unknown here; upgrade dtruntime_torch")
    shape = _integers(fields["shape"])
    first, last = _integers(fields["data_offsets"])
    offsets = _integers(starts.get(name, [0] * len(shape)))
    if len(shape) > MAX_DIMENSIONS or len(offsets) != len(shape):
        raise ValueError(f"{name} has {len(shape)} dimensions and {len(offsets)} offsets")
    tensor = ForeignTensor(name, dtype, offsets, shape, begin + first)
    if last - first != tensor.nbytes or begin + last > size:
        raise ValueError(f"{name} has {tensor.nbytes} bytes, and bytes [{first}, {last}) of the file's data")
    return tensor


def _integers(value: object) -> Shape:
    if type(value) is not list or not all(type(one) is int and 0 <= one < 2**53 for one in value):
        raise ValueError(f"{value!r:.60} is no list of sizes")
    return tuple(value)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _damaged(path: str, stop: int, expected: str, actual: str) -> CorruptCheckpoint:
    damage = Damage(path, None, 0, stop, expected, actual)
    return CorruptCheckpoint(f"damaged: {damage}", [damage])
