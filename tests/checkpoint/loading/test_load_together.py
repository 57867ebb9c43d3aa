"""Loads of several ranks end the same way on all of them, whatever one of them does."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path

import pytest
import torch

from dtruntime_torch.checkpoint.info import CheckpointInfo
from dtruntime_torch.checkpoint.loading.load_together import HALF_FILLED
from dtruntime_torch.errors import BarrierTimeout, InvalidArgument, LoadFailed
from dtruntime_torch.storage import LocalBackend, MemoryBackend
from dtruntime_torch.storage.backend import StorageBackend
from dtruntime_torch.testing.faulty_backend import Call, FaultyBackend, flipped
from tests.checkpoint.thread_ranks import Rank, make_ranks, together


def two_steps(backend: StorageBackend) -> tuple[list[Rank], list[dict[str, torch.Tensor]]]:
    """Two ranks that hold different names saved steps 1 and 2."""
    ranks = make_ranks(2, backend)
    for step in (1, 2):
        states = [{f"stage{i}": torch.full((5000,), float(step))} for i in (0, 1)]
        saves = [partial(rank.save, state, step) for rank, state in zip(ranks, states, strict=True)]
        assert all(isinstance(result, CheckpointInfo) for result in together(*saves))
    return ranks, [{f"stage{i}": torch.zeros(5000)} for i in (0, 1)]


def load(ranks: list[Rank], states: list[dict[str, torch.Tensor]]) -> list[object]:
    return together(*[partial(rank.load, state) for rank, state in zip(ranks, states, strict=True)])


def test_damage_that_one_rank_meets_sends_all_to_the_step_before(backend, data_read):
    ranks, states = two_steps(backend)
    backend.when(data_read, "*/step-00000002/*/shard-00001-*.safetensors", flipped(-1), nth=None)
    with pytest.warns(RuntimeWarning, match="shard-00001"):
        results = load(ranks, states)
    assert [result.step for result in results if isinstance(result, CheckpointInfo)] == [1, 1]
    assert all((tensor == 1).all() for state in states for tensor in state.values())


def test_a_commit_that_vanishes_from_under_one_rank_ends_the_load_alike_on_all(tmp_path: Path) -> None:
    """Nobody may begin anew while others hold half of a state; only rank 0 has a tensor to read into."""
    backend = FaultyBackend(LocalBackend(tmp_path))
    ranks = make_ranks(2, backend)
    states: list[dict[str, object]] = [{"w": torch.ones(5000), "n": 1}, {"n": 1}]
    saves = [partial(rank.save, state, 1) for rank, state in zip(ranks, states, strict=True)]
    assert all(isinstance(result, CheckpointInfo) for result in together(*saves))

    async def vanish(call: Call) -> object:
        await backend.delete("model/commits/0001-00000001.json")
        await backend.delete(call.path)
        return await call.proceed()

    backend.when("read_chunks", "*", vanish)
    fresh: list[dict[str, object]] = [{"w": torch.zeros(5000), "n": 0}, {"n": 0}]
    results = together(*[partial(rank.load, state) for rank, state in zip(ranks, fresh, strict=True)])
    assert [type(result) for result in results] == [LoadFailed, LoadFailed], results
    assert all(HALF_FILLED in str(result) for result in results)


def test_an_error_of_a_state_that_no_text_can_hold_reaches_all_ranks() -> None:
    class Odd:
        def state_dict(self) -> dict[str, object]:
            return {"n": 1}

        def load_state_dict(self, state: object) -> None:
            raise ValueError("bad name \udcff")

    ranks = make_ranks(2, MemoryBackend())
    together(*[partial(rank.save, {"odd": Odd()}, 1) for rank in ranks])
    results = together(*[partial(rank.load, {"odd": Odd()}) for rank in ranks])
    assert [type(result) for result in results] == [LoadFailed, LoadFailed], results
    assert "bad name" in str(results[0])


def test_warnings_that_are_errors_leave_no_rank_behind(backend, data_read):
    ranks, states = two_steps(backend)
    backend.when(data_read, "*/step-00000002/*/shard-00001-*.safetensors", flipped(-1), nth=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results = load(ranks, states)
    assert isinstance(results[0], RuntimeWarning) and isinstance(results[1], CheckpointInfo)
    assert all((tensor == 1).all() for state in states for tensor in state.values())


@pytest.mark.parametrize("odd", [0, 1])
def test_an_interrupted_rank_ends_the_load_on_all(odd, monkeypatch):
    ranks, states = two_steps(MemoryBackend())

    class Interrupting(dict[str, torch.Tensor]):
        def items(self):
            raise KeyboardInterrupt

    states[odd] = Interrupting(states[odd])
    results = load(ranks, states)
    assert isinstance(results[odd], KeyboardInterrupt)
    assert isinstance(results[1 - odd], Exception) and not isinstance(results[1 - odd], BarrierTimeout)


@pytest.mark.parametrize("odd", [0, 1])
@pytest.mark.parametrize("stage", ["survey", "read", "check", "home"])
def test_a_rank_that_is_interrupted_while_it_waits_keeps_none_waiting(odd, stage, monkeypatch, tmp_path):
    ranks, states = two_steps(LocalBackend(tmp_path))
    barrier, method = ranks[odd].members.barrier, "_follow" if odd else "_lead"
    wait = getattr(barrier, method)

    def interrupted(key: str, *more: object) -> bytes:
        if key.endswith(stage):
            raise KeyboardInterrupt
        return wait(key, *more)

    monkeypatch.setattr(barrier, method, interrupted)
    results = load(ranks, states)
    assert isinstance(results[odd], KeyboardInterrupt)
    assert isinstance(results[1 - odd], Exception) and not isinstance(results[1 - odd], BarrierTimeout)


@pytest.mark.parametrize("odd", [0, 1])
def test_a_state_that_one_rank_cannot_fill_is_filled_on_none(odd):
    class Refusing:
        def state_dict(self) -> dict[str, object]:
            return {"n": 1}

        def check_state_dict(self, state: object) -> None:
            if refuses:
                raise ValueError("another n")

        def load_state_dict(self, state: object) -> None:
            raise AssertionError("it was asked before")

    ranks = make_ranks(2, MemoryBackend())
    refuses = False
    states: list[dict[str, object]] = [{"w": torch.ones(3), "sampler": Refusing()} for _ in ranks]
    together(*[partial(rank.save, state, 1) for rank, state in zip(ranks, states, strict=True)])
    refuses = True
    states = [{"w": torch.zeros(3), "sampler": Refusing()} for _ in ranks]
    del states[1 - odd]["sampler"]
    results = together(*[partial(rank.load, state) for rank, state in zip(ranks, states, strict=True)])
    assert all(isinstance(result, LoadFailed) and f"rank {odd}" in str(result) for result in results)
    assert not any(state["w"].any() for state in states)  # type: ignore[attr-defined]


@pytest.mark.parametrize("asked", [(1, 2), (None, 2), (1, None)])
def test_ranks_that_ask_for_different_steps_are_told(asked):
    ranks, states = two_steps(MemoryBackend())
    loads = [partial(rank.load, state, step) for rank, state, step in zip(ranks, states, asked, strict=True)]
    assert all(isinstance(result, InvalidArgument) and "rank 1" in str(result) for result in together(*loads))
    assert not any(tensor.any() for state in states for tensor in state.values())
