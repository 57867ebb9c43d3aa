"""Stagings that copy only what changed: that they bring the state, and how fast, beside stagings that copy all."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial

import torch

from dtruntime_torch.checkpoint.staging.stager import Staging
from dtruntime_torch.errors import SaveFailed
from dtruntime_torch.gpucheck.comparison import Comparison, compare, gigabytes_per_second, in_turns
from dtruntime_torch.gpucheck.device import Bench, random_bytes
from dtruntime_torch.gpucheck.findings import Check
from dtruntime_torch.gpucheck.sizes import MIB, Sizes, said
from dtruntime_torch.gpucheck.staging import TIMEOUT, as_they_were, differences
from dtruntime_torch.gpucheck.timing import by_clock

CHANGED = (0.01, 0.1, 0.5)
TENSORS = 16
FEWEST_CHUNKS = 200  # of which one in a hundred can change


def check_deltas(bench: Bench, sizes: Sizes) -> Iterator[Check]:
    """Changes some chunks again and again, as soon as the staging before allows it, and looks at what arrived."""
    state = DeltaState(bench, sizes.staging_bytes)
    rounds, torn = sizes.staging_rounds, []
    state.stage()
    staging, expected, nbytes = state.stager.start(state.pairs, only_changed=True), state.data.clone(), 0
    for number in range(rounds):
        staging.before_overwrite(timeout=TIMEOUT)
        # While it is under way: what changes here is what the next one copies.
        changed = state.change((*CHANGED, 1.0, 0.0)[number % 5], seed=number)
        torn += [f"round {number}: {what}" for what in state.differences(staging, expected, nbytes)]
        expected, nbytes = state.data.clone(), changed
        staging = state.stager.start(state.pairs, only_changed=True)
    torn += [f"the last: {what}" for what in state.differences(staging, expected, nbytes)]
    yield as_they_were(f"delta staging/{rounds} rounds while overwritten", TENSORS, torn)


def measure_deltas(bench: Bench, sizes: Sizes) -> Iterator[Check | Comparison]:
    """How long until the sources may be overwritten, and until all is digested on the host, too."""
    nbytes = sizes.copied_bytes
    state = DeltaState(bench, nbytes)
    ways = {"ours": True, "peer": False}
    state.stage()
    for fraction in CHANGED:
        draw = iter(range(1 << 30))

        def held(only_changed: bool, share: float = fraction, draw: Iterator[int] = draw) -> float:
            state.change(share, seed=next(draw))
            return state.seconds_held(only_changed)

        def whole(only_changed: bool, share: float = fraction, draw: Iterator[int] = draw) -> float:
            state.change(share, seed=next(draw))
            return by_clock(bench, partial(state.stage, only_changed))

        for what, take in (("sources held", held), ("until digested", whole)):
            seconds = in_turns(ways, take, sizes.repetitions)
            yield compare(
                f"delta staging, {what}/{fraction:.0%} of {said(nbytes)} changed",
                seconds["ours"],
                seconds["peer"],
                peer_name="plain copies of all",
                unit="GB/s of state",
                figure=gigabytes_per_second(nbytes),
            )
        changed = state.change(fraction, seed=0)
        staging = state.stager.start(state.pairs, only_changed=True)
        wrong = list(state.differences(staging, state.data, changed))
        yield as_they_were(f"delta staging/bytes with {fraction:.0%} changed", TENSORS, wrong)


class DeltaState:
    """Tensors on the device that lie behind one another, and an arena for them.

    Args:
        bench: where.
        nbytes: of all of them, about.

    Attributes:
        data: the memory of all.
        pairs: what is staged.
        stager: stages it.
    """

    def __init__(self, bench: Bench, nbytes: int) -> None:
        self._bench = bench
        self._chunk_bytes = min(MIB, nbytes // FEWEST_CHUNKS)
        self.data = random_bytes(bench, nbytes, seed=30)
        tensors = self.data.chunk(TENSORS)
        starts = [int(tensor.storage_offset()) for tensor in tensors]
        self.pairs = list(zip(tensors, starts, strict=True))
        self._arena = bench.arena(nbytes)
        self.stager = bench.stager(self._arena, self._chunk_bytes)
        self._chunks = [piece for tensor in tensors for piece in torch.split(tensor, self._chunk_bytes)]

    def change(self, fraction: float, seed: int) -> int:
        """Changes one byte in each of some chunks. Returns the bytes of these chunks."""
        count = round(fraction * len(self._chunks))
        chunks = random.Random(seed).sample(self._chunks, count)
        for chunk in chunks:
            chunk[seed % chunk.numel()].add_(1)
        return sum(chunk.numel() for chunk in chunks)

    def stage(self, only_changed: bool = False) -> None:
        """A whole staging."""
        self.stager.start(self.pairs, only_changed).wait(TIMEOUT)

    def seconds_held(self, only_changed: bool) -> float:
        """Seconds of the device until the sources may be overwritten; the staging ends after that."""
        self._bench.synchronize()
        before = self._bench.record()
        staging = self.stager.start(self.pairs, only_changed)
        staging.before_overwrite(timeout=TIMEOUT)
        seconds = self._bench.seconds_between(before, self._bench.record())
        staging.wait(TIMEOUT)
        return seconds

    def differences(self, staging: Staging, expected: torch.Tensor, nbytes: int) -> Iterator[str]:
        """What is wrong with a staging of what changed.

        Args:
            staging: waited for here.
            expected: what `data` was when it was started.
            nbytes: that it should have copied.
        """
        try:
            digests = staging.wait(TIMEOUT)
        except SaveFailed as failure:
            yield str(failure)
            return
        offsets = [offset for _, offset in self.pairs]
        tensors = expected.chunk(TENSORS)
        yield from differences(self._arena, offsets, tensors, digests, self._chunk_bytes)
        if staging.nbytes_copied != nbytes:
            yield f"{staging.nbytes_copied} bytes were copied, and {nbytes} had changed"
