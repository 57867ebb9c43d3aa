"""A staging holds the state as it was at the call, though each tensor is overwritten as soon as it may be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch

from dtruntime_torch import _C
from dtruntime_torch.checkpoint.staging.device import as_bytes
from dtruntime_torch.gpucheck.device import Bench, random_bytes
from dtruntime_torch.gpucheck.findings import Check
from dtruntime_torch.gpucheck.loop import Loop
from dtruntime_torch.gpucheck.sizes import Sizes

CHUNK_BYTES = 1 << 20
SMALL = (1, 3, 16, 257, 4099)
TIMEOUT = 60.0  # seconds, of a wait that should take milliseconds


def check_staging(bench: Bench, sizes: Sizes) -> Iterator[Check]:
    """Stages while tensors are overwritten, by the check itself and by training."""
    yield while_overwritten(bench, sizes)
    yield while_training(bench, sizes)


def while_overwritten(bench: Bench, sizes: Sizes) -> Check:
    """The same tensors again and again, each overwritten by itself or all at once."""
    tensors = _tensors(bench, sizes.staging_bytes)
    patterns = [tensor.clone() for tensor in tensors]
    offsets = _places([tensor.nbytes for tensor in tensors])
    arena = bench.arena(offsets[-1] + tensors[-1].nbytes)
    stager = bench.stager(arena, CHUNK_BYTES)
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
        torn += [f"round {number}: {what}" for what in differences(arena, offsets, expected, digests)]
    return as_they_were(f"staging/{sizes.staging_rounds} rounds while overwritten", len(tensors), torn)


def while_training(bench: Bench, sizes: Sizes) -> Check:
    """The state of a training loop, which goes on: its optimizer asks before each step."""
    loop = Loop(bench, sizes)
    tensors = loop.tensors()
    offsets = _places([tensor.nbytes for tensor in tensors])
    arena = bench.arena(offsets[-1] + tensors[-1].nbytes)
    stager = bench.stager(arena, CHUNK_BYTES)
    torn = []
    for number in range(sizes.training_rounds):
        # It is still under way on the device when the staging starts.
        loop.step()
        expected = [tensor.clone() for tensor in tensors]
        staging = stager.start(list(zip(tensors, offsets, strict=True)))
        door = loop.before_overwrite(partial(staging.before_overwrite, timeout=TIMEOUT))
        for _ in range(sizes.steps):
            loop.step()
        door.remove()
        digests = staging.wait(TIMEOUT)
        torn += [f"round {number}: {what}" for what in differences(arena, offsets, expected, digests)]
        alone = sum(torch.equal(*both) for both in zip(tensors, expected, strict=True))
        if 2 * alone > len(tensors):
            torn.append(f"round {number}: nothing, but training left {alone} alone, so this shows little")
    return as_they_were(f"staging/{sizes.training_rounds} rounds of training", len(tensors), torn)


def _tensors(bench: Bench, nbytes: int) -> list[torch.Tensor]:
    """Small ones and three large ones, which start at odd addresses."""
    large = nbytes // 4
    memory = random_bytes(bench, 3 * (large + 64), seed=10)
    views = [memory[number * (large + 64) + number :][: large + number] for number in range(3)]
    return [*views, *(random_bytes(bench, size, seed=11) for size in SMALL)]


def _places(lengths: Sequence[int]) -> list[int]:
    """One after another, the first not at the start of a page."""
    places = [128]
    for length in lengths[:-1]:
        places.append(places[-1] + length)
    return places


def as_they_were(name: str, count: int, torn: Sequence[str]) -> Check:
    """What was found of tensors that were staged.

    Args:
        name: of the check.
        count: how many there are.
        torn: what is wrong.
    """
    found = f"{len(torn)} tensors are not as they were, first {torn[0]}" if torn else f"{count} tensors"
    return Check(name, not torn, found)


def differences(
    arena: _C.Arena,
    offsets: Sequence[int],
    expected: Sequence[torch.Tensor],
    digests: bytes,
    chunk_bytes: int = CHUNK_BYTES,
) -> Iterator[str]:
    """What is wrong with a staging: where its bytes or its digests are not those of the host.

    Args:
        arena: where the tensors went.
        offsets: the first byte of each.
        expected: what they were.
        digests: what the staging returned.
        chunk_bytes: of what.
    """
    image, at = torch.frombuffer(arena, dtype=torch.uint8), 0
    for index, (offset, tensor) in enumerate(zip(offsets, expected, strict=True)):
        host = as_bytes(tensor).cpu()
        of_host = _C.digest(host.numpy().data, chunk_bytes)
        if not torch.equal(image[offset : offset + host.numel()], host):
            yield f"the bytes of tensor {index}"
        if digests[at : at + len(of_host)] != of_host:
            yield f"the digests of tensor {index}"
        at += len(of_host)
    if at != len(digests):
        yield f"{len(digests)} bytes of digests instead of {at}"
