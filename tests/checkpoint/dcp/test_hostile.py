"""A pickle in a checkpoint's files, wherever it could lie, is refused and never run."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.planner import WriteItemType

from dtruntime_torch.checkpoint.dcp import payloads
from dtruntime_torch.checkpoint.dcp.sealed import encode_sealed
from dtruntime_torch.checkpoint.manifest import decode_manifest
from dtruntime_torch.errors import CorruptCheckpoint, UnsupportedType
from tests.checkpoint.dcp.calls import State, load, load_whole, refused, refused_to_read, save

PART = "shard-00000-of-00001.json"
DATA = "shard-00000-of-00001.safetensors"


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.place),)


@pytest.fixture
def trap(tmp_path: Path) -> Trap:
    return Trap(tmp_path / "sprung")


def forms(trap: Trap) -> dict[str, bytes]:
    """How a pickle may come along."""
    saved, legacy = io.BytesIO(), io.BytesIO()
    torch.save(trap, saved)
    torch.save(trap, legacy, _use_new_zipfile_serialization=False)
    return {
        "torch.save": saved.getvalue(),
        "legacy torch.save": legacy.getvalue(),
        "pickle": pickle.dumps(trap),
        "text pickle": pickle.dumps(trap, protocol=0),
    }


FORMS = ["torch.save", "legacy torch.save", "pickle", "text pickle"]


class RawPlanner(DefaultSavePlanner):
    """Hands over bytes of its own for what is no tensor."""

    def __init__(self, raw: bytes) -> None:
        super().__init__()
        self.raw = raw

    def transform_object(self, write_item, object):
        return io.BytesIO(self.raw) if write_item.type == WriteItemType.BYTE_IO else object


class RawLoadPlanner(DefaultLoadPlanner):
    """Takes the bytes as they are."""

    def load_bytes(self, read_item, value):
        self.state_dict[read_item.dest_index.fqn] = value.getvalue()
        self.original_state_dict[read_item.dest_index.fqn] = value.getvalue()


def state() -> State:
    return {"w": torch.ones(3), "x": 1}


def forge(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the part manifest, and everything that vouches for it."""
    part = json.loads((folder / PART).read_bytes())
    change(part)
    data = json.dumps(part, sort_keys=True, separators=(",", ":")).encode()
    (folder / PART).write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest["parts"][0] |= {"length": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    record = decode_manifest(json.dumps(manifest).encode(), "manifest.json")
    (folder / "manifest.json").write_bytes(encode_sealed(record))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["manifest.json", PART, DATA])
def test_a_pickle_in_place_of_a_file(tmp_path: Path, trap: Trap, form: str, name: str) -> None:
    save(state(), tmp_path / "one")
    (tmp_path / "one" / name).write_bytes(forms(trap)[form])
    with refused(CorruptCheckpoint) if name == DATA else refused_to_read("manifest.json|shard-"):
        load({"w": torch.zeros(3), "x": 0}, tmp_path / "one")
    assert not trap.place.exists()


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "__0.metadata", "rank-00000.manifest.json"])
def test_a_pickle_where_stock_has_its_own(tmp_path: Path, trap: Trap, name: str) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / name).write_bytes(pickle.dumps(trap))
    with refused_to_read("FileSystemReader, if you trust" if name == ".metadata" else "no checkpoint"):
        load({"w": torch.zeros(3)}, tmp_path / "one")
    assert not trap.place.exists()


@pytest.mark.parametrize("form", FORMS)
def test_a_pickle_as_the_value_of_an_object_is_a_value(tmp_path: Path, trap: Trap, form: str) -> None:
    save({"x": forms(trap)[form]}, tmp_path / "one")
    assert load({"x": None}, tmp_path / "one")["x"] == forms(trap)[form]
    assert not trap.place.exists()


@pytest.mark.parametrize("tag", ["pickle", "builtins.eval", "torch.save", "os.mkdir"])
def test_a_forged_object_of_an_unknown_kind_is_refused(tmp_path: Path, trap: Trap, tag: str) -> None:
    save(state(), tmp_path / "one")

    def change(part: dict[str, Any]) -> None:
        part["objects"][0]["value"] = {"~": tag, "v": str(trap.place)}

    forge(tmp_path / "one", change)
    with refused(CorruptCheckpoint, "there is no type"):
        load({"x": 0}, tmp_path / "one")
    assert not trap.place.exists()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("planner", [DefaultLoadPlanner, RawLoadPlanner])
def test_a_forged_pickle_in_the_data_reaches_no_planner(
    tmp_path: Path, trap: Trap, form: str, planner
) -> None:
    """The tensor `x` holds a pickle, and the part says that it is bytes of a planner's own."""
    raw = np.frombuffer(forms(trap)[form], np.uint8)
    save({"x": torch.from_numpy(raw.copy())}, tmp_path / "one")

    def change(part: dict[str, Any]) -> None:
        part["tensors"][0]["is_bytes"] = True

    forge(tmp_path / "one", change)
    if planner is RawLoadPlanner and form == "text pickle":
        # No mark tells it from other text; this planner does not unpickle it.
        assert load({"x": None}, tmp_path / "one", planner=planner())["x"] == raw.tobytes()
    else:
        with refused(CorruptCheckpoint, "would unpickle"):
            load({"x": None}, tmp_path / "one", planner=planner())
        if planner is DefaultLoadPlanner:
            with pytest.raises(BaseException, match="would unpickle"):
                load_whole(tmp_path / "one")
    assert not trap.place.exists()


