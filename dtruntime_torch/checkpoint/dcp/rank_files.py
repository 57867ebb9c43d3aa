"""The files of one rank, written straight from where its tensors lie."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial

import torch

from dtruntime_torch import _C
from dtruntime_torch.checkpoint.dcp.names_in_folder import NAME
from dtruntime_torch.checkpoint.dcp.write_items import ShardFile
from dtruntime_torch.checkpoint.names import DATA_SUFFIX, Attempt, attempt_path, shard_file_name
from dtruntime_torch.checkpoint.saving.layout import ALIGNMENT, PAGE, make_layout
from dtruntime_torch.checkpoint.saving.shard_file import Shard, describe_part, write_part
from dtruntime_torch.storage import StorageBackend
from dtruntime_torch.storage.sync import in_thread

_PAGES_FROM = 1 << 20
"""Bytes from which on a header may be up to a page longer, so that the data lies in its pages as it does in memory."""


async def write_file(
    backend: StorageBackend, attempt: Attempt, file: ShardFile, number: int, total: int, chunk_bytes: int
) -> Shard:
    """Writes a data file and its part manifest; both are durable when it returns.

    The tensors are digested while they are written: each byte is read twice and copied never, but for what the
    operating system needs.

    Args:
        backend: where to.
        attempt: in whose folder.
        file: what to write; its tensors may not change meanwhile.
        number: which of the parts this is.
        total: how many there are.
        chunk_bytes: bytes of a chunk.

    Raises:
        InvalidArgument: no reader would take it.
        StorageError: it could not be written.
    """
    plan = file.plan(number, total)
    layout = make_layout(plan, _place_in_page(file))
    tensors = [file.tensors[slot.item.spec.fqn][1] for slot in layout.slots]
    path = f"{attempt_path(NAME, attempt)}/{shard_file_name(number, total, DATA_SUFFIX)}"
    digests, _ = await asyncio.gather(
        in_thread(partial(_digests, tensors, chunk_bytes)),
        backend.write(path, [layout.header, *_in_rows(tensors)]),
    )
    part = describe_part(attempt, plan, layout, digests, chunk_bytes, file.values)
    return await write_part(backend, NAME, attempt, part)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the host."""
    flat: memoryview = tensor.reshape(-1).view(torch.uint8).numpy().data
    return flat


def _digests(tensors: Sequence[torch.Tensor], chunk_bytes: int) -> bytes:
    # One thread keeps up with any storage, and leaves the others to who is training meanwhile.
    return b"".join(
        _C.digest(bytes_of(tensor), chunk_bytes, threads=1) for tensor in tensors if tensor.numel()
    )


def _place_in_page(file: ShardFile) -> int | None:
    """Where in its page of memory the data lies, if the file may have it in the same place.

    What lies in one row in memory as it does in the file, as staged tensors do, is then written without a copy.
    """
    tensors = [tensor for _, tensor in file.tensors.values() if tensor.numel()]
    if sum(spec.nbytes for spec, _ in file.tensors.values()) < _PAGES_FROM:
        return None
    at = max(tensors, key=torch.Tensor.element_size).data_ptr() % PAGE
    return at if at % ALIGNMENT == 0 else None


def _in_rows(tensors: Sequence[torch.Tensor]) -> list[memoryview]:
    """The memory of tensors, in one piece where they lie behind each other in one storage."""
    rows: list[tuple[torch.Tensor, int, int]] = []  # a tensor on the storage, first byte, bytes
    for tensor in tensors:
        if not tensor.numel():
            continue
        start, nbytes = tensor.data_ptr(), tensor.numel() * tensor.element_size()
        if rows:
            first, begin, length = rows[-1]
            same = first.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
            if same and begin + length == start:
                rows[-1] = first, begin, length + nbytes
                continue
        rows.append((tensor, start, nbytes))
    return [_memory(first, begin, length) for first, begin, length in rows]


def _memory(tensor: torch.Tensor, begin: int, length: int) -> memoryview:
    if length == tensor.numel() * tensor.element_size():
        return bytes_of(tensor)
    storage = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    return bytes_of(storage)[begin - storage.data_ptr() :][:length]
