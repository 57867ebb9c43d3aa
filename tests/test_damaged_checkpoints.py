"""A checkpoint of which a file is damaged, as a user meets it: what is loaded instead, and what is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dtruntime_torch as dt
from dtruntime_torch.errors import (
    CorruptCheckpoint,
)
from dtruntime_torch.storage import LocalBackend
from tests.numbered_saves import CHUNK, load_newest, save, state_of


def data_file(folder: Path, step: int) -> Path:
    (found,) = folder.glob(f"model/step-{step:08d}/*/*.safetensors")
    return found


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "flipped first byte": lambda path: flip(path, 0),
    "flipped last byte": lambda path: flip(path, -1),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "emptied": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "missing": lambda path: path.unlink(),
}
TARGETS = {
    "data": lambda folder: data_file(folder, 2),
    "part": lambda folder: data_file(folder, 2).with_suffix(".json"),
    "manifest": lambda folder: data_file(folder, 2).with_name("manifest.json"),
    "commit": lambda folder: folder / "model/commits/0001-00000002.json",
}


# Without its commit file there is no checkpoint that could be damaged.
CASES = [(t, d) for t in TARGETS for d in DAMAGES if (t, d) != ("commit", "missing")]


@pytest.mark.parametrize(("target", "damage"), CASES)
def test_a_damaged_newest_checkpoint_is_skipped_with_a_warning(tmp_path, target, damage):
    with dt.CheckpointManager(tmp_path, chunk_bytes=CHUNK) as manager:
        for step in (1, 2):
            manager.save(state_of(step), step)
        broken = TARGETS[target](tmp_path)
        DAMAGES[damage](broken)
        with pytest.warns(RuntimeWarning, match=broken.name):
            assert load_newest(LocalBackend(tmp_path)) == 1


@pytest.mark.parametrize("load", ["load", "load_checkpoint"])
@pytest.mark.parametrize("target", TARGETS)
def test_the_warning_of_damage_is_given_where_the_user_loads(tmp_path, target, load):
    with dt.CheckpointManager(tmp_path, chunk_bytes=CHUNK) as manager:
        for step in (1, 2):
            manager.save(state_of(step), step)
        DAMAGES["flipped first byte"](TARGETS[target](tmp_path))
        with pytest.warns(RuntimeWarning) as caught:
            manager.load(state_of(0)) if load == "load" else manager.load_checkpoint()
    assert [warning.filename for warning in caught] == [__file__]


def test_the_warning_names_file_tensor_and_bytes(tmp_path):
    with dt.CheckpointManager(tmp_path, chunk_bytes=CHUNK) as manager:
        for step in (1, 2):
            manager.save(state_of(step), step)
    size = data_file(tmp_path, 2).stat().st_size
    flip(data_file(tmp_path, 2), size - 1)
    with pytest.warns(RuntimeWarning) as caught:
        load_newest(LocalBackend(tmp_path))
    text = str(caught[0].message)
    assert "shard-00000-of-00001.safetensors" in text and f"{size})" in text and "tensor" in text


def test_a_damaged_step_asked_for_by_number_is_an_error(tmp_path):
    save(LocalBackend(tmp_path), 1)
    flip(data_file(tmp_path, 1), -1)
    state = state_of(0)
    with dt.CheckpointManager(tmp_path) as manager, pytest.raises(CorruptCheckpoint) as caught:
        manager.load(state, step=1, all_or_nothing=True)
    assert caught.value.damage and torch.equal(state["w"], state_of(0)["w"])


def test_when_nothing_sound_is_left_the_load_says_so(tmp_path):
    save(LocalBackend(tmp_path), 1)
    flip(data_file(tmp_path, 1), -1)
    state = state_of(0)
    with (
        dt.CheckpointManager(tmp_path) as manager,
        pytest.warns(RuntimeWarning),
        pytest.raises(CorruptCheckpoint),
    ):
        manager.load(state, all_or_nothing=True)
    assert torch.equal(state["w"], state_of(0)["w"])


def test_a_damaged_newest_step_is_saved_again(tmp_path):
    with dt.CheckpointManager(tmp_path, chunk_bytes=CHUNK) as manager:
        for step in (1, 2):
            manager.save(state_of(step), step)
    flip(data_file(tmp_path, 2), -1)
    with dt.CheckpointManager(tmp_path) as manager:
        with pytest.warns(RuntimeWarning):
            manager.load(state_of(0))
        assert manager.save(state_of(2), 2).generation == 2
    assert load_newest(LocalBackend(tmp_path)) == 2
