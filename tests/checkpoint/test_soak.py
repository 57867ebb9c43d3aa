"""Two hundred saves in a row: nothing grows, neither memory nor threads nor descriptors nor keys of the Store."""

from __future__ import annotations

import gc
import os
import threading
from dataclasses import dataclass

import pytest
import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]  # torch does not list it

import dtruntime_torch as dt
from dtruntime_torch.storage import LocalBackend, MemoryBackend
from tests.late_saves import copy_of, state_of

WARM, SAVES = 30, 230
STATE_BYTES, CHUNK = 1 << 20, 1 << 14


@dataclass(frozen=True)
class Held:
    """What a process holds."""

    threads: int
    descriptors: int
    keys: int
    objects: int
    resident: int


def held(store: HashStore) -> Held:
    gc.collect()
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    return Held(
        threading.active_count(),
        len(os.listdir("/proc/self/fd")),
        store.num_keys(),
        len(gc.get_objects()),
        pages * os.sysconf("SC_PAGE_SIZE"),
    )


def assert_no_more(after: Held, before: Held) -> None:
    assert after.threads <= before.threads
    assert after.descriptors <= before.descriptors
    assert after.keys <= before.keys
    # A reference that each save leaves would be two hundred, an image that it keeps two hundred MiB.
    assert after.objects <= before.objects + 60
    assert after.resident <= before.resident + 16 * STATE_BYTES


@pytest.mark.parametrize(
    ("local", "delta", "in_background", "keep"),
    [(False, False, False, 3), (True, True, True, 3), (True, True, False, None)],
    ids=["full", "deltas in the background", "deltas that all stay"],
)
def test_two_hundred_saves_in_a_row_hold_no_more_than_the_first(tmp_path, local, delta, in_background, keep):
    store, storage = HashStore(), LocalBackend(tmp_path) if local else MemoryBackend()
    state = {"w": torch.zeros(STATE_BYTES // 4), "step": 0}
    with dt.CheckpointManager(
        storage, chunk_bytes=CHUNK, delta=delta, keep_last_n=keep, store=store
    ) as manager:
        for step in range(SAVES):
            state["w"][step % 64 * CHUNK // 4] = step + 1
            state["step"] = step
            handle = manager.save_async(state, step)
            if not in_background:
                handle.result()
            if step == WARM:
                handle.result()
                before = held(store)
        handle.result()
        assert_no_more(held(store), before)
        steps = [info.step for info in manager.list()]
        assert steps == list(range(SAVES))[-keep if keep else None :]
        assert any(info.full for info in manager.list()) != (delta and keep is not None)
        assert manager.verify().ok


@pytest.mark.parametrize("delta", [False, True], ids=["full", "deltas"])
def test_two_hundred_saves_with_a_step_behind_each_call_are_whole_and_hold_no_more_than_the_first(delta):
    store = HashStore()
    model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.Linear(512, 64))
    # More than half of all bytes stay as they are.
    model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with dt.CheckpointManager(MemoryBackend(), chunk_bytes=CHUNK, delta=delta, store=store) as manager:
        manager.guard(optimizer)
        for step in range(SAVES):
            model(torch.randn(4, 256)).square().mean().backward()
            expected = copy_of(model.state_dict()) | state_of(model, optimizer) if step % 20 == 0 else {}
            handle = manager.save_async({"model": model, "optimizer": optimizer}, step)
            optimizer.step()
            optimizer.zero_grad()
            if expected:
                handle.result()
                saved = manager.load_checkpoint(step=step)
                found = copy_of(saved["model"]) | copy_of({"state": saved["optimizer"].get("state", {})})
                assert found.keys() == expected.keys()
                assert [key for key in found if not torch.equal(found[key], expected[key])] == []
            if step == WARM:
                handle.result()
                before = held(store)
        handle.result()
        assert_no_more(held(store), before)
        assert any(not info.full for info in manager.list()) == delta
