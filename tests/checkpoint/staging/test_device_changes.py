"""Changes found and gathered on a device whose work happens late: what is copied, in which order, and what is noticed.

The native calls are Python, byte for byte, or the real kernels, built for the host.
"""

from __future__ import annotations

from random import Random
from types import SimpleNamespace

import pytest
import torch
import xxhash

from dtruntime_torch import _C
from dtruntime_torch.checkpoint.staging import device_changes
from dtruntime_torch.checkpoint.staging.chunk_table import ChunkTable
from dtruntime_torch.checkpoint.staging.sources import Pair
from dtruntime_torch.checkpoint.staging.stager import Stager, Staging
from dtruntime_torch.errors import SaveFailed
from tests.checkpoint.staging.late_device import LateDevice, LateNative, raw
from tests.native.host_builds import STAND_IN, bindings, kernels

CHUNK = 1000
SPOILED = 0x5A
KERNELS = ["cuda_list_chunks", "cuda_digest", "cuda_find_changed", "cuda_gather_changed"]
AT_THE_CALL = ["current cuda_list_chunks", "current cuda_digest", "follow_current"]
CALLS = [*AT_THE_CALL, "cuda_find_changed", "cuda_gather_changed", "record"]


def digests(pairs: list[Pair], chunk: int = CHUNK) -> bytes:
    data = [raw(source) for source, _ in pairs]
    return b"".join(
        xxhash.xxh3_128_digest(one[at : at + chunk]) for one in data for at in range(0, len(one), chunk)
    )


