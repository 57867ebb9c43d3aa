"""What keeps a staging whole: digests at the call, events for early and late copies, and what happens without them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import torch

from dtruntime_torch import _C
from dtruntime_torch.checkpoint.saving.failures import tear_in
from dtruntime_torch.checkpoint.staging.device import Device, as_bytes
from dtruntime_torch.checkpoint.staging.stager import Stager, Staging
from dtruntime_torch.errors import SaveFailed
from dtruntime_torch.gpucheck.comparison import in_turns, medians
from dtruntime_torch.gpucheck.device import Bench, on_host, random_bytes
from dtruntime_torch.gpucheck.findings import Check, same_digests
from dtruntime_torch.gpucheck.sizes import Sizes
from dtruntime_torch.gpucheck.staging import TIMEOUT, as_they_were, differences

CHUNK_BYTES = 1 << 16
TENSORS = 8
EARLY_SHARE = 16  # one byte in as many is not late
HARDLY = 0.5  # of the time of all copies: who waits for the early ones alone has surely gone on by then


def check_tears(bench: Bench, sizes: Sizes) -> Iterator[Check]:
    """Looks at what a full staging knows of its sources, and in which order it holds who overwrites them."""
    yield digests_of_the_device(bench, sizes.staging_bytes)
    tensors = Tensors(bench, sizes.staging_bytes)
    for number in (0, TENSORS // 2):
        yield behind_the_guard(bench, tensors, number)
    yield early_before_late(bench, sizes)
    yield early_not_held_by_late(bench, sizes)
    yield while_a_graph_is_captured(bench, sizes.staging_bytes)


class Tensors:
    """Tensors on the device, the last of them not in one piece, and an arena for them.

    Args:
        bench: where.
        nbytes: of all of them, about.
    """

    def __init__(self, bench: Bench, nbytes: int) -> None:
        side = nbytes // TENSORS // 64
        self.all = [random_bytes(bench, 64 * side, seed=50 + number) for number in range(TENSORS)]
        self.all[-1] = self.all[-1].view(64, side).T
        self.offsets = [64 * side * number for number in range(TENSORS)]
        self.names = [f"tensor {number}" for number in range(TENSORS)]
        self.arena = bench.arena(64 * side * TENSORS)

    def start(self, stager: Stager, late: Sequence[int] = ()) -> Staging:
        """Starts a full staging of all."""
        return stager.start(list(zip(self.all, self.offsets, strict=True)), names=self.names, late=late)

    def differences(self, staging: Staging, expected: Sequence[torch.Tensor]) -> Iterator[str]:
        """What is wrong with a staging, which is waited for here."""
        try:
            digests = staging.wait(TIMEOUT)
        except SaveFailed as failure:
            yield str(failure)
            return
        yield from differences(self.arena, self.offsets, expected, digests, CHUNK_BYTES)


def digests_of_the_device(bench: Bench, nbytes: int) -> Check:
    """A staging returns the digests that the op takes on the device, before and behind the same work."""
    tensors = Tensors(bench, nbytes)
    stager = bench.stager(tensors.arena, CHUNK_BYTES)
    found = [bench.digest(as_bytes(tensor), CHUNK_BYTES) for tensor in tensors.all]
    staging = tensors.start(stager)
    staging.before_overwrite(timeout=TIMEOUT)
    for tensor in tensors.all:
        tensor.fill_(0xEE)
    return same_digests("tear/digests of the device", torch.cat(found), staging.wait(TIMEOUT))


class Meddling:
    """A device on which something happens after the digests, and before the first copy.

    Args:
        device: what it is else.
        meddle: enqueues what happens, on the side stream.
    """

    def __init__(self, device: Device, meddle: Callable[[], object]) -> None:
        self._device = device
        self._meddle = meddle

    def __getattr__(self, name: str) -> object:
        return getattr(self._device, name)

    def follow_current(self) -> None:
        self._device.follow_current()
        with self._device.on_side():
            self._meddle()


def behind_the_guard(bench: Bench, tensors: Tensors, number: int) -> Check:
    """A source that another stream overwrites before it is copied fails the staging, which names that one."""
    victim, name = tensors.all[number], tensors.names[number]
    device = cast(Device, Meddling(bench.staging_device(), lambda: victim[-1:].add_(1)))
    stager = Stager(tensors.arena, CHUNK_BYTES, find_device=lambda tensor: device)
    try:
        tensors.start(stager).wait(TIMEOUT)
        tear, said = None, "nothing was noticed"
    except SaveFailed as failure:
        tear, said = tear_in(failure), str(failure)
    named = tear is not None and str(tear).startswith(f"{name} did not arrive from {bench.torch_device} ")
    return Check(f"tear/{name} overwritten behind the guard", named, said)


def early_before_late(bench: Bench, sizes: Sizes) -> Check:
    """Those that are not late are overwritten as soon as that is allowed, then the others; both arrive as they were."""
    tensors = Tensors(bench, sizes.staging_bytes)
    stager = bench.stager(tensors.arena, CHUNK_BYTES)
    late, torn = range(1, TENSORS, 2), []
    early = [number for number in range(TENSORS) if number not in late]
    for number in range(sizes.staging_rounds):
        for tensor in tensors.all:
            tensor.add_(number % 251 + 1)
        expected = [tensor.clone() for tensor in tensors.all]
        staging = tensors.start(stager, late)
        for some in (early, late):
            staging.before_overwrite(some, timeout=TIMEOUT)
            for index in some:
                tensors.all[index].fill_(0xEE)
        torn += [f"round {number}: {what}" for what in tensors.differences(staging, expected)]
    return as_they_were(f"tear/{sizes.staging_rounds} rounds of early and late ones", TENSORS, torn)


def early_not_held_by_late(bench: Bench, sizes: Sizes) -> Check:
    """By the time for which the stream is held that overwrites the early ones, or all."""
    data = random_bytes(bench, sizes.copied_bytes, seed=60)
    border = data.numel() // EARLY_SHARE
    pairs = [(data[border:].clone(), border), (data[:border].clone(), 0)]
    stager = bench.stager(bench.arena(data.numel()), CHUNK_BYTES)

    def held(numbers: Sequence[int]) -> float:
        bench.synchronize()
        before = bench.record()
        staging = stager.start(pairs, late=[0])
        staging.before_overwrite(numbers, timeout=TIMEOUT)
        seconds = bench.seconds_between(before, bench.record())
        staging.wait(TIMEOUT)
        return seconds

    seconds = medians(in_turns({"early": [1], "all": [0, 1]}, held, sizes.repetitions))
    return Check(
        "tear/early ones are not held by late ones",
        seconds["early"] <= HARDLY * seconds["all"],
        f"held {1e3 * seconds['early']:.3f} ms for the early ones, {1e3 * seconds['all']:.3f} ms for all",
    )


def while_a_graph_is_captured(bench: Bench, nbytes: int) -> Check:
    """A staging is asked there, by this thread and by another, and the graph comes out whole."""
    tensors = Tensors(bench, nbytes)
    data = tensors.all[0]
    # What CUDA loads at a first call cannot be loaded while a graph is captured.
    bench.digest(data, CHUNK_BYTES)
    staging = tensors.start(bench.stager(tensors.arena, CHUNK_BYTES))

    def work() -> torch.Tensor:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(staging.done).result(TIMEOUT)
        staging.before_overwrite(timeout=TIMEOUT)
        return bench.digest(data, CHUNK_BYTES)

    replay, digests = bench.capture(work)
    staging.wait(TIMEOUT)
    data.bitwise_not_()
    replay()
    expected = _C.digest(on_host(data), CHUNK_BYTES)
    return same_digests("tear/asked while a graph is captured", digests, expected)
