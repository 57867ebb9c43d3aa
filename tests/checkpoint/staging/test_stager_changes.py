"""Stagings that copy only what changed: what is copied, what is known, and after which endings nothing is."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dtruntime_torch import _C
from dtruntime_torch.checkpoint.staging import stager as stager_module
from dtruntime_torch.checkpoint.staging.sources import Pair
from dtruntime_torch.checkpoint.staging.stager import Stager, Staging
from dtruntime_torch.errors import BarrierTimeout, InvalidArgument, SaveFailed
from tests.checkpoint.patient_job import PatientJob
from tests.checkpoint.staging.late_device import LateDevice
from tests.checkpoint.staging.scattered_tensors import digests_of

CHUNK = 64
PATIENCE = 60.0
SPOILED = 0x5A


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def digests(pairs: list[Pair]) -> bytes:
    return b"".join(digests_of(raw(source), CHUNK) for source, _ in pairs)


class Bench:
    """An arena with a state in it that was staged once: 10 chunks of one tensor, 3 of another and a strided one."""

    def __init__(self) -> None:
        self.arena = _C.Arena(2000)
        self.device = LateDevice()
        self.stager = Stager(self.arena, CHUNK, find_device=self.device.find)
        self.large = torch.arange(80, dtype=torch.int64)
        self.small = torch.arange(130, dtype=torch.uint8)
        self.strided = torch.arange(12, dtype=torch.float64).view(3, 4).T
        self.pairs: list[Pair] = [(self.large, 16), (self.strided, 1000), (self.small, 1100)]
        self.stager.start(self.pairs).wait(PATIENCE)

    def spoil(self) -> None:
        """Makes the bytes of the arena such that whoever does not copy is seen not to."""
        memoryview(self.arena)[:] = bytes([SPOILED]) * self.arena.nbytes

    def held(self, offset: int, length: int) -> bytes:
        return bytes(memoryview(self.arena)[offset : offset + length])

    def start(self) -> Staging:
        return self.stager.start(self.pairs, only_changed=True)

    def check_all_is_copied(self) -> None:
        """The next staging leaves nothing of what is in the arena now."""
        self.spoil()
        staging = self.start()
        assert staging.wait() == digests(self.pairs)
        assert (staging.nbytes_copied, staging.chunks_skipped) == (staging.nbytes, 0)
        for source, offset in self.pairs:
            assert self.held(offset, source.nbytes) == raw(source)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_only_the_chunks_that_changed_are_copied(bench):
    bench.large[9] += 1  # in chunk 1
    bench.small[129] += 1  # in the last, of 2 bytes
    bench.spoil()
    staging = bench.start()
    assert staging.wait(PATIENCE) == digests(bench.pairs)
    assert staging.nbytes_copied == 64 + 2 + bench.strided.nbytes
    assert staging.chunks_skipped == 9 + 2
    assert bench.held(16, 64) == bytes([SPOILED]) * 64
    assert bench.held(16 + 64, 64) == raw(bench.large)[64:128]
    assert bench.held(16 + 128, 512) == bytes([SPOILED]) * 512
    assert bench.held(1100 + 128, 2) == raw(bench.small)[128:]


def test_what_is_strided_is_copied_and_digested_each_time(bench):
    bench.spoil()
    bench.strided[2, 1] = -1.0
    assert bench.start().wait(PATIENCE) == digests(bench.pairs)
    assert bench.held(1000, bench.strided.nbytes) == raw(bench.strided)


def test_bytes_that_were_changed_behind_its_back_are_taken_for_what_they_were(bench):
    """What the docstring says; whoever writes the arena from it digests it again where that matters."""
    bench.spoil()
    assert bench.start().wait(PATIENCE) == digests(bench.pairs)
    assert bench.held(16, 640) == bytes([SPOILED]) * 640


def test_unless_it_is_asked_for_all_is_copied(bench):
    bench.spoil()
    staging = bench.stager.start(bench.pairs)
    assert staging.wait(PATIENCE) == digests(bench.pairs)
    assert (staging.nbytes_copied, staging.chunks_skipped) == (staging.nbytes, 0)
    assert bench.held(16, 640) == raw(bench.large)


def test_the_first_staging_copies_all(bench):
    bench.stager = Stager(bench.arena, CHUNK)
    bench.check_all_is_copied()


@st.composite
def rounds(draw: st.DrawFn) -> list[tuple[str, int]]:
    """What happens between two stagings and the salt of the changes, for each."""
    kinds = st.sampled_from(["delta", "delta", "delta", "full", "cancelled", "other places", "resized"])
    return draw(st.lists(st.tuples(kinds, st.integers(0, 1 << 16)), min_size=1, max_size=8))


@given(rounds(), st.integers(1, 400))
def test_after_any_history_the_arena_is_the_state_and_the_digests_are_its(history, chunk_bytes):
    arena = _C.Arena(3000)
    stager = Stager(arena, chunk_bytes, threads=2)
    sources = [torch.randint(0, 256, (n,), dtype=torch.uint8) for n in (1000, 0, 3, 700)]
    places = [0, 5, 1003, 1100]
    for kind, salt in history:
        random = Random(salt)
        for source in sources:
            for _ in range(random.randrange(3) if source.numel() else 0):
                source[random.randrange(source.numel())] = random.randrange(256)
        if kind == "resized":
            arena.resize(2500)
            arena.resize(3000)
            memoryview(arena)[:] = bytes([SPOILED]) * 3000
        if kind == "other places":
            places[3] = 1100 + random.randrange(1000)
        staging = stager.start(list(zip(sources, places, strict=True)), only_changed=kind != "full")
        if kind == "cancelled":
            staging.cancel()
            continue
        assert staging.wait(PATIENCE) == b"".join(digests_of(raw(source), chunk_bytes) for source in sources)
        for source, offset in zip(sources, places, strict=True):
            assert bytes(memoryview(arena)[offset : offset + source.nbytes]) == raw(source)


def cancelled(bench: Bench) -> None:
    bench.start().cancel()


def cancelled_after_a_timeout(bench: Bench) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_C, "CopyJob", PatientJob)
        staging = bench.start()
        with pytest.raises(BarrierTimeout):
            staging.wait(1)
        staging.cancel()


def dropped(bench: Bench) -> None:
    bench.start()
    bench.stager._running = None  # what `start` does before anything else, too


def interrupted_as_it_is_made(bench: Bench) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stager_module.Staging, "__init__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            bench.start()


def interrupted_as_its_job_is_made(bench: Bench) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_C, "CopyJob", interrupted)
        with pytest.raises(KeyboardInterrupt):
            bench.start()


def interrupted_as_it_waits(bench: Bench) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    staging = bench.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_C, "digest_ranges", interrupted)
        with pytest.raises(KeyboardInterrupt):
            staging.wait(PATIENCE)
    staging.cancel()


def refused_by_a_device(bench: Bench) -> None:
    bench.device.hold(bench.large)
    bench.device.refuse_call = "cuda_gather_changed"
    with pytest.raises(SaveFailed, match="out of memory"):
        bench.start()
    bench.device.refuse_call = None


def refused_a_plain_copy(bench: Bench) -> None:
    bench.device.hold(bench.large)
    bench.device.reaches_arenas = False
    bench.device.refuse = 0
    with pytest.raises(SaveFailed, match="out of memory"):
        bench.start()
    bench.device.refuse = None
    bench.device.reaches_arenas = True


def failed_on_a_device(bench: Bench) -> None:
    bench.device.hold(bench.large)
    staging = bench.start()
    bench.device.fail("CUDA error: uncorrectable ECC error")
    with pytest.raises(SaveFailed, match="ECC"):
        staging.wait(PATIENCE)


def torn_on_a_device(bench: Bench) -> None:
    bench.device.hold(bench.large)
    bench.large[0] += 1
    bench.device.meddle["cuda_digest"] = lambda: bench.large.add_(1)
    with pytest.raises(SaveFailed, match="did not arrive"):
        bench.start().wait()
    bench.device.meddle.clear()


def of_another_layout(bench: Bench) -> None:
    bench.stager.start([(bench.small, 30)]).wait(PATIENCE)


def at_another_place(bench: Bench) -> None:
    bench.pairs = [*bench.pairs[:2], (bench.small, 1200)]


def of_another_length(bench: Bench) -> None:
    bench.pairs = [*bench.pairs[:2], (bench.small[:100], 1100)]


def resized(bench: Bench) -> None:
    bench.arena.resize(1900)


def resized_and_back(bench: Bench) -> None:
    bench.arena.resize(100)
    bench.arena.resize(2000)


def with_another_arena(bench: Bench) -> None:
    bench.arena = bench.stager.arena = _C.Arena(2000)


ENDINGS = [
    cancelled,
    cancelled_after_a_timeout,
    dropped,
    interrupted_as_it_is_made,
    interrupted_as_its_job_is_made,
    interrupted_as_it_waits,
    refused_by_a_device,
    refused_a_plain_copy,
    torn_on_a_device,
    failed_on_a_device,
    of_another_layout,
    at_another_place,
    of_another_length,
    resized,
    resized_and_back,
    with_another_arena,
]


@pytest.mark.parametrize("ending", ENDINGS, ids=lambda ending: ending.__name__)
def test_after_it_nothing_is_known_and_all_is_copied(bench, ending: Callable[[Bench], None]):
    ending(bench)
    bench.check_all_is_copied()


def test_after_a_staging_that_was_refused_its_pairs_the_arena_is_still_known(bench):
    with pytest.raises(InvalidArgument):
        bench.stager.start([(bench.large, 5000)])
    staging = bench.start()
    staging.wait(PATIENCE)
    assert staging.chunks_skipped == 13


def test_a_cancel_after_the_end_leaves_what_is_known(bench):
    assert bench.stager.last is not None
    bench.stager.last.cancel()
    staging = bench.start()
    staging.wait(PATIENCE)
    assert staging.chunks_skipped == 13


def test_other_tensors_at_the_same_places_are_compared_with_what_is_there(bench):
    bench.pairs = [(source.clone() if source.is_contiguous() else source, at) for source, at in bench.pairs]
    bench.pairs[0][0][0] = -1
    staging = bench.start()
    assert staging.wait(PATIENCE) == digests(bench.pairs)
    assert staging.chunks_skipped == 12
    assert bench.held(16, 640) == raw(bench.pairs[0][0])