class TrustingLoadPlanner(DefaultLoadPlanner):
    """Looks at the bytes, and has torch read them."""

    def load_bytes(self, read_item, value):
        assert value.getvalue()
        super().load_bytes(read_item, value)


@pytest.mark.parametrize("form", FORMS)
def test_a_pickle_that_is_not_known_for_one_is_not_run_by_a_planner_that_trusts_torch(
    tmp_path: Path, trap: Trap, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for look in ("_is_torch_file", "_is_pickle"):
        monkeypatch.setattr(payloads, look, lambda data: False)
    save({"x": 1}, tmp_path / "one", planner=RawPlanner(forms(trap)[form]))
    with pytest.raises(CheckpointException):
        load({"x": None}, tmp_path / "one", planner=TrustingLoadPlanner())
    assert not trap.place.exists()


def test_what_a_planner_gets_was_made_here(tmp_path: Path) -> None:
    """Nothing of its bytes lies on storage."""
    given: list[bytes] = []

    class Watching(DefaultLoadPlanner):
        def load_bytes(self, read_item, value):
            given.append(value.getvalue())
            super().load_bytes(read_item, value)

    save({"x": {"deep": [1, "two"]}}, tmp_path)
    assert load({"x": {"deep": None}}, tmp_path, planner=Watching())["x"] == {"deep": [1, "two"]}
    stored = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert len(given) == 1 and given[0][:4] == b"PK\x03\x04" and b"PK\x03\x04" not in stored


class Custom:
    """Of which nobody knows how to store it."""


def test_an_object_that_needs_a_pickle_is_refused_by_name_before_anything_is_written(tmp_path: Path) -> None:
    with refused(UnsupportedType, "model.thing.*Custom.*register_codec"):
        save({"model": {"thing": Custom(), "w": torch.ones(2)}}, tmp_path / "one")
    assert not (tmp_path / "one").exists()


def test_a_trap_in_the_state_itself_is_not_sprung_by_saving_it(tmp_path: Path, trap: Trap) -> None:
    with refused(UnsupportedType, "x: it needs .*mkdir"):
        save({"x": trap}, tmp_path / "one")
    assert not trap.place.exists()


def test_a_tensor_in_a_tuple_is_refused_by_name(tmp_path: Path) -> None:
    with refused(UnsupportedType, r"x\[0\]: a tensor in .* put it in a dict or a list"):
        save({"x": (torch.ones(2), 3)}, tmp_path / "one")


def test_a_tensor_that_a_planner_does_not_take_apart_is_refused_by_name(tmp_path: Path) -> None:
    planner = DefaultSavePlanner(flatten_state_dict=False)
    with refused(UnsupportedType, r"x\['a'\]\[1\]: a tensor in .* let the planner flatten"):
        save({"x": {"a": [1, torch.ones(2)]}}, tmp_path / "one", planner=planner)


@pytest.mark.parametrize(
    "raw", [b"my own format", b"", b"PK\x03\x04 no zip", b"\x80\x04 no pickle", bytes(300)]
)
def test_bytes_of_a_planner_of_ones_own_come_back_as_they_were(tmp_path: Path, raw: bytes) -> None:
    save({"x": 1}, tmp_path / "one", planner=RawPlanner(raw))
    assert load({"x": None}, tmp_path / "one", planner=RawLoadPlanner())["x"] == raw


def test_bytes_of_another_zip_come_back_as_they_were(tmp_path: Path) -> None:
    stream = io.BytesIO()
    np.savez(stream, a=np.arange(3))
    save({"x": 1}, tmp_path / "one", planner=RawPlanner(stream.getvalue()))
    assert load({"x": None}, tmp_path / "one", planner=RawLoadPlanner())["x"] == stream.getvalue()


def test_a_default_planner_does_not_get_bytes_that_it_would_unpickle(tmp_path: Path) -> None:
    save({"x": 1}, tmp_path / "one", planner=RawPlanner(b"my own format"))
    with refused(CorruptCheckpoint, "overrides load_bytes"):
        load({"x": None}, tmp_path / "one")


def test_a_pickle_of_a_planner_of_ones_own_is_refused(tmp_path: Path) -> None:
    with refused(UnsupportedType, "x: the planner made a pickle"):
        save({"x": 1}, tmp_path / "one", planner=RawPlanner(pickle.dumps([1, 2])))


def test_a_legacy_file_of_torch_save_is_taken_apart_too(tmp_path: Path) -> None:
    stream = io.BytesIO()
    torch.save([1, 2], stream, _use_new_zipfile_serialization=False)
    save({"x": 1}, tmp_path / "one", planner=RawPlanner(stream.getvalue()))
    assert load({"x": None}, tmp_path / "one")["x"] == [1, 2]
