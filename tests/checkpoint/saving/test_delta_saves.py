"""Full and delta saves of several ranks in any sequence: each step loads bit for bit, and writes what changed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

import dtruntime_torch as dt
from dtruntime_torch.checkpoint import catalog
from dtruntime_torch.checkpoint.names import CommitKey
from dtruntime_torch.errors import InvalidArgument
from dtruntime_torch.storage import LocalBackend, MemoryBackend, run_sync
from dtruntime_torch.storage.backend import Data
from tests.checkpoint.saving.delta_ranks import (
    CHUNK,
    CHUNKS,
    check_step,
    copy_of,
    delta_ranks,
    make_states,
    save_all,
    touch,
)

HEADER = 64


@pytest.mark.parametrize("count", [1, 2, 4])
@settings(max_examples=12)
@given(data=st.data())
def test_any_sequence_of_full_and_delta_saves_loads_bit_for_bit(count, data):
    policy = dt.DeltaPolicy(
        max_changed=data.draw(st.sampled_from([0.1, 0.5, 1.0])),
        max_files=data.draw(st.integers(2, 4)),
        full_every=data.draw(st.sampled_from([None, 2, 3])),
    )
    backend, states = MemoryBackend(), make_states(count)
    ranks = delta_ranks(count, backend, delta=policy)
    held = {}
    for step in range(1, data.draw(st.integers(2, 6)) + 1):
        touch(
            states,
            step,
            data.draw(st.lists(st.integers(0, CHUNKS - 1), max_size=6)),
            data.draw(st.booleans()),
        )
        save_all(ranks, states, step)
        held[step] = copy_of(states)
    for step, expected in held.items():
        check_step(backend, expected, step)


def test_full_saves_between_deltas_open_with_stock_safetensors_and_dcp(tmp_path):
    states = make_states(2)
    ranks = delta_ranks(2, LocalBackend(tmp_path), delta=dt.DeltaPolicy(full_every=2))
    infos, held = [], []
    for step in range(1, 4):
        touch(states, step, own=True)
        infos.append(save_all(ranks, states, step))
        held.append(copy_of(states))
    assert [info.full for info in infos] == [True, False, True]
    for info, (zero, one) in [(infos[0], held[0]), (infos[2], held[2])]:
        folder = tmp_path / info.path
        with safe_open(folder / "shard-00000-of-00002.safetensors", "pt") as opened:
            assert torch.equal(opened.get_tensor("shared"), zero["shared"])
        target = {"shared": torch.zeros_like(zero["shared"]), "own1": torch.zeros_like(one["own1"])}
        dcp_load(target, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
        assert torch.equal(target["shared"], zero["shared"]) and torch.equal(target["own1"], one["own1"])
    assert sorted(path.name for path in (tmp_path / infos[1].path).iterdir()) == [
        "manifest.json",
        "shard-00000-of-00002.delta",
        "shard-00000-of-00002.json",
        "shard-00001-of-00002.delta",
        "shard-00001-of-00002.json",
    ]


def test_a_delta_says_what_it_wrote_and_whose_files_it_uses():
    backend, states = MemoryBackend(), make_states(2)
    ranks = delta_ranks(2, backend)
    first = save_all(ranks, states, 1)
    touch(states, 2, chunks=(3, 4, 9))
    second = save_all(ranks, states, 2)
    assert (first.full, second.full, second.nbytes) == (True, False, first.nbytes)
    assert second.written == HEADER + 3 * CHUNK
    manifest = read_manifest(backend, 2)
    assert manifest.parent == first.key
    assert manifest.uses == ("step-00000002/0001-1", "step-00000001/0001-1")
    assert [part.data_length for part in manifest.parts] == [second.written, 0]


def test_a_delta_uses_what_any_rank_uses():
    backend, states = MemoryBackend(), make_states(2)
    ranks = delta_ranks(2, backend)
    save_all(ranks, states, 1)
    states[1]["own1"][-1] = 7
    save_all(ranks, states, 2)
    touch(states, 3)
    save_all(ranks, states, 3)
    assert set(read_manifest(backend, 3).uses) == {f"step-{step:08}/0001-1" for step in (1, 2, 3)}
    check_step(backend, states, 3)


def read_manifest(backend, step):
    async def read():
        return await catalog.read_manifest(
            backend, await catalog.read_commit(backend, "model", CommitKey(1, step))
        )

    return run_sync(read())


def test_the_handle_says_what_changed_and_what_was_written():
    with dt.CheckpointManager(MemoryBackend(), delta=True, chunk_bytes=CHUNK) as manager:
        state = {"w": torch.zeros(10 * CHUNK, dtype=torch.uint8)}
        first = manager.save_async(state, 1)
        first.result()
        state["w"][5 * CHUNK] = 1
        second = manager.save_async(state, 2)
        assert second.result().written == second.metrics.written_bytes == HEADER + CHUNK
    assert first.metrics.changed_bytes == 10 * CHUNK < first.metrics.written_bytes
    assert second.metrics.changed_bytes == second.metrics.staged_bytes == CHUNK
    assert (first.metrics.skipped_chunks, second.metrics.skipped_chunks) == (0, 9)


def test_a_save_of_what_did_not_change_writes_no_data():
    backend, states = MemoryBackend(), make_states(2)
    ranks = delta_ranks(2, backend)
    save_all(ranks, states, 1)
    info = save_all(ranks, states, 2)
    assert info.written == 0 and not info.full
    check_step(backend, states, 2)


def test_without_a_policy_every_save_is_full():
    ranks, states = delta_ranks(2, MemoryBackend(), delta=None), make_states(2)
    assert [save_all(ranks, states, step).full for step in (1, 2, 3)] == [True, True, True]


def saves(ranks, states, steps, chunks=(0,)):
    """Which of the steps are full, when each changes the same chunks."""
    found = []
    for step in steps:
        touch(states, step, chunks)
        found.append(save_all(ranks, states, step).full)
    return found


def test_more_than_half_changed_makes_the_next_save_full_until_less_changes():
    ranks, states = delta_ranks(1, MemoryBackend(), delta=dt.DeltaPolicy()), make_states(1)
    assert 0.5 < states[0]["shared"].nbytes / sum(tensor.nbytes for tensor in states[0].values()) < 0.7
    assert saves(ranks, states, (1, 2, 3), chunks=range(CHUNKS)) == [True, False, True]
    # That full save found that much had changed again. The next one is full too, and finds that little had.
    assert saves(ranks, states, (4, 5, 6)) == [True, False, False]


def test_what_changed_is_counted_over_all_ranks():
    for max_changed, third in ((0.4, True), (0.5, False)):
        ranks = delta_ranks(2, MemoryBackend(), delta=dt.DeltaPolicy(max_changed=max_changed))
        # Most bytes of rank 0, none of rank 1: 47% of all.
        assert saves(ranks, make_states(2), (1, 2, 3), chunks=range(CHUNKS)) == [True, False, third]


def test_no_rank_reads_from_more_than_max_files():
    backend, states = MemoryBackend(), make_states(2)
    ranks = delta_ranks(2, backend, delta=dt.DeltaPolicy(max_files=3))
    full = []
    for step in range(1, 8):
        touch(states, step, chunks=(step,))
        full.append(save_all(ranks, states, step).full)
        manifest = read_manifest(backend, step)
        assert all(len(run_sync(catalog.read_part(backend, manifest, n)).files) <= 3 for n in (0, 1))
    assert full == [True, False, False, True, False, False, True]


def test_files_that_nothing_is_left_of_do_not_count():
    ranks, states = delta_ranks(1, MemoryBackend(), delta=dt.DeltaPolicy(max_files=3)), make_states(1)
    assert saves(ranks, states, range(1, 8)) == [True] + 6 * [False]


def test_one_in_full_every_saves_is_full():
    ranks, states = delta_ranks(2, MemoryBackend(), delta=dt.DeltaPolicy(full_every=3)), make_states(2)
    assert saves(ranks, states, range(1, 8)) == [True, False, False, True, False, False, True]


def test_another_structure_is_saved_in_full_and_deltas_go_on_from_there():
    backend, states = MemoryBackend(), make_states(2)
    ranks = delta_ranks(2, backend)
    assert saves(ranks, states, (1, 2)) == [True, False]
    states = [{**state, "more": torch.ones(2000)} for state in states]
    assert saves(ranks, states, (3, 4)) == [True, False]
    check_step(backend, states, 4)


class Counting(MemoryBackend):
    """Counts the bytes of data files that are written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = 0

    async def write(self, path: str, data: Data) -> None:
        await super().write(path, data)
        if path.endswith((".safetensors", ".delta")):
            self.written += await self.size(path)


