"""Ranks that save deltas, what they hold, and whether what they saved is what they held."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import partial

import torch

from dtruntime_torch import DeltaPolicy
from dtruntime_torch.checkpoint import restore
from dtruntime_torch.checkpoint.flatten import PerRank
from dtruntime_torch.checkpoint.info import CheckpointInfo
from dtruntime_torch.checkpoint.verify import find_commit, verify
from dtruntime_torch.storage import StorageBackend, run_sync
from tests.checkpoint.thread_ranks import Rank, make_ranks, together

CHUNK = 4096  # of thread_ranks

Tensors = dict[str, torch.Tensor]

CHUNKS = 20
"""Of the tensor `shared`."""


def delta_ranks(count: int, backend: StorageBackend, **more: object) -> list[Rank]:
    """Ranks that save deltas wherever they may, unless `more` says otherwise."""
    policy = DeltaPolicy(max_changed=1.0, max_files=1000)
    return make_ranks(count, backend, **{"delta": policy, **more})  # type: ignore[arg-type]


def make_states(count: int) -> list[Tensors]:
    """One tensor that all hold alike, one that only this rank holds, and one that differs by rank."""
    shared = torch.arange(CHUNKS * CHUNK // 4, dtype=torch.int32)
    return [
        {
            "shared": shared.clone(),
            f"own{rank}": torch.arange(5000, dtype=torch.float64) + rank,
            "seed": torch.full((700,), rank, dtype=torch.int64),
        }
        for rank in range(count)
    ]


def touch(states: Sequence[Tensors], step: int, chunks: Sequence[int] = (0,), own: bool = False) -> None:
    """Changes some chunks of `shared` on all ranks, and of what each has alone if `own`."""
    for state in states:
        for chunk in chunks:
            state["shared"][chunk * CHUNK // 4] = 1_000_000 + step
        if own:
            for name, tensor in state.items():
                if name != "shared":
                    tensor[-1] = 500 + step


def start_all(ranks: Sequence[Rank], states: Sequence[Tensors], step: int) -> list[object]:
    """Saves on all ranks at once; what each returned or raised."""
    calls = [
        partial(rank.save, {**state, "seed": PerRank(state["seed"]), "step": step}, step)
        for rank, state in zip(ranks, states, strict=True)
    ]
    return together(*calls)


def save_all(ranks: Sequence[Rank], states: Sequence[Tensors], step: int) -> CheckpointInfo:
    """Saves on all ranks, of which none may fail."""
    results = start_all(ranks, states, step)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    assert len(set(map(repr, results))) == 1
    return results[0]  # type: ignore[return-value]


def copy_of(states: Sequence[Tensors]) -> list[Tensors]:
    """What is held now, for later."""
    return deepcopy(list(states))


def check_step(backend: StorageBackend, states: Sequence[Tensors], step: int) -> None:
    """Verifies a step, and loads it in place on as many ranks, and whole on one; bit for bit."""
    report = run_sync(verify(backend, "model", run_sync(find_commit(backend, "model", step))))
    assert report.ok, report.damage
    fresh: list[dict[str, object]] = [
        {name: torch.zeros_like(tensor) for name, tensor in state.items()} for state in states
    ]
    calls = []
    for rank, state in zip(make_ranks(len(states), backend), fresh, strict=True):
        calls.append(partial(rank.load, {**state, "seed": PerRank(state["seed"]), "step": 0}, step))
    for result in together(*calls):
        assert isinstance(result, CheckpointInfo) and result.step == step, result
    for found, state in zip(fresh, states, strict=True):
        check_equal(found, state)
    whole = restore.load_fresh(backend, "model", step, 0)
    assert isinstance(whole, dict) and whole["step"] == step
    for number, state in enumerate(states):
        check_equal({name: whole[name] for name in state}, state, skip=() if number == 0 else ("seed",))


def check_equal(found: Mapping[str, object], expected: Tensors, skip: Sequence[str] = ()) -> None:
    """Bit for bit."""
    for name, tensor in expected.items():
        if name not in skip:
            other = found[name]
            assert isinstance(other, torch.Tensor) and torch.equal(other, tensor), name
