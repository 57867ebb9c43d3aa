"""Damage to any file that a delta needs, its own or one that it uses: it is found and named, never loaded."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dtruntime_torch as dt
from dtruntime_torch.checkpoint import restore
from dtruntime_torch.errors import CheckpointNotFound, CorruptCheckpoint
from dtruntime_torch.storage import MemoryBackend, run_sync
from tests.checkpoint.sound import CHUNK, check_equal, state_of

STEPS = 4


def saved() -> dict[str, bytes]:
    """The files of a chain of deltas."""
    backend = MemoryBackend()
    with dt.CheckpointManager(backend, chunk_bytes=CHUNK, keep_last_n=None, delta=True) as manager:
        for step in range(1, STEPS + 1):
            manager.save(state_of(step), step)
        assert [info.full for info in manager.list()] == [True, False, False, False]
    return {entry.path: bytes(run_sync(backend.read(entry.path))) for entry in run_sync(backend.list(""))}


FILES = saved()
NEWEST = f"model/commits/0001-{STEPS:08d}.json"
NEEDED = [path for path in FILES if f"step-{STEPS:08d}" in path or path.endswith((".safetensors", ".delta"))]
DAMAGES: dict[str, Callable[[bytes, int], bytes | None]] = {
    "flipped": lambda data, at: data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :],
    "cut": lambda data, at: data[:at],
    "zeroed": lambda data, at: data[:at] + bytes(len(data) - at),
    "missing": lambda data, at: None,
    "grown": lambda data, at: data + data[:1],
    "another's": lambda data, at: next(
        other for path, other in FILES.items() if other != data and path[-5:] in (".json", "delta")
    ),
}


def with_damage(path: str, data: bytes | None) -> MemoryBackend:
    backend = MemoryBackend()
    for other, sound in FILES.items():
        if other != path:
            run_sync(backend.write(other, sound))
    if data is not None:
        run_sync(backend.write(path, data))
    return backend


def test_the_sound_chain_loads():
    check_equal(restore.load_fresh(with_damage("", None), "model", None, 0), STEPS)


@pytest.mark.parametrize("kind", DAMAGES)
@settings(max_examples=60)
@given(data=st.data())
def test_damage_anywhere_is_found_or_touches_nothing_that_is_read(kind, data):
    path = data.draw(st.sampled_from([*NEEDED, NEWEST]))
    sound = FILES[path]
    changed = DAMAGES[kind](sound, data.draw(st.integers(0, len(sound) - 1)))
    backend = with_damage(path, changed)
    if (path, changed) == (NEWEST, None):
        with pytest.raises(CheckpointNotFound):
            restore.load_fresh(backend, "model", STEPS, 0)
    elif is_read(path) and changed != sound:
        with pytest.raises(CorruptCheckpoint) as caught:
            restore.load_fresh(backend, "model", STEPS, 0)
        # Where a commit and its manifest do not agree, the manifest is named.
        assert path == NEWEST or path in {damage.file for damage in caught.value.damage}
    else:
        loads_or_names(backend, path)


def is_read(path: str) -> bool:
    """All that the newest wrote itself; of what it uses only the extents that it names."""
    return path == NEWEST or f"step-{STEPS:08d}" in path


def loads_or_names(backend: MemoryBackend, path: str) -> None:
    try:
        state = restore.load_fresh(backend, "model", STEPS, 0)
    except CorruptCheckpoint as error:
        named = {damage.file for damage in error.damage}
    else:
        check_equal(state, STEPS)
        named = {path}
    assert path in named


@pytest.mark.parametrize("path", [path for path in NEEDED if path.endswith((".safetensors", ".delta"))])
def test_a_used_file_that_is_missing_is_named_and_an_older_step_that_does_not_need_it_is_loaded(path):
    backend = with_damage(path, None)
    with dt.CheckpointManager(backend) as manager:
        report = manager.verify(STEPS)
        if report.ok:  # all of that file was replaced meanwhile
            return
        assert path in {damage.file for damage in report.damage}
        lost = int(path.split("/")[1].removeprefix("step-"))
        state = state_of(0)
        if lost == 1:
            with pytest.raises(CorruptCheckpoint), pytest.warns(RuntimeWarning):
                manager.load(state)
            return
        with pytest.warns(RuntimeWarning, match="it is passed over"):
            step = manager.load(state).step
        assert step == lost - 1
        check_equal(state, step)