@pytest.mark.parametrize("sizes", [(900, 700), (700, 900), (10, 20), (0, 700)], ids=str)
def test_what_is_a_rank_s_own_may_change_its_size_and_each_changed_byte_is_written_once(sizes):
    backend, states = Counting(), make_states(2)
    ranks = delta_ranks(2, backend)
    save_all(ranks, states, 1)
    touch(states, 2, chunks=(3,))
    changed = CHUNK
    for state, size in zip(states, sizes, strict=True):
        changed += state["seed"].element_size() * size if size != len(state["seed"]) else 0
        state["seed"] = torch.full((size,), 5) if size != len(state["seed"]) else state["seed"]
    before = backend.written
    info = save_all(ranks, states, 2)
    assert not info.full
    assert changed < backend.written - before <= changed + 2 * HEADER
    tries = run_sync(backend.list("model/step-00000002/", "/"))
    assert [entry.path for entry in tries] == ["model/step-00000002/0001-1/"]
    check_step(backend, states, 2)
    touch(states, 3, chunks=(4,))
    assert save_all(ranks, states, 3).written == CHUNK + HEADER
    check_step(backend, states, 3)


def test_bytes_that_grow_with_every_save_do_not_make_every_save_full():
    backend = Counting()
    with dt.CheckpointManager(backend, delta=True, chunk_bytes=CHUNK) as manager:
        weight = torch.zeros(40 * CHUNK, dtype=torch.uint8)
        for step in range(1, 5):
            state = {"w": weight, "log": b"x" * step * 100}
            before = backend.written
            assert manager.save(state, step).full == (step == 1)
            assert step == 1 or backend.written - before == HEADER + step * 100
            loaded = manager.load_checkpoint()
            assert isinstance(loaded, dict) and loaded["log"] == state["log"]
            assert torch.equal(loaded["w"], weight)


