"""Where each tensor lies in a rank's data file, and the file's header. Pure.

The file is a safetensors file that also carries the key by which `torch.distributed.checkpoint` finds the shards
of one tensor in several files. Its bytes are laid out before the first of them is there, so that tensors are
copied once, into the image that is written.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from dtruntime_torch.checkpoint.dtypes import itemsize, safetensors_code
from dtruntime_torch.checkpoint.specs import Extent, SavePlan, TensorSpec, WriteItem
from dtruntime_torch.errors import InvalidArgument

ALIGNMENT = 64
"""Data starts at a multiple of this many bytes, so that every tensor is aligned to its element size."""

PAGE = 4096

MAX_HEADER_BYTES = 100_000_000
"""What stock safetensors refuses to read beyond, without the eight bytes of length."""


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of one tensor.

    Attributes:
        item: what is written there.
        offset: its first byte in the file.
        nbytes: its bytes.
        extents: the same as a full save's part says it: one, or none of an empty tensor.
    """

    item: WriteItem
    offset: int
    nbytes: int
    extents: tuple[Extent, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """A data file before its data.

    Attributes:
        header: the first bytes of the file: length, JSON, spaces.
        slots: in the order of the file, one after the other with nothing between: falling element size, then
            the order of the state.
        length: bytes of the file.
    """

    header: bytes
    slots: tuple[Slot, ...]
    length: int


def make_layout(plan: SavePlan, data_at: int | None = None) -> Layout:
    """Lays out what a rank writes.

    Args:
        plan: what the rank writes.
        data_at: as many bytes behind the start of a page of the file the data begins, a multiple of `ALIGNMENT`: what
            lies in its page of memory as it lies in that of the file is written without a copy. None: where it may.

    Raises:
        InvalidArgument: there are more tensors than stock safetensors reads of one file.

    Example:
        >>> spec = TensorSpec("w", (), 0, "float32", (4,), (0,), (4,))
        >>> layout = make_layout(SavePlan(0, 1, (WriteItem(spec, "w"),), (), ()))
        >>> layout.slots[0].offset % ALIGNMENT, layout.length - layout.slots[0].offset
        (0, 16)
    """
    items = sorted(plan.tensors, key=lambda item: -itemsize(item.spec.dtype))
    header = _encode_header(items, data_at)
    slots, offset = [], len(header)
    for item in items:
        nbytes = item.spec.nbytes
        slots.append(Slot(item, offset, nbytes, (Extent(0, offset, nbytes),) if nbytes else ()))
        offset += nbytes
    return Layout(header, tuple(slots), offset)


def _encode_header(items: list[WriteItem], data_at: int | None) -> bytes:
    saved_offsets = {item.name: {"saved_offsets": _stored_offsets(item.spec)} for item in items}
    table: dict[str, object] = {
        "__metadata__": {
            "format": "pt",
            "DCP_SHARDING_INFO": json.dumps(saved_offsets, separators=(",", ":")),
        }
    }
    begin = 0
    for item in items:
        end = begin + item.spec.nbytes
        table[item.name] = {
            "dtype": safetensors_code(item.spec.dtype) or "U8",
            "shape": _stored_shape(item.spec),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(table, separators=(",", ":")).encode()
    begin, unit = (0, ALIGNMENT) if data_at is None else (data_at, PAGE)
    text += b" " * ((begin - 8 - len(text)) % unit)
    if len(text) > MAX_HEADER_BYTES:
        raise InvalidArgument(
            f"{len(items)} tensors on one rank need a header of {len(text)} bytes, and safetensors reads at most "
            f"{MAX_HEADER_BYTES}: stack small tensors into larger ones"
        )
    return len(text).to_bytes(8, "little") + text


def _stored_shape(spec: TensorSpec) -> list[int]:
    """The shape in the file; a dtype that safetensors lacks gets its bytes as a last dimension."""
    return [*spec.shape] if safetensors_code(spec.dtype) else [*spec.shape, itemsize(spec.dtype)]


def _stored_offsets(spec: TensorSpec) -> list[int]:
    return [*spec.offsets] if safetensors_code(spec.dtype) else [*spec.offsets, 0]
