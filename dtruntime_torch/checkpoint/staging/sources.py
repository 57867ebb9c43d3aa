"""The sources of a staging, checked before anything is touched, and sorted by their way into the arena."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

from dtruntime_torch.checkpoint.specs import digest_length
from dtruntime_torch.checkpoint.staging.device import Device, in_one_piece
from dtruntime_torch.errors import InvalidArgument

Pair = tuple[torch.Tensor, int]
FindDevice = Callable[[torch.Tensor], Device | None]


@dataclass(frozen=True, slots=True)
class PairNames:
    """Names pairs in a message, the first few.

    Args:
        names: of all pairs, in their order; if there are none they are numbered.

    Example:
        >>> PairNames()({3}), PairNames()(range(2, 9))
        ('pair 3', 'pairs 2, 3, 4 and 4 more')
        >>> PairNames(["weight", "bias"])([1])
        'bias'
    """

    names: Sequence[str] = ()

    def __call__(self, numbers: Collection[int]) -> str:
        first = sorted(numbers)[:3]
        if self.names:
            named = ", ".join(self.names[number] for number in first)
        else:
            named = f"pair{'s' * (len(numbers) > 1)} {', '.join(map(str, first))}"
        return f"{named} and {len(numbers) - 3} more" if len(numbers) > 3 else named


@dataclass(frozen=True, slots=True)
class Sources:
    """The pairs of one staging, by number.

    Attributes:
        tensors: their sources.
        offsets: their first bytes in the arena.
        lengths: their bytes.
        native: those that lie in host memory in one piece, or are empty.
        by_torch: those that torch copies at once: strided, conjugated, or on a device without a `Device`.
        on_device: device -> those on it.
        name: names pairs in a message.
    """

    tensors: Sequence[torch.Tensor]
    offsets: Sequence[int]
    lengths: Sequence[int]
    native: Sequence[int]
    by_torch: Sequence[int]
    on_device: Mapping[Device, Sequence[int]]
    name: PairNames

    def placed(self, numbers: Iterable[int]) -> dict[int, tuple[torch.Tensor, int]]:
        """Number -> source and its offset in the arena, of some pairs."""
        return {number: (self.tensors[number], self.offsets[number]) for number in numbers}

    def in_order(self, parts: Iterable[tuple[Sequence[int], bytes]], chunk_bytes: int) -> bytes:
        """The digests of all pairs in the order of the pairs, from those of some pairs each."""
        digests = [b""] * len(self.lengths)
        for numbers, joined in parts:
            start = 0
            for number in numbers:
                stop = start + digest_length(self.lengths[number], chunk_bytes)
                digests[number] = joined[start:stop]
                start = stop
        return b"".join(digests)

    def of_some(self, numbers: Sequence[int], digests: bytes, chunk_bytes: int) -> bytes:
        """The digests of some pairs, in the order of `numbers`, from those of all pairs."""
        starts = [0, *accumulate(digest_length(length, chunk_bytes) for length in self.lengths)]
        return b"".join(digests[starts[number] : starts[number + 1]] for number in numbers)


def sort_sources(
    pairs: Sequence[Pair], arena_nbytes: int, find_device: FindDevice, names: Sequence[str] = ()
) -> Sources:
    """Checks and sorts pairs; nothing is read or written.

    Args:
        pairs: source and arena offset of each.
        arena_nbytes: bytes of the arena.
        find_device: gives the device from which a tensor is copied asynchronously, or None.
        names: as many, or none.

    Raises:
        InvalidArgument: a source has no bytes to copy (sparse, meta), its place is not inside the arena or shared
            with another, or it is strided and its place not aligned to its elements; it names the pair.

    Example:
        >>> square = torch.zeros(2, 2)
        >>> sources = sort_sources([(square, 0), (square.T, 16)], 32, lambda tensor: None)
        >>> sources.native, sources.by_torch
        ([0], [1])
    """
    lengths: list[int] = []
    native: list[int] = []
    by_torch: list[int] = []
    on_device: dict[Device, list[int]] = {}
    end, in_a_row = 0, True
    for number, (tensor, offset) in enumerate(pairs):
        on_host = tensor.is_cpu
        if tensor.layout is not torch.strided or not (on_host or not tensor.is_meta):
            raise InvalidArgument(
                f"{_describe(number, tensor, offset)}: it has no bytes that could be copied"
            )
        nbytes = tensor.nbytes
        if not 0 <= offset <= arena_nbytes - nbytes:
            raise InvalidArgument(f"{_describe(number, tensor, offset)}: the arena has {arena_nbytes} bytes")
        lengths.append(nbytes)
        if nbytes:
            in_a_row = in_a_row and end <= offset
            end = offset + nbytes
        device = find_device(tensor)
        if nbytes == 0 or (device is None and on_host and in_one_piece(tensor)):
            native.append(number)
        elif device is not None:
            on_device.setdefault(device, []).append(number)
        elif offset % tensor.itemsize:
            raise InvalidArgument(
                f"{_describe(number, tensor, offset)}: the offset of a tensor that is not contiguous must be a "
                f"multiple of its {tensor.itemsize} bytes an element"
            )
        else:
            by_torch.append(number)
    tensors, offsets = [tensor for tensor, _ in pairs], [offset for _, offset in pairs]
    sources = Sources(tensors, offsets, lengths, native, by_torch, on_device, PairNames(names))
    if not in_a_row:
        _check_disjoint(sources)
    return sources


def check_numbers(numbers: Iterable[int], count: int) -> list[int]:
    """The numbers, if each is one of `count` pairs.

    Raises:
        InvalidArgument: one is not.

    Example:
        >>> check_numbers(iter([1, 0]), 2)
        [1, 0]
    """
    asked = list(numbers)
    wrong = [number for number in asked if not 0 <= number < count]
    if wrong:
        raise InvalidArgument(f"there is no pair {wrong[0]}; they are numbered 0 to {count - 1}")
    return asked


def _check_disjoint(sources: Sources) -> None:
    filled = [number for number, nbytes in enumerate(sources.lengths) if nbytes]
    filled.sort(key=sources.offsets.__getitem__)
    for one, other in pairwise(filled):
        if sources.offsets[one] + sources.lengths[one] > sources.offsets[other]:
            place = _describe(one, sources.tensors[one], sources.offsets[one])
            raise InvalidArgument(
                f"{place} overlaps {_describe(other, sources.tensors[other], sources.offsets[other])}: give each "
                f"its own bytes"
            )


def _describe(number: int, tensor: torch.Tensor, offset: int) -> str:
    kind = f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
    return f"pair {number} ({kind} on {tensor.device}, to bytes from {offset} on)"
