"""Tensors into the arena, with the digest of every chunk.

The arena is the image of the data file, so that a tensor is copied once, from where it lies to where it is
written from. Host tensors that lie in one piece are copied and digested in one native pass; strided ones and
those on a device are copied by torch straight into their slots and digested there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from dtruntime_torch import _C
from dtruntime_torch.checkpoint.layout import Layout, Slot
from dtruntime_torch.checkpoint.specs import digest_length


def stage(arena: _C.Arena, layout: Layout, tensors: Mapping[str, torch.Tensor], chunk_bytes: int) -> bytes:
    """Makes the arena the image of a data file.

    Returns when every byte is in the arena: the tensors may change from then on.

    Args:
        arena: at least `layout.length` bytes; nobody else uses it meanwhile.
        layout: where each tensor goes.
        tensors: fqn -> this rank's shard, on any device, of any stride.
        chunk_bytes: bytes of a chunk.

    Returns:
        The XXH3-128 digests of all chunks, in the order of `layout.slots`, 16 bytes each.
    """
    memoryview(arena)[: len(layout.header)] = layout.header
    in_one_piece = [slot for slot in layout.slots if _lies_in_one_piece(tensors[_fqn(slot)])]
    others = [slot for slot in layout.slots if not _lies_in_one_piece(tensors[_fqn(slot)])]
    digests = {
        **_copy_native(arena, in_one_piece, tensors, chunk_bytes),
        **_copy_by_torch(arena, others, tensors, chunk_bytes),
    }
    return b"".join(digests[slot.item.name] for slot in layout.slots)


def _fqn(slot: Slot) -> str:
    return slot.item.spec.fqn


def _lies_in_one_piece(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.is_contiguous()


def _copy_native(
    arena: _C.Arena, slots: Sequence[Slot], tensors: Mapping[str, torch.Tensor], chunk_bytes: int
) -> dict[str, bytes]:
    digests = _C.copy_digest(
        arena,
        [tensors[_fqn(slot)].data_ptr() for slot in slots],
        [slot.nbytes for slot in slots],
        [slot.offset for slot in slots],
        chunk_bytes,
        torch.get_num_threads(),
    )
    return _by_name(slots, digests, chunk_bytes)


def _copy_by_torch(
    arena: _C.Arena, slots: Sequence[Slot], tensors: Mapping[str, torch.Tensor], chunk_bytes: int
) -> dict[str, bytes]:
    image = torch.frombuffer(arena, dtype=torch.uint8) if slots else torch.empty(0, dtype=torch.uint8)
    for slot in slots:
        if slot.nbytes:
            source = tensors[_fqn(slot)]
            place = image[slot.offset : slot.offset + slot.nbytes].view(source.dtype)
            place.view(source.shape).copy_(source)
    digests = _C.digest_ranges(
        arena,
        [slot.offset for slot in slots],
        [slot.nbytes for slot in slots],
        chunk_bytes,
        torch.get_num_threads(),
    )
    return _by_name(slots, digests, chunk_bytes)


def _by_name(slots: Sequence[Slot], digests: bytes, chunk_bytes: int) -> dict[str, bytes]:
    named, start = {}, 0
    for slot in slots:
        stop = start + digest_length(slot.nbytes, chunk_bytes)
        named[slot.item.name] = digests[start:stop]
        start = stop
    return named
