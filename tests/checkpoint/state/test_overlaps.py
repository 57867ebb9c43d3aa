"""Views of one buffer as targets of a load: filled where what they share agrees, refused before anything is changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dtruntime_torch as dt
from dtruntime_torch.checkpoint.state.overlaps import Fill, check_fills
from dtruntime_torch.errors import InvalidArgument


def views(kind: str, base: torch.Tensor) -> dict[str, torch.Tensor]:
    """Two views of a matrix of six rows and four columns."""
    return {
        "shifted": {"a": base.view(-1)[:10], "b": base.view(-1)[8:]},
        "one in the other": {"a": base, "b": base[2:4]},
        "transposed": {"a": base, "b": base.t()},
        "as other bits": {"a": base, "b": base.view(torch.int32)[1]},
        "crossing": {"a": base[:, 1:3], "b": base[2:4, :2]},
        "conjugated": {"a": base, "b": base.view(torch.complex64).conj()},
        "negated": {"a": base, "b": base.view(torch.complex64).conj().imag},
        "columns": {"a": base[:, :2], "b": base[:, 2:]},
        "every second": {"a": base.view(-1)[::2], "b": base.view(-1)[1::2]},
        "side by side": {"a": base[:3], "b": base[3:]},
    }[kind]


SHARING = ["shifted", "one in the other", "transposed", "as other bits", "crossing", "conjugated", "negated"]
APART = ["columns", "every second", "side by side"]


@pytest.mark.parametrize("kind", SHARING + APART)
def test_views_come_back_as_they_were_saved(tmp_path, kind):
    saved, target = torch.randn(6, 4), torch.zeros(6, 4)
    with dt.CheckpointManager(tmp_path) as manager:
        manager.save({"v": views(kind, saved)}, 1)
        state = {"v": views(kind, target)}
        manager.load(state)
    for name, view in views(kind, saved).items():
        assert torch.equal(views(kind, target)[name], view)


def loaded_from_others(
    tmp_path: Any, kind: str, module: bool
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    saved = {name: torch.randn(6, 4) for name in ("a", "b")}
    values = {name: views(kind, base)[name] for name, base in saved.items()}
    target = torch.zeros(6, 4)
    into: Any = views(kind, target)
    if module:
        into = torch.nn.Module()
        for name, view in views(kind, target).items():
            into.register_buffer(name, view)
    with dt.CheckpointManager(tmp_path) as manager:
        manager.save({"v": values}, 1)
        manager.load({"v": into})
    return target, values


@pytest.mark.parametrize("module", [False, True], ids=["dict", "module"])
@pytest.mark.parametrize("kind", APART)
def test_views_that_share_nothing_take_any_values(tmp_path, kind, module):
    target, values = loaded_from_others(tmp_path, kind, module)
    assert all(torch.equal(views(kind, target)[name], value) for name, value in values.items())


@pytest.mark.parametrize("module", [False, True], ids=["dict", "module"])
@pytest.mark.parametrize("kind", SHARING)
def test_views_that_share_memory_and_were_saved_apart_are_refused(tmp_path, kind, module):
    with pytest.raises(InvalidArgument, match=r"v\.[ab] shares memory with v\.[ab] in the state"):
        loaded_from_others(tmp_path, kind, module)


def test_a_refused_load_changes_nothing(tmp_path):
    target = torch.zeros(10)
    with dt.CheckpointManager(tmp_path) as manager:
        manager.save({"a": torch.ones(6), "b": torch.full((6,), 2.0)}, 1)
        with pytest.raises(InvalidArgument):
            manager.load({"a": target[:6], "b": target[4:]})
    assert not target.any()


def test_tensors_that_stand_alone_are_not_tried_out(monkeypatch):
    monkeypatch.setattr("dtruntime_torch.checkpoint.state.overlaps._try_out", None)
    base = torch.zeros(8)
    nothing_is_asked_for: dict[str, torch.Tensor] = {}
    fills = [Fill("a", base[4:]), Fill("b", base[:4]), Fill("c", torch.zeros(0))]
    check_fills(fills, nothing_is_asked_for)


def windows(base: torch.Tensor) -> torch.Tensor:
    """Of four elements each, every one of which begins at the next element."""
    return base.as_strided((4, 4), (1, 1))


def test_a_view_that_overlaps_itself_is_filled_where_the_values_agree():
    saved, target = torch.randn(7), torch.zeros(7)
    with dt.CheckpointManager(dt.MemoryBackend()) as manager:
        manager.save({"w": windows(saved)}, 1)
        manager.load({"w": windows(target)})
        assert torch.equal(target, saved)
        manager.save({"w": torch.randn(4, 4)}, 2)
        with pytest.raises(InvalidArgument, match="w shares memory with itself in the state"):
            manager.load({"w": windows(target)})
    assert torch.equal(target, saved)


CONJUGATES = [lambda base: base.conj(), torch._neg_view]


@pytest.mark.parametrize("other", CONJUGATES, ids=["conj", "neg"])
def test_a_tensor_and_its_conjugate_view_come_back_as_they_were_saved(other):
    saved, target = torch.randn(5, dtype=torch.complex64), torch.zeros(5, dtype=torch.complex64)
    with dt.CheckpointManager(dt.MemoryBackend()) as manager:
        manager.save({"a": saved, "b": other(saved)}, 1)
        manager.load({"a": target, "b": other(target)})
    assert torch.equal(target, saved)


@pytest.mark.parametrize("other", CONJUGATES, ids=["conj", "neg"])
def test_equal_values_do_not_fill_a_tensor_and_its_conjugate_view(other):
    saved, target = torch.randn(5, dtype=torch.complex64), torch.zeros(5, dtype=torch.complex64)
    with dt.CheckpointManager(dt.MemoryBackend()) as manager:
        manager.save({"a": saved, "b": saved.clone()}, 1)
        with pytest.raises(InvalidArgument, match="a shares memory with b"):
            manager.load({"a": target, "b": other(target)})
    assert not target.any()
