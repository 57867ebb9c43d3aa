"""The ranks of a node read each byte once between them, and all load alike whatever one of them meets."""

from __future__ import annotations

import errno
import os
import threading
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch

from dtruntime_torch import _C
from dtruntime_torch.checkpoint.flatten import PerRank
from dtruntime_torch.checkpoint.info import CheckpointInfo
from dtruntime_torch.checkpoint.loading import contents, node_memory, placement
from dtruntime_torch.checkpoint.loading.load_together import HALF_FILLED
from dtruntime_torch.checkpoint.saving.delta import DeltaPolicy
from dtruntime_torch.errors import DTRuntimeError, LoadFailed
from dtruntime_torch.storage import LocalBackend, MemoryBackend
from dtruntime_torch.storage.backend import StorageBackend
from dtruntime_torch.testing.faulty_backend import Fault, FaultyBackend, flipped, not_done, truncated
from tests.checkpoint.thread_ranks import RUN_ID, Rank, make_ranks, together

State = dict[str, torch.Tensor]
FAILURES = [not_done(), truncated(100)]  # of a read: it fails, or ends short


class CountingBackend(MemoryBackend):
    """Counts how often each byte of a data file was read."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()
        self.bytes: Counter[tuple[str, int]] = Counter()

    async def read_range(self, path: str, offset: int, length: int, *, into: memoryview | None = None):
        with self.lock:
            self.bytes.update((path, at) for at in range(offset, offset + length))
        return await super().read_range(path, offset, length, into=into)


def model(step: float = 0.0) -> State:
    """What all ranks hold alike; one tensor is much larger than the others."""
    return {
        **{f"t{n}": torch.full((700 + n,), step + n) for n in range(6)},
        "large": torch.arange(9000.0) + step,
    }


def saved(backend: StorageBackend, ranks: int, *steps: float, timeout: float = 60) -> list[Rank]:
    made = make_ranks(ranks, backend, timeout)
    for step in steps:
        results = together(*[partial(rank.save, model(step), int(step)) for rank in made])
        assert all(isinstance(result, CheckpointInfo) for result in results), results
    return made


def load(ranks: list[Rank], states: list[State], **options: object) -> list[object]:
    return together(*[partial(r.load, s, **options) for r, s in zip(ranks, states, strict=True)])


def same(state: State, step: float) -> bool:
    return all(torch.equal(state[name], tensor) for name, tensor in model(step).items())


def names() -> list[str]:
    return [name for name in os.listdir("/dev/shm") if name.startswith(f"dtruntime-{RUN_ID}")]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_each_byte_of_a_replicated_state_is_read_once(count: int) -> None:
    backend = CountingBackend()
    saved(backend, 2, 1.0)
    states = [{name: torch.zeros_like(t) for name, t in model().items()} for _ in range(count)]
    results = load(make_ranks(count, backend), states)
    assert all(isinstance(result, CheckpointInfo) for result in results), results
    assert all(same(state, 1.0) for state in states)
    assert set(backend.bytes.values()) == {1}
    assert len(backend.bytes) == sum(len(backend._files[path].data) for path in {p for p, _ in backend.bytes})
    assert names() == []


def test_each_byte_of_a_delta_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "JOIN_BYTES", 0)
    backend, state = CountingBackend(), model(1.0)
    ranks = make_ranks(2, backend, delta=DeltaPolicy(max_changed=1.0))
    for step in (1, 2, 3):
        state["large"][2000 * step] = -1.0
        results = together(*[partial(rank.save, state, step) for rank in ranks])
    assert [result.full for result in results if isinstance(result, CheckpointInfo)] == [False, False]
    fresh = [{name: torch.zeros_like(t) for name, t in state.items()} for _ in ranks]
    load(make_ranks(2, backend), fresh)
    assert all(torch.equal(found[name], state[name]) for found in fresh for name in state)
    assert set(backend.bytes.values()) == {1}
    files = {path for path, _ in backend.bytes}
    headers = sum(8 + int.from_bytes(backend._files[path].data[:8], "little") for path in files)
    assert len(files) == 3 and len(backend.bytes) == headers + sum(t.nbytes for t in state.values())


def test_ranks_that_want_different_parts_read_only_these_between_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(placement, "JOIN_BYTES", 0)
    backend = CountingBackend()
    saved(backend, 1, 1.0)
    states: list[State] = [
        {"t0": torch.zeros(700), "large": torch.zeros(9000)},
        {"large": torch.zeros(9000), "t3": torch.zeros(703)},
    ]
    results = load(make_ranks(2, backend), states, keys=["t0", "large", "t3"], strict=False)
    assert all(isinstance(result, CheckpointInfo) for result in results), results
    assert torch.equal(states[1]["t3"], model(1.0)["t3"]) and torch.equal(states[0]["t0"], model(1.0)["t0"])
    assert all(torch.equal(state["large"], model(1.0)["large"]) for state in states)
    assert set(backend.bytes.values()) == {1}
    (file,) = {path for path, _ in backend.bytes}
    header = 8 + int.from_bytes(backend._files[file].data[:8], "little")
    assert len(backend.bytes) == header + 4 * (9000 + 700 + 703)


@pytest.mark.parametrize("where", [0.01, 0.3, 0.6, 0.99])
def test_damage_that_another_rank_of_the_node_reads_sends_all_to_the_step_before(where: float) -> None:
    backend = FaultyBackend(MemoryBackend())
    ranks = saved(backend, 3, 1.0, 2.0)
    inner = backend._inner
    assert isinstance(inner, MemoryBackend)
    (path,) = [p for p in inner._files if "step-00000002" in p and p.endswith("00000-of-00003.safetensors")]
    data = bytearray(inner._files[path].data)
    data[int(where * len(data))] ^= 1
    inner._put(path, bytes(data), may_replace=True)
    states = [model() for _ in ranks]
    with pytest.warns(RuntimeWarning, match="shard-00000"):
        results = load(ranks, states)
    assert [result.step for result in results if isinstance(result, CheckpointInfo)] == [1, 1, 1]
    assert all(same(state, 1.0) for state in states)
    assert names() == []


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_damaged_header_of_any_rank_s_file_sends_all_to_the_step_before(rank: int) -> None:
    """What only one rank reads lies in a file of which it reads nothing for the others."""
    inner = MemoryBackend()
    ranks = make_ranks(3, inner)

    def state(step: int, rank: int) -> dict[str, object]:
        return {
            "alike": torch.full((9000,), float(step)),
            "own": PerRank(torch.full((700,), step + rank / 4)),
        }

    for step in (1, 2):
        together(*[partial(one.save, state(step, n), step) for n, one in enumerate(ranks)])
    (path,) = [
        p for p in inner._files if "step-00000002" in p and p.endswith(f"{rank:05}-of-00003.safetensors")
    ]
    data = bytearray(inner._files[path].data)
    data[10] ^= 1
    inner._put(path, bytes(data), may_replace=True)
    states = [state(0, 0) for _ in ranks]
    with pytest.warns(RuntimeWarning, match=f"shard-0000{rank}"):
        results = load(ranks, states)
    assert [getattr(result, "step", result) for result in results] == [1, 1, 1]
    assert all(torch.equal(one["alike"], torch.full((9000,), 1.0)) for one in states)
    assert names() == []


def refuse(monkeypatch: pytest.MonkeyPatch, what: str, nth: int) -> None:
    """Lets the nth that makes or attaches shared memory fail as a full /dev/shm does."""
    made = []

    class Native:
        class Arena:
            def __new__(cls, nbytes, **options):
                cls.meet("make")
                return _C.Arena(nbytes, **options)

            @staticmethod
            def meet(kind: str) -> None:
                made.append(kind)
                if kind == what and made.count(kind) == nth:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            @staticmethod
            def attach(name: str) -> _C.Arena:
                Native.Arena.meet("attach")
                return _C.Arena.attach(name)

    monkeypatch.setattr(node_memory, "_C", Native)


@pytest.mark.parametrize("what", ["make", "attach"])
@pytest.mark.parametrize("nth", [1, 2])
def test_where_shared_memory_is_refused_each_rank_reads_for_itself(
    what: str, nth: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    backend = CountingBackend()
    ranks = saved(backend, 2, 1.0)
    refuse(monkeypatch, what, nth)
    states = [model() for _ in ranks]
    results = load(ranks, states)
    assert all(isinstance(result, CheckpointInfo) for result in results), results
    assert all(same(state, 1.0) for state in states)
    assert set(backend.bytes.values()) == {2}
    assert "No space left" in caplog.text and "reads for itself" in caplog.text
    assert names() == []


@pytest.mark.parametrize("odd", [0, 1, 2])
@pytest.mark.parametrize("step", ["_make", "_attach"])
def test_a_rank_that_is_interrupted_leaves_no_shared_memory(
    odd: int, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = saved(MemoryBackend(), 3, 1.0)
    real = getattr(node_memory, step)

    def interrupted(*arguments: object) -> str:
        found: str = real(*arguments)
        if threading.current_thread().name == f"rank-{odd}":
            raise KeyboardInterrupt
        return found

    def run(rank: Rank, state: State) -> object:
        threading.current_thread().name = f"rank-{rank.members.rank}"
        return rank.load(state)

    monkeypatch.setattr(node_memory, step, interrupted)
    states = [model() for _ in ranks]
    results = together(*[partial(run, r, s) for r, s in zip(ranks, states, strict=True)])
    assert isinstance(results[odd], KeyboardInterrupt)
    assert all(isinstance(r, DTRuntimeError) for i, r in enumerate(results) if i != odd)
    assert all(same(state, 0.0) for state in states)
    assert names() == []


def test_reads_that_end_short_are_damage_on_all(backend: FaultyBackend) -> None:
    ranks = saved(backend, 2, 1.0, 2.0)
    backend.when("read_*", "*/step-00000002/*/shard-00000-*", truncated(100), nth=None)
    states = [model() for _ in ranks]
    with pytest.warns(RuntimeWarning, match=r"shard-00000.*missing"):
        results = load(ranks, states)
    assert [result.step for result in results if isinstance(result, CheckpointInfo)] == [1, 1]
    assert all(same(state, 1.0) for state in states)


def fail_one_read(
    backend: FaultyBackend, operation: str, fault: Fault
) -> tuple[list[Rank], list[State], str]:
    """Loads on two ranks when one read of data fails; returns the ranks, their states, and the error that both raised."""
    ranks = saved(backend, 2, 1.0)
    backend.when(operation, "*.safetensors", fault, nth=2)
    states = [model() for _ in ranks]
    results = load(ranks, states)
    assert all(isinstance(result, DTRuntimeError) for result in results)
    (told,) = {str(result) for result in results}
    return ranks, states, told


@pytest.mark.parametrize("fault", FAILURES)
def test_a_read_that_fails_once_fails_the_load_on_all_and_damages_no_name(
    fault: Fault, backend: FaultyBackend, data_read: str
) -> None:
    ranks, states, told = fail_one_read(backend, data_read, fault)
    assert "rank" in told
    assert all(isinstance(result, CheckpointInfo) for result in load(ranks, states))
    assert all(same(state, 1.0) for state in states)


@pytest.mark.parametrize("fault", FAILURES)
def test_a_failed_read_that_goes_beside_the_state_leaves_that_as_it_is(fault: Fault) -> None:
    _, states, _ = fail_one_read(FaultyBackend(MemoryBackend()), "read_range", fault)
    assert all(same(state, 0.0) for state in states)


@pytest.mark.parametrize("fault", FAILURES)
def test_a_failed_read_that_goes_straight_into_place_tells_that_the_state_is_half_filled(
    fault: Fault, tmp_path: Path
) -> None:
    _, _, told = fail_one_read(FaultyBackend(LocalBackend(tmp_path)), "read_chunks", fault)
    assert HALF_FILLED in told


def test_a_flipped_bit_in_what_a_read_brings_is_found(backend: FaultyBackend, data_read: str) -> None:
    ranks = saved(backend, 1, 1.0, 2.0)
    # `read_range` brings the header of the file first and then its data; `read_chunks` brings only data.
    first_of_data = 2 if data_read == "read_range" else 1
    backend.when(data_read, "*/step-00000002/*.safetensors", flipped(-1), nth=first_of_data)
    states = [model()]
    with pytest.warns(RuntimeWarning, match="damaged"):
        load(ranks, states)
    assert same(states[0], 1.0)


def test_no_memory_is_taken_for_a_file_that_is_shorter_than_was_committed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backend = FaultyBackend(MemoryBackend())
    (rank,) = saved(backend, 1, 1.0)
    inner = backend._inner
    assert isinstance(inner, MemoryBackend)
    (path,) = [p for p in inner._files if p.endswith(".safetensors")]
    inner._put(path, inner._files[path].data[:-1], may_replace=True)

    class NoMemory:
        @staticmethod
        def Arena(nbytes: int, **options: object) -> _C.Arena:
            raise MemoryError(nbytes)

    monkeypatch.setattr(contents, "_C", NoMemory)
    with pytest.warns(RuntimeWarning, match="passed over"):
        (result,) = together(partial(rank.load, model()))
    assert not isinstance(result, (CheckpointInfo, LoadFailed))
    assert "no checkpoint called model" in str(result)