class State:
    """Tensors on a device in an arena that holds them since a first staging.

    Attributes:
        sources: 4 chunks and 3 bytes; 1 byte; 2 chunks: all at odd addresses.
    """

    def __init__(self, native: object = None) -> None:
        self.device = LateDevice(native)
        memory = torch.randint(0, 256, (9000,), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
        self.sources = [
            self.device.hold(part) for part in (memory[5:4008], memory[4100:4101], memory[4203:6203])
        ]
        self.pairs: list[Pair] = list(zip(self.sources, (17, 5000, 5001), strict=True))
        self.arena = _C.Arena(8000)
        self.stager = Stager(self.arena, CHUNK, find_device=self.device.find)
        self.stager.start(self.pairs).wait()
        self.device.calls.clear()

    def spoil(self) -> None:
        memoryview(self.arena)[:] = bytes([SPOILED]) * self.arena.nbytes

    def held(self, offset: int, length: int) -> bytes:
        return bytes(memoryview(self.arena)[offset : offset + length])

    def start(self) -> Staging:
        return self.stager.start(self.pairs, only_changed=True, names=["weight", "bias", "table"])


@pytest.fixture
def state() -> State:
    return State()


@pytest.fixture(scope="module")
def real_kernels() -> object:
    return bindings(STAND_IN / "module.cpp", kernels())


def test_only_the_chunks_that_changed_are_written(state):
    state.sources[0][1500] += 1
    state.sources[2][1999] += 1
    state.spoil()
    staging = state.start()
    assert staging.wait() == digests(state.pairs)
    assert (staging.nbytes_copied, staging.chunks_skipped) == (2000, 6)
    written = bytearray([SPOILED]) * 8000
    written[1017:2017] = raw(state.sources[0])[1000:2000]
    written[6001:7001] = raw(state.sources[2])[1000:]
    assert bytes(memoryview(state.arena)) == written


def test_without_a_change_nothing_is_written(state):
    state.spoil()
    staging = state.start()
    assert staging.wait() == digests(state.pairs)
    assert (staging.nbytes_copied, staging.chunks_skipped) == (0, 8)
    assert set(memoryview(state.arena)) == {SPOILED}


def test_digests_are_enqueued_on_the_current_stream_and_copies_on_the_side_behind_it_before_start_returns(
    state,
):
    state.start()
    assert state.device.calls == CALLS
    assert [event.waited for event in state.device.events] == [1, 0]


def test_what_the_current_stream_still_computes_is_staged(state):
    state.device.current.put(lambda: state.sources[0].add_(5))
    expected = [(source + 5 if n == 0 else source, at) for n, (source, at) in enumerate(state.pairs)]
    assert state.start().wait() == digests(expected)
    assert state.held(17, 4003) == raw(expected[0][0])


def test_what_the_current_stream_is_given_after_before_overwrite_waits_for_the_kernels(state):
    state.sources[0][0] += 1
    expected = digests(state.pairs)
    staging = state.start()
    staging.before_overwrite([0])
    state.device.current.put(state.sources[0].zero_)
    state.device.current.run()
    assert not state.sources[0].any()
    assert staging.wait() == expected


@pytest.mark.parametrize("after", ["cuda_digest", "cuda_find_changed"])
def test_a_source_that_is_overwritten_while_it_is_staged_fails_the_staging_by_its_name(state, after):
    state.sources[2][0] += 1
    state.device.meddle[after] = lambda: state.sources[2].add_(1)
    staging = state.start()
    with pytest.raises(
        SaveFailed, match=r"^table did not arrive from cpu as it was sent: bytes 5001 to 6001 "
    ):
        staging.wait()
    assert staging.ended and not staging.done()


def test_a_bit_that_flips_on_the_way_fails_the_staging(state):
    state.sources[1][0] += 1

    def flip() -> None:
        memoryview(state.arena)[5000] ^= 1

    state.device.meddle["cuda_gather_changed"] = flip
    with pytest.raises(SaveFailed, match=r"^bias did not arrive"):
        state.start().wait()


def test_a_change_that_the_device_did_not_gather_fails_the_staging(state, monkeypatch):
    """The host compares the tables itself."""
    state.sources[0][0] += 1
    counts = []
    find_changed = ChunkTable.find_changed

    def keeps_the_count(table, now, known):
        counts[:] = [find_changed(table, now, known)]
        return counts[0]

    monkeypatch.setattr(ChunkTable, "find_changed", keeps_the_count)
    state.device.meddle["cuda_find_changed"] = lambda: counts[0][1].zero_()
    with pytest.raises(SaveFailed, match=r"^weight did not arrive"):
        state.start().wait()


def test_kernels_that_never_ran_fail_the_staging(state):
    """The known digests are not taken for new ones, nor are those of a staging before."""
    nothing = SimpleNamespace(**dict.fromkeys(KERNELS, lambda *arguments: None))
    state.device.native = LateNative(state.device, nothing)
    with pytest.raises(SaveFailed, match=r"^weight did not arrive .* had 0{32} on the device"):
        state.start().wait()


def test_the_host_digests_only_what_changed(state, monkeypatch):
    asked = []
    digest_ranges = _C.digest_ranges

    def notes(arena, offsets, lengths, *rest):
        asked.extend(zip(offsets, lengths, strict=True))
        return digest_ranges(arena, offsets, lengths, *rest)

    monkeypatch.setattr(_C, "digest_ranges", notes)
    state.sources[0][4002] += 1
    state.start().wait()
    assert asked == [(17 + 4000, 3)]


@pytest.mark.parametrize("call", KERNELS)
def test_a_call_that_is_refused_leaves_nothing_in_flight(state, call):
    state.device.refuse_call = call
    state.sources[0][0] += 1
    with pytest.raises(SaveFailed, match=f"^weight, bias, table could not be copied from cpu .*{call}"):
        state.start()
    assert state.device.calls[-1] == "record" and state.device.events[-1].waited == 1
    state.arena.resize(8000)


def test_a_failure_of_the_device_ends_the_staging(state):
    staging = state.start()
    state.device.fail("CUDA error: uncorrectable ECC error")
    with pytest.raises(SaveFailed, match=r"^weight, bias, table could not .*ECC"):
        staging.wait()
    assert staging.ended


def test_what_does_not_lie_in_one_piece_is_brought_into_one_and_compared_as_any_other(state):
    turned = state.device.hold(torch.arange(60, dtype=torch.int64)).view(6, 10).T
    state.pairs = [*state.pairs[:2], (turned, 7008)]
    state.stager.start(state.pairs).wait()
    state.device.calls.clear()
    state.sources[0][0] += 1
    state.spoil()
    staging = state.stager.start(state.pairs, only_changed=True)
    assert state.device.calls == ["current as_bytes", *CALLS]
    assert staging.wait() == digests(state.pairs)
    assert (staging.nbytes_copied, staging.chunks_skipped) == (1000, 6)


def test_what_does_not_lie_in_one_piece_is_copied_if_it_changed(state):
    turned = state.device.hold(torch.arange(60, dtype=torch.int64)).view(6, 10).T
    state.pairs = [(turned, 7008)]
    state.stager.start(state.pairs).wait()
    turned[3, 3] = -1
    staging = state.stager.start(state.pairs, only_changed=True)
    assert staging.wait() == digests(state.pairs)
    assert staging.nbytes_copied == 480 and state.held(7008, 480) == raw(turned)


def test_an_arena_that_the_device_cannot_write_gets_plain_copies_of_all(state):
    state.device.reaches_arenas = False
    state.spoil()
    staging = state.start()
    assert staging.wait() == digests(state.pairs)
    assert state.device.calls == [*AT_THE_CALL, *["copy"] * 4, "record"]  # the digests, too
    assert (staging.nbytes_copied, staging.chunks_skipped) == (staging.nbytes, 0)


def test_more_chunks_than_the_device_can_list_are_plain_copies(state, monkeypatch):
    monkeypatch.setattr(device_changes, "CHUNKS_LIMIT", 8)
    staging = state.start()
    assert staging.wait() == digests(state.pairs)
    assert state.device.calls == [*AT_THE_CALL, "copy", "copy", "copy", "record"]


def test_tensors_of_host_and_device_are_staged_together(state):
    host = torch.arange(300, dtype=torch.int64)
    pairs = [(host, 7008 - 3000), (state.sources[2], 0), (state.sources[1], 7000)]
    for step in range(3):
        host[step] = -1
        state.sources[2][step] += 1
        staging = state.stager.start(pairs, only_changed=True)
        assert staging.wait() == digests(pairs)
    assert (staging.nbytes_copied, staging.chunks_skipped) == (2000, 2 + 1 + 1)


def test_scratch_memory_of_the_device_is_given_back_when_the_kernels_are_done(state, monkeypatch):
    made = []

    def counted(*arguments, **keywords):
        made.append(torch.zeros(*arguments, **keywords))
        return made[-1]

    monkeypatch.setattr(torch, "empty", counted)
    staging = state.start()
    (work,) = staging._on_device
    assert len(made) == 4 and work._held
    staging.wait()
    assert not work._held


@pytest.mark.parametrize("chunk", [240, 1000, 4096])
@pytest.mark.parametrize(
    "native", ["python", pytest.param("kernels", marks=pytest.mark.slow)]  # they are built first
)
def test_after_many_saves_of_a_few_changes_the_arena_is_the_state(native, chunk, request):
    random = Random(chunk)
    device = LateDevice(request.getfixturevalue("real_kernels") if native == "kernels" else None)
    lengths = [0, 1, 240, 241, 999, 1000, 1001, 65_537, 3, 0, 20_000]
    memory, pairs, start = torch.zeros(sum(lengths) + 16 * len(lengths), dtype=torch.uint8), [], 0
    memory.random_(256, generator=torch.Generator().manual_seed(2))
    device.hold(memory)
    for length in lengths:
        start += random.randrange(16)
        pairs.append((memory[start : start + length], start))
        start += length
    arena = _C.Arena(memory.nbytes)
    stager = Stager(arena, chunk, find_device=device.find)
    stager.start(pairs).wait()
    for changes in (0, 1, 7, 40, 10_000):
        before = digests(pairs, chunk)
        for _ in range(changes):
            memory[random.randrange(memory.numel())] += 1
        staging = stager.start(pairs, only_changed=True)
        after = digests(pairs, chunk)
        assert staging.wait() == after
        for source, offset in pairs:
            assert bytes(memoryview(arena)[offset : offset + source.nbytes]) == raw(source)
        rows = [before[at : at + 16] != after[at : at + 16] for at in range(0, len(after), 16)]
        sizes = [min(chunk, n - at) for n in lengths for at in range(0, n, chunk)]
        assert staging.nbytes_copied == sum(size for size, row in zip(sizes, rows, strict=True) if row)
        assert staging.chunks_skipped == rows.count(False)
