"""What a rank's plan of DCP asks for: read, checked, and handed to the planner.

Where a wanted box lies in a row in a contiguous tensor on the host it is read straight into place, otherwise some rows at
a time beside it. `commit_tensor` is called once all chunks of a tensor have the digests that they were saved with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlanner
from torch.distributed.checkpoint.planner import LoadPlan as TorchPlan
from torch.distributed.checkpoint.planner import ReadItem as TorchItem

from dtruntime_torch.checkpoint.dcp.contents import Contents, Stored
from dtruntime_torch.checkpoint.dcp.payloads import as_torch_file, decode_payload, raw_payload
from dtruntime_torch.checkpoint.dtypes import itemsize
from dtruntime_torch.checkpoint.loading.chunk_needs import needs_of, runs_of
from dtruntime_torch.checkpoint.loading.home_reader import read_home
from dtruntime_torch.checkpoint.loading.landings import find_landings
from dtruntime_torch.checkpoint.loading.share_reader import check_headers, check_sizes, explain
from dtruntime_torch.checkpoint.specs import Extent, LoadPlan, ReadItem, TensorSpec
from dtruntime_torch.checkpoint.state.local_shard import dtype_name
from dtruntime_torch.errors import CorruptCheckpoint, Damage, InvalidArgument

# What is asked of the planner at a time: one may make new tensors for what it is asked.
BATCH_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class _Box:
    """What a planner wants of one stored shard, and the tensor that it goes to."""

    item: TorchItem
    stored: Stored
    target: torch.Tensor


async def read_items(contents: Contents, plan: TorchPlan, planner: LoadPlanner) -> None:
    """Fills what a plan names.

    Args:
        contents: of the checkpoint.
        plan: of this rank.
        planner: who made it.

    Raises:
        CorruptCheckpoint: with all damage that was met. What was filled so far stays filled.
        InvalidArgument: the plan does not fit the checkpoint.
    """
    tensors = []
    for item in plan.items:
        if item.type == LoadItemType.BYTE_IO:
            await _read_bytes(contents, item, planner)
        else:
            tensors.append((item, _stored_of(contents, item)))
    for some in _together(contents, tensors):
        boxes = [_Box(item, stored, _target_of(item, planner)) for item, stored in some]
        await _read_boxes(contents, boxes)
        for box in boxes:
            planner.commit_tensor(box.item, box.target)


async def _read_bytes(contents: Contents, item: TorchItem, planner: LoadPlanner) -> None:
    fqn = item.storage_index.fqn
    if fqn in contents.saved.objects:
        planner.load_bytes(item, decode_payload(contents.saved.objects[fqn].value, fqn))
        return
    stored = contents.find(fqn, (0,))
    if stored is None or not contents.entry(stored).is_bytes:
        raise InvalidArgument(f"{contents.where} holds no bytes that are called {fqn}")
    entry = contents.entry(stored)
    wanted = _wanted("", stored, contents, (0,), entry.shape)
    await _check_files(contents, [wanted])
    held = torch.empty(entry.shape, dtype=torch.uint8)  # as long as a file that is there
    await _read(contents, [wanted], {"": held})
    data = held.numpy().tobytes()
    planner.load_bytes(item, raw_payload(data, fqn, planner) if contents.raw_bytes else as_torch_file(data))


async def _read_boxes(contents: Contents, boxes: Sequence[_Box]) -> None:
    items, targets = [], {}
    for number, box in enumerate(boxes):
        key, target = str(number), box.target.detach()
        if target.numel():
            items.append(_wanted(key, box.stored, contents, box.item.storage_offsets, target.shape))
            targets[key] = target
    await _check_files(contents, items)
    await _read(contents, items, targets)


async def _read(contents: Contents, items: Sequence[ReadItem], targets: dict[str, torch.Tensor]) -> None:
    """Reads boxes to their targets, each under the name of what is wanted."""
    scalars = {}
    for item in items:
        key, dtype = item.wanted.fqn, contents.entry((item.rank, item.entry)).dtype
        if not item.shape and not _is_home(targets[key], dtype):
            scalars[key], targets[key] = targets[key], torch.empty((), dtype=getattr(torch, dtype))
    straight = {item.wanted.fqn for item in items if _is_home(targets[item.wanted.fqn], item.wanted.dtype)}
    landings = find_landings(LoadPlan(tuple(items)), straight, contents.parts)
    landings.scattered |= {item.wanted.fqn: [item] for item in items if item.wanted.fqn not in straight}
    damage = await read_home(
        contents.backend, contents.reader, contents.name, contents.parts, landings, targets
    )
    _refuse(contents, damage)
    for key, target in scalars.items():
        target.copy_(targets[key])


def _is_home(target: torch.Tensor, dtype: str) -> bool:
    """Whether the stored bytes are the target's own."""
    plain = target.device.type == "cpu" and target.is_contiguous() and dtype_name(target) == dtype
    return plain and not target.is_conj() and not target.is_neg()


