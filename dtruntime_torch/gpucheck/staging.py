"""A staging holds the state as it was at the call, though each tensor is overwritten as soon as it may be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from dtruntime_torch import _C
from dtruntime_torch.gpucheck.device import Device, random_bytes
from dtruntime_torch.gpucheck.findings import Check
from dtruntime_torch.gpucheck.sizes import Sizes

CHUNK_BYTES = 1 << 20
SMALL = (1, 3, 16, 257, 4099)
TIMEOUT = 60.0  # seconds, of a wait that should take milliseconds


def check_staging(device: Device, sizes: Sizes) -> Iterator[Check]:
    """Stages the same tensors again and again while they are overwritten, each by itself or all at once."""
    tensors = _tensors(device, sizes.staging_bytes)
    patterns = [tensor.clone() for tensor in tensors]
    offsets = _places([tensor.numel() for tensor in tensors])
    arena = device.arena(offsets[-1] + tensors[-1].numel())
    stager = device.stager(arena, CHUNK_BYTES)
    torn = []
    for number in range(sizes.staging_rounds):
        for tensor, pattern in zip(tensors, patterns, strict=True):
            torch.add(pattern, number % 251 + 1, out=tensor)
        # A copy in stream order: it says what the state was at the call, and does not wait for anything.
        expected = [tensor.clone() for tensor in tensors]
        staging = stager.start(list(zip(tensors, offsets, strict=True)))
        if number % 2:
            staging.before_overwrite(timeout=TIMEOUT)
        for index, tensor in enumerate(tensors):
            if not number % 2:
                staging.before_overwrite([index], timeout=TIMEOUT)
            tensor.fill_(0xEE)
        digests = staging.wait(TIMEOUT)
        torn += [f"round {number}: {what}" for what in _differences(arena, offsets, expected, digests)]
    yield Check(
        f"staging/{sizes.staging_rounds} rounds while overwritten",
        not torn,
        f"{len(torn)} tensors are not as they were, first {torn[0]}" if torn else f"{len(tensors)} tensors",
    )


def _tensors(device: Device, nbytes: int) -> list[torch.Tensor]:
    """Small ones and three large ones, which start at odd addresses."""
    large = nbytes // 4
    memory = random_bytes(device, 3 * (large + 64), seed=10)
    views = [memory[number * (large + 64) + number :][: large + number] for number in range(3)]
    return [*views, *(random_bytes(device, size, seed=11) for size in SMALL)]


def _places(lengths: Sequence[int]) -> list[int]:
    """One after another, the first not at the start of a page."""
    places = [128]
    for length in lengths[:-1]:
        places.append(places[-1] + length)
    return places


def _differences(
    arena: _C.Arena, offsets: Sequence[int], expected: Sequence[torch.Tensor], digests: bytes
) -> Iterator[str]:
    image, at = torch.frombuffer(arena, dtype=torch.uint8), 0
    for index, (offset, tensor) in enumerate(zip(offsets, expected, strict=True)):
        host = tensor.cpu()
        of_host = _C.digest(host.numpy().data, CHUNK_BYTES)
        if not torch.equal(image[offset : offset + host.numel()], host):
            yield f"the bytes of tensor {index}"
        if digests[at : at + len(of_host)] != of_host:
            yield f"the digests of tensor {index}"
        at += len(of_host)
    if at != len(digests):
        yield f"{len(digests)} bytes of digests instead of {at}"
