"""Two checkpoints compared by their manifests."""

from __future__ import annotations

import numpy as np
import pytest

from dtruntime_torch.checkpoint.diff import Difference, diff
from dtruntime_torch.checkpoint.names import CommitKey
from dtruntime_torch.errors import CheckpointNotFound, CorruptCheckpoint
from dtruntime_torch.storage import MemoryBackend, run_sync
from dtruntime_torch.testing.faulty_backend import FaultyBackend
from tests.checkpoint import saved_checkpoints
from tests.checkpoint.saved_checkpoints import CHUNK, flip, save

WEIGHT = np.arange(100, dtype=np.uint8)  # 7 chunks of 16 bytes, the last one of 4


def compare(*states: dict[str, np.ndarray]) -> list[Difference]:  # type: ignore[type-arg]
    backend = MemoryBackend()
    keys = [save(backend, step=step, held=[state]).key for step, state in enumerate(states)]
    return run_sync(diff(backend, "model", *keys))


def with_bytes_changed(*places: int) -> np.ndarray:  # type: ignore[type-arg]
    changed = WEIGHT.copy()
    changed[list(places)] += 1
    return changed


def test_equal_checkpoints_do_not_differ():
    assert compare({"w": WEIGHT}, {"w": WEIGHT.copy()}) == []


@pytest.mark.parametrize(
    ("places", "nbytes"), [((0,), CHUNK), ((0, 15, 16), 2 * CHUNK), ((99,), 4), ((0, 99), CHUNK + 4)]
)
def test_a_byte_counts_as_changed_if_its_chunk_did(places, nbytes):
    (found,) = compare({"w": WEIGHT, "b": WEIGHT}, {"w": with_bytes_changed(*places), "b": WEIGHT})
    assert found == Difference("w", "changed", nbytes, 100, is_object=False)


def test_what_is_only_in_one_of_them_is_named():
    found = compare({"old": WEIGHT, "w": WEIGHT}, {"w": WEIGHT, "new": WEIGHT[:10]})
    assert found == [
        Difference("new", "added", 10, 10, is_object=False),
        Difference("old", "removed", 0, 100, is_object=False),
    ]


@pytest.mark.parametrize("other", [WEIGHT[:50], WEIGHT.view(np.int8), WEIGHT.reshape(10, 10)])
def test_another_shape_or_dtype_is_no_change_of_bytes(other):
    (found,) = compare({"w": WEIGHT}, {"w": other})
    assert (found.kind, found.changed) == ("reshaped", other.nbytes)


def test_another_size_of_chunks_cannot_be_compared(monkeypatch):
    backend = MemoryBackend()
    old = save(backend, step=1, held=[{"w": WEIGHT}])
    monkeypatch.setattr(saved_checkpoints, "CHUNK", 32)
    new = save(backend, step=2, held=[{"w": WEIGHT}])
    assert run_sync(diff(backend, "model", old.key, new.key)) == [
        Difference("w", "recut", 0, 100, is_object=False)
    ]


def test_a_tensor_that_another_rank_writes_now_is_the_same(monkeypatch):
    backend = MemoryBackend()
    old = save(backend, step=1, held=[{"a": WEIGHT}, {"w": WEIGHT}])
    new = save(backend, step=2, held=[{"w": WEIGHT}, {"a": WEIGHT}])
    assert run_sync(diff(backend, "model", old.key, new.key)) == []


def test_a_value_that_is_no_tensor_is_compared_with_its_type(monkeypatch):
    backend = MemoryBackend()
    old = save(backend, step=1, held=[{}])
    stage = saved_checkpoints.stage
    monkeypatch.setattr(saved_checkpoints, "stage", lambda plan, held, _: stage(plan, held, {"epoch": 3.0}))
    new = save(backend, step=2, held=[{}])
    assert run_sync(diff(backend, "model", old.key, new.key)) == [
        Difference("epoch", "changed", 0, 0, is_object=True)
    ]


def test_no_data_is_read():
    backend = FaultyBackend(MemoryBackend())
    keys = [save(backend, step=step).key for step in (1, 2)]
    backend.calls.clear()
    assert run_sync(diff(backend, "model", *keys))
    assert not [path for _, path in backend.calls if path.endswith(".safetensors")]


@pytest.mark.parametrize("void", [True, False])
def test_a_checkpoint_that_is_not_there_is_named(void):
    backend = MemoryBackend()
    key = save(backend, step=1).key
    missing = CommitKey(1, 2)
    if void:
        saved_checkpoints.void(backend, save(backend, step=2))
    with pytest.raises(CheckpointNotFound, match="step 2 in generation 1"):
        run_sync(diff(backend, "model", key, missing))


def test_a_damaged_manifest_is_an_error():
    backend = MemoryBackend()
    saved = [save(backend, step=step) for step in (1, 2)]
    flip(backend, saved[1].part_path(0), 20)
    with pytest.raises(CorruptCheckpoint, match="SHA-256"):
        run_sync(diff(backend, "model", saved[0].key, saved[1].key))
