"""The step of a save that makes the image of the data file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from dtruntime_torch import _C
from dtruntime_torch.checkpoint.saving.handle import SaveMetrics
from dtruntime_torch.checkpoint.saving.layout import Layout, make_layout
from dtruntime_torch.checkpoint.specs import SavePlan, TensorSpec, WriteItem
from dtruntime_torch.checkpoint.staging.capture import Patience
from dtruntime_torch.checkpoint.staging.stager import Stager
from dtruntime_torch.checkpoint.staging.staging import begin, make_room
from dtruntime_torch.errors import BarrierTimeout
from tests.checkpoint.patient_job import PatientJob
from tests.checkpoint.staging.late_device import LateDevice
from tests.checkpoint.staging.scattered_tensors import digests_of

CHUNK = 64
TENSORS = {
    "bias": torch.arange(7, dtype=torch.int16),
    "weight": torch.arange(60, dtype=torch.float32).view(6, 10),
    "turned": torch.arange(12, dtype=torch.float64).view(3, 4).T,
    "empty": torch.empty(0, 4),
}


def layout_of(tensors: dict[str, torch.Tensor]) -> Layout:
    def spec(index: int, fqn: str, tensor: torch.Tensor) -> TensorSpec:
        shape = tuple(tensor.shape)
        return TensorSpec(
            fqn, (), index, str(tensor.dtype).removeprefix("torch."), shape, (0,) * len(shape), shape
        )

    specs = [spec(index, fqn, tensor) for index, (fqn, tensor) in enumerate(tensors.items())]
    return make_layout(SavePlan(0, 1, tuple(WriteItem(spec, spec.fqn) for spec in specs), (), ()))


def stage(
    stager: Stager,
    layout: Layout,
    tensors: dict[str, torch.Tensor],
    timeout: float | None = None,
    only_changed: bool = False,
) -> bytes:
    patience = Patience(seconds=0)
    capture = begin(stager, layout, tensors, None, patience, SaveMetrics(), only_changed)
    return capture.wait(timeout, help=True)


def test_stock_safetensors_reads_the_arena():
    layout = layout_of(TENSORS)
    arena = _C.Arena(layout.length)
    stage(Stager(arena, CHUNK), layout, TENSORS)
    found = load(bytes(memoryview(arena)))
    assert found.keys() == TENSORS.keys()
    for fqn, tensor in TENSORS.items():
        assert torch.equal(found[fqn], tensor) and found[fqn].dtype == tensor.dtype


def test_digests_are_in_the_order_of_the_file():
    layout = layout_of(TENSORS)
    arena = _C.Arena(layout.length)
    digests = stage(Stager(arena, CHUNK), layout, TENSORS)
    image = bytes(memoryview(arena))
    assert [slot.item.name for slot in layout.slots] == ["turned", "weight", "empty", "bias"]
    assert digests == b"".join(
        digests_of(image[slot.offset : slot.offset + slot.nbytes], CHUNK) for slot in layout.slots
    )


def test_after_a_failure_the_arena_may_be_used_again():
    tensors = {"weight": torch.arange(60, dtype=torch.float32)}
    layout, device = layout_of(tensors), LateDevice()
    device.hold(tensors["weight"])
    stager = Stager(_C.Arena(layout.length), CHUNK, find_device=device.find)
    device.refuse = 0
    with pytest.raises(RuntimeError, match="^weight could not be copied"):
        stage(stager, layout, tensors)
    device.refuse = None
    stage(stager, layout, tensors)
    assert torch.equal(load(bytes(memoryview(stager.arena)))["weight"], tensors["weight"])


def test_after_a_timeout_the_arena_may_be_used_again(monkeypatch):
    tensors = {"weight": torch.arange(60, dtype=torch.float32)}
    layout = layout_of(tensors)
    stager = Stager(_C.Arena(layout.length), CHUNK)
    with monkeypatch.context() as patch:
        patch.setattr(_C, "CopyJob", PatientJob)
        with pytest.raises(BarrierTimeout, match="0 of 240 bytes"):
            stage(stager, layout, tensors, timeout=3)
    stage(stager, layout, tensors)
    assert torch.equal(load(bytes(memoryview(stager.arena)))["weight"], tensors["weight"])


def test_a_device_that_does_not_answer_is_given_up():
    tensors = {"weight": torch.arange(60, dtype=torch.float32)}
    layout, device = layout_of(tensors), LateDevice()
    device.hold(tensors["weight"])
    with pytest.raises(BarrierTimeout, match="0 of 240 bytes"):
        stage(Stager(_C.Arena(layout.length), CHUNK, find_device=device.find), layout, tensors, timeout=0)


def test_a_save_of_what_changed_makes_the_same_image_and_digests():
    tensors = {fqn: tensor.clone() for fqn, tensor in TENSORS.items()}
    layout = layout_of(tensors)
    stager, other = (Stager(_C.Arena(layout.length), CHUNK) for _ in range(2))
    stage(stager, layout, tensors)
    tensors["weight"][3, 3] = -1
    digests = stage(stager, layout, tensors, only_changed=True)
    assert digests == stage(other, layout, tensors)
    assert bytes(memoryview(stager.arena)) == bytes(memoryview(other.arena))
    assert stager.last is not None and other.last is not None
    assert (stager.last.nbytes_copied, stager.last.chunks_skipped) == (64 + 96, 4)
    assert (other.last.nbytes_copied, other.last.chunks_skipped) == (other.last.nbytes, 0)


def test_room_is_made_in_the_same_arena():
    arena = make_room(_C.Arena(0), 1 << 20)
    address = arena.address
    assert make_room(arena, (1 << 20) - 5) is arena
    assert arena.nbytes == (1 << 20) - 5 and arena.address == address


def test_room_is_made_anew_while_somebody_looks_at_the_old():
    arena = make_room(_C.Arena(0), 100)
    view = memoryview(arena)
    view[:3] = b"abc"
    other = make_room(arena, 200)
    memoryview(other)[:] = bytes(200)
    assert other is not arena and bytes(view[:3]) == b"abc"


def mapping_of(arena: _C.Arena) -> dict[str, str]:
    """What /proc/self/smaps says of the mapping that the arena starts in."""
    blocks = re.split(
        r"^([0-9a-f]+)-([0-9a-f]+) .*$", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE
    )
    for start, stop, fields in zip(blocks[1::3], blocks[2::3], blocks[3::3], strict=True):
        if int(start, 16) <= arena.address < int(stop, 16):
            return dict(line.split(":", 1) for line in fields.strip().splitlines())
    raise AssertionError("the arena is not mapped")


@pytest.fixture
def uses_cuda(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)


unpinnable = pytest.mark.skipif(_C.Arena(1, pin=True).pinned, reason="memory can be pinned here")


@unpinnable
def test_room_that_cannot_be_pinned_is_there_and_a_warning_says_why(uses_cuda, caplog):
    arena = make_room(_C.Arena(0), 100)
    memoryview(arena)[99] = 1
    [record] = caplog.records
    assert (record.levelname, record.name) == ("WARNING", "dtruntime_torch.checkpoint.staging.staging")
    assert "staging memory is not pinned" in record.message and str(arena.pin_refusal) in record.message
    assert _C.build_info()["cuda"] is not False or "built without CUDA" in record.message


@unpinnable
def test_room_that_could_not_be_pinned_is_kept_and_warned_of_once(uses_cuda, caplog):
    arena = make_room(_C.Arena(0), 100)
    for nbytes in (100, 90, 1 << 20):
        assert make_room(arena, nbytes) is arena
    assert len(caplog.records) == 1


class DeviceArena:
    """An arena beside a device that pins no more than 1000 bytes, and may be stuck."""

    stuck = False

    def __init__(self, nbytes: int, *, pin: bool, dont_fork: bool) -> None:
        assert pin and dont_fork
        self.resize(nbytes)

    def resize(self, nbytes: int) -> None:
        if self.stuck:
            raise RuntimeError("unpinning memory: it is stuck")
        self.nbytes = nbytes
        self.pinned = nbytes <= 1000
        self.pin_refusal = None if self.pinned else f"pinning {nbytes} bytes: too many"

    def populate(self) -> None:
        pass


def test_a_warning_comes_when_room_that_was_pinned_grows_too_large_for_it(uses_cuda, monkeypatch, caplog):
    monkeypatch.setattr(_C, "Arena", DeviceArena)
    arena = make_room(DeviceArena(0, pin=True, dont_fork=True), 1000)
    assert caplog.records == []
    for nbytes in (1001, 1002):
        assert make_room(arena, nbytes) is arena
    assert [record.message.rpartition(": pinning ")[2] for record in caplog.records] == [
        "1001 bytes: too many"
    ]


def test_room_is_made_anew_where_the_device_cannot_unpin_the_old(uses_cuda, monkeypatch, caplog):
    monkeypatch.setattr(_C, "Arena", DeviceArena)
    arena = make_room(DeviceArena(0, pin=True, dont_fork=True), 10)
    arena.stuck = True
    assert make_room(arena, 1000).nbytes == 1000
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "it is stuck" in caplog.text


def test_room_is_made_anew_once_the_process_uses_cuda(monkeypatch, caplog):
    arena = make_room(_C.Arena(0), 100)
    assert caplog.records == []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    asked = make_room(arena, 100)
    assert asked is not arena and (asked.pinned or asked.pin_refusal)


def test_the_pages_of_room_are_there_before_they_are_written():
    arena = make_room(_C.Arena(0), 8 << 20)
    assert int(mapping_of(arena)["Rss"].split()[0]) >= 8 << 10


def test_room_is_not_there_in_a_forked_child():
    assert "dc" in mapping_of(make_room(_C.Arena(0), 8 << 20))["VmFlags"].split()
