"""Folders that others wrote: safetensors files of stock `HuggingFaceStorageWriter`, or of a model as Hugging Face has it.

There are no digests in them: what is checked is that each header fits its file, before anything else is read of it.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Sequence

from dtruntime_torch.checkpoint.dcp.contents import Contents
from dtruntime_torch.checkpoint.dcp.folder import Folder, FolderView
from dtruntime_torch.checkpoint.dcp.foreign_header import ForeignTensor, read_header
from dtruntime_torch.checkpoint.loading.load_plan import index_parts
from dtruntime_torch.checkpoint.manifest import FileRef, Part, TensorEntry
from dtruntime_torch.checkpoint.names import DATA_SUFFIX
from dtruntime_torch.checkpoint.specs import Extent, Shape, digest_length
from dtruntime_torch.errors import CorruptCheckpoint, Damage, LoadFailed, NotFound, StorageError

_NAME = "foreign"  # in the records; nothing on storage is called so
_INDEX = "model.safetensors.index.json"
_MOST_INDEX_BYTES = 100_000_000
_CHUNK_BYTES = 1 << 20


async def open_foreign(folder: Folder) -> Contents | None:
    """Reads the headers of all safetensors files of a folder; of those that an index names, if there is one.

    Args:
        folder: where they lie.

    Returns:
        What they hold; None if there are none.

    Raises:
        CorruptCheckpoint: a header does not fit its file, a file is missing that the index names, or a part of a tensor is
            in none.
        UnsupportedType: a tensor has a dtype that is unknown here.
    """
    listed = await folder.backend.list(folder.path, "/")
    names = [entry.path[len(folder.path) :] for entry in listed]
    files = sorted(name for name in names if name.endswith(DATA_SUFFIX))
    if _INDEX in names:
        files = await _indexed(folder, files)
    if not files:
        return None
    headers = await asyncio.gather(*(read_header(folder.backend, folder.path + name) for name in files))
    whole = _whole_shapes(folder, [tensor for _, _, tensors in headers for tensor in tensors])
    parts = {}
    for number, (name, (size, begin, tensors)) in enumerate(zip(files, headers, strict=True)):
        entries = tuple(_entry(tensor, n, whole[tensor.name]) for n, tensor in enumerate(tensors))
        file = FileRef(name, size, begin, b"")
        parts[number] = Part(number, len(files), 0, 0, "", _CHUNK_BYTES, (file,), entries, (), ())
    view = FolderView(folder, f"{_NAME}/", "")
    return Contents(
        view,
        _Unchecked(view),
        _NAME,
        str(folder),
        parts,
        index_parts(parts, 0),
        None,
        view.told,
        raw_bytes=True,
        has_digests=False,
    )


def _whole_shapes(folder: Folder, tensors: Sequence[ForeignTensor]) -> dict[str, Shape]:
    """The shape of each tensor, of which the shards tell only where they lie in it."""
    whole: dict[str, Shape] = {}
    boxes: dict[str, set[tuple[Shape, Shape]]] = {}
    for tensor in tensors:
        ends = tuple(at + size for at, size in zip(tensor.offsets, tensor.shape, strict=True))
        known = whole.get(tensor.name, ends)
        if len(known) != len(ends):
            raise CorruptCheckpoint(f"{folder}: the shards of {tensor.name} have different dimensions")
        whole[tensor.name] = tuple(map(max, known, ends))
        boxes.setdefault(tensor.name, set()).add((tensor.offsets, tensor.shape))
    for name, shape in whole.items():
        gap = math.prod(shape) - sum(math.prod(held) for _, held in boxes[name])
        if gap > 0:
            # A planner would leave there what the state held before, and say nothing.
            raise CorruptCheckpoint(
                f"{folder}: {name}: of its {list(shape)} elements {gap} are in no file; a file of a rank is missing, or "
                f"who wrote them had several shards of one tensor for one file"
            )
    return whole


class _Unchecked:
    """Reads what has no digests; those that are returned say so, as the records of such files do."""

    def __init__(self, view: FolderView) -> None:
        self._view = view

    async def read_chunks(
        self, path: str, offsets: Sequence[int], into: Sequence[memoryview], chunk_bytes: int
    ) -> bytes:
        try:
            for offset, target in zip(offsets, into, strict=True):
                await self._view.read_range(path, offset, target.nbytes, into=target)
        except NotFound as error:
            raise _missing(path.removeprefix(f"{_NAME}/")) from error
        except StorageError as error:
            # Who reads what has digests would go over it again to say what is wrong with it.
            raise LoadFailed(f"could not read the checkpoint: {error}") from error
        return bytes(sum(digest_length(target.nbytes, chunk_bytes) for target in into))


def _entry(tensor: ForeignTensor, index: int, whole: tuple[int, ...]) -> TensorEntry:
    return TensorEntry(
        fqn=tensor.name,
        path=(),
        index=index,
        name=tensor.name,
        dtype=tensor.dtype,
        global_shape=whole,
        offsets=tensor.offsets,
        shape=tensor.shape,
        per_rank=False,
        alias=None,
        is_bytes=False,
        extents=(Extent(0, tensor.begin, tensor.nbytes),) if tensor.nbytes else (),
        digests=bytes(digest_length(tensor.nbytes, _CHUNK_BYTES)),
    )


async def _indexed(folder: Folder, there: Sequence[str]) -> list[str]:
    """The files that the index names."""
    path = folder.path + _INDEX
    size = await folder.backend.size(path)
    if size > _MOST_INDEX_BYTES:
        raise CorruptCheckpoint(f"{path} has {size} bytes, which no index has")
    try:
        index = json.loads(bytes(await folder.backend.read(path)))
        named = sorted({*index["weight_map"].values()})
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise CorruptCheckpoint(f"{path} is no index of safetensors files: {error}") from error
    for name in named:
        if name not in there:
            raise _missing(f"{folder.path}{name}")
    return named


def _missing(path: str) -> CorruptCheckpoint:
    damage = Damage(path, None, 0, 0, "a file", "missing")
    return CorruptCheckpoint(f"damaged: {damage}", [damage])