async def _check_files(contents: Contents, items: Sequence[ReadItem]) -> None:
    """Checks length and header of the files that are to be read, each once, before memory is taken for what they hold."""
    runs = runs_of(contents.parts, needs_of(LoadPlan(tuple(items)), contents.parts))
    new = [run for run in runs if run.path not in contents.sound]
    if new and contents.has_digests:
        backend, name, parts = contents.backend, contents.name, contents.parts
        _refuse(contents, await check_sizes(backend, name, parts, new))
        suspects = await check_headers(backend, name, parts, dict.fromkeys(run.path for run in new))
        _refuse(contents, await explain(backend, name, parts, new, suspects))
        contents.sound.update(run.path for run in new)


def _refuse(contents: Contents, damage: Sequence[Damage]) -> None:
    if damage:
        error = CorruptCheckpoint(f"{contents.where} is damaged: {'; '.join(map(str, damage))}", damage)
        raise contents.told(error)


def _wanted(
    key: str, stored: Stored, contents: Contents, source: Sequence[int], shape: Sequence[int]
) -> ReadItem:
    """A box of a stored shard that goes to a tensor of its shape."""
    entry, zeros, sizes = contents.entry(stored), (0,) * len(shape), tuple(shape)
    for start, size, held in zip(source, sizes, entry.shape, strict=True):
        if start < 0 or start + size > held:
            raise InvalidArgument(
                f"{entry.fqn}: the planner wants [{start}, {start + size}) of a shard of {held} in {contents.where}"
            )
    spec = TensorSpec(key, (), 0, entry.dtype, sizes, zeros, sizes)
    return ReadItem(stored[0], stored[1], spec, tuple(source), zeros, sizes)


def _stored_of(contents: Contents, item: TorchItem) -> Stored:
    index = item.storage_index
    stored = contents.find(index.fqn, index.offset or ())
    if stored is None or contents.entry(stored).is_bytes:
        raise InvalidArgument(
            f"{contents.where} holds no shard of {index.fqn} that starts at {list(index.offset or ())}"
        )
    return stored


def _target_of(item: TorchItem, planner: LoadPlanner) -> torch.Tensor:
    target = planner.resolve_tensor(item)
    if target.size() != item.lengths:
        raise InvalidArgument(
            f"{item.dest_index.fqn}: the planner asks for a box of {list(item.lengths)} and gives a tensor of "
            f"{list(target.shape)}"
        )
    return target


def _together(
    contents: Contents, tensors: Sequence[tuple[TorchItem, Stored]]
) -> Iterator[list[tuple[TorchItem, Stored]]]:
    """In the order of the files, about so many bytes at a time."""

    def place(pair: tuple[TorchItem, Stored]) -> tuple[int, int, int]:
        first = next(iter(contents.entry(pair[1]).extents), Extent(0, 0, 0))
        return pair[1][0], first.file, first.offset

    some: list[tuple[TorchItem, Stored]] = []
    nbytes = 0
    for item, stored in sorted(tensors, key=place):
        some.append((item, stored))
        nbytes += item.lengths.numel() * itemsize(contents.entry(stored).dtype)
        if nbytes >= BATCH_BYTES:
            yield some
            some, nbytes = [], 0
    if some:
        yield some
