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
        after = held(store)
        assert after.threads <= before.threads
        assert after.descriptors <= before.descriptors
        assert after.keys <= before.keys
        # A reference that each save leaves would be two hundred, an image that it keeps two hundred MiB.
        assert after.objects <= before.objects + 60
        assert after.resident <= before.resident + 16 * STATE_BYTES
        steps = [info.step for info in manager.list()]
        assert steps == list(range(SAVES))[-keep if keep else None :]
        assert any(info.full for info in manager.list()) != (delta and keep is not None)
        assert manager.verify().ok