def test_the_first_save_after_a_load_is_full():
    backend, states = MemoryBackend(), make_states(1)
    with dt.CheckpointManager(backend, delta=True, chunk_bytes=CHUNK) as manager:
        assert [manager.save(states[0], step).full for step in (1, 2)] == [True, False]
        manager.load(states[0])
        assert [manager.save(states[0], step).full for step in (3, 4)] == [True, False]


def test_a_manager_takes_true_false_or_a_policy():
    with pytest.raises(InvalidArgument, match="delta"):
        dt.CheckpointManager(MemoryBackend(), delta=0.5)  # type: ignore[arg-type]


def written_beside_changed(change, state, chunk_bytes=CHUNK) -> tuple[int, int]:
    """Bytes that a save after `change` wrote, and of the chunks in which a byte differs."""
    backend = MemoryBackend()
    with dt.CheckpointManager(backend, delta=True, chunk_bytes=chunk_bytes) as manager:
        manager.save(state, 1)
        before = {name: tensor.clone() for name, tensor in state.items()}
        change()
        info = manager.save(state, 2)
        changed = 0
        for name, tensor in state.items():
            new, old = (one.contiguous().view(-1).view(torch.uint8) for one in (tensor, before[name]))
            for piece, other in zip(new.split(chunk_bytes), old.split(chunk_bytes), strict=True):
                changed += 0 if torch.equal(piece, other) else len(piece)
        found = manager.load_checkpoint()
        assert isinstance(found, dict) and all(torch.equal(found[name], state[name]) for name in state)
    return info.written, changed


def test_frozen_parameters_are_not_written_again():
    model = torch.nn.Sequential(torch.nn.Linear(300, 300), torch.nn.Linear(300, 30))
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)

    def train() -> None:
        model(torch.randn(4, 300)).square().mean().backward()
        optimizer.step()

    written, changed = written_beside_changed(train, model.state_dict())
    assert 0 < changed <= written <= 1.1 * changed
    assert written < 45_000 < model[0].weight.nbytes


def test_of_a_lora_model_the_adapters_are_written():
    base, down, up = torch.randn(400, 400), torch.randn(8, 400), torch.zeros(400, 8)

    def train() -> None:
        down.add_(0.01)
        up.add_(0.01)

    written, changed = written_beside_changed(train, {"base": base, "down": down, "up": up})
    assert changed == down.nbytes + up.nbytes and changed <= written <= 1.1 * changed


def test_of_an_embedding_the_touched_rows_are_written():
    table = torch.zeros(4000, 64)
    rows = torch.tensor([3, 700, 701, 3999])

    def train() -> None:
        table.index_add_(0, rows, torch.ones(4, 64))

    written, changed = written_beside_changed(train, {"table": table})
    assert 0 < changed <= 4 * CHUNK and changed <= written <= 1.1 * changed


def test_files_of_which_little_is_needed_bring_a_full_save(monkeypatch):
    """Half of the state changes at each save, and one more row: without a bound every old half stays for its row."""
    monkeypatch.setattr("dtruntime_torch.checkpoint.saving.delta.SMALL", 0)
    backend, rows = MemoryBackend(), 64
    state = {"hot": torch.zeros(rows, CHUNK // 4), "cold": torch.zeros(rows, CHUNK // 4)}
    nbytes, most = 2 * rows * CHUNK, 0
    policy = dt.DeltaPolicy(max_changed=0.6)
    with dt.CheckpointManager(backend, delta=policy, chunk_bytes=CHUNK, keep_last_n=1) as manager:
        for step in range(1, 31):
            state["hot"] += 1
            state["cold"][step] += 1
            manager.save(state, step)
            most = max(most, sum(entry.size for entry in run_sync(backend.list(""))))
    assert most < 4 * nbytes
