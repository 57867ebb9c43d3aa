"""A delta after anything that went wrong is right: what is written is decided by what is committed, never by the arena."""

from __future__ import annotations

import errno
import multiprocessing
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

import dtruntime_torch as dt
from dtruntime_torch.checkpoint import save
from dtruntime_torch.checkpoint.info import CheckpointInfo
from dtruntime_torch.checkpoint.manifest import Commit, encode_commit
from dtruntime_torch.checkpoint.saving import publish
from dtruntime_torch.checkpoint.specs import digest_length
from dtruntime_torch.checkpoint.verify import find_commit, verify
from dtruntime_torch.errors import (
    BarrierTimeout,
    CommitConflict,
    CommitUnknown,
    InvalidArgument,
    SaveFailed,
    StorageError,
)
from dtruntime_torch.storage import LocalBackend, MemoryBackend, run_sync
from dtruntime_torch.testing.faulty_backend import FaultyBackend, killed, lost_answer, not_done
from tests.checkpoint.saving.delta_ranks import (
    CHUNK,
    check_step,
    copy_of,
    delta_ranks,
    make_states,
    save_all,
    start_all,
    touch,
)
from tests.checkpoint.thread_ranks import together

COMMIT = "model/commits/0001-{:08}.json"


def no_space(backend, ranks):
    full = StorageError(errno.ENOSPC, "The disk is full")
    backend.when("write", "*/step-00000002/*.delta", not_done(full))
    return SaveFailed


def no_part(backend, ranks):
    backend.when("write", "*/step-00000002/*/shard-00001-of-00002.json", not_done())
    return SaveFailed


def no_manifest(backend, ranks):
    backend.when("write", "*/step-00000002/*/manifest.json", not_done())
    return SaveFailed


def declined_by_one(backend, ranks):
    take = ranks[1].saver._take

    def refuse(*args):
        ranks[1].saver._take = take
        raise InvalidArgument("not now")

    ranks[1].saver._take = refuse
    return (SaveFailed, InvalidArgument)


def declined_after_staging(backend, ranks):
    submit = ranks[1].saver._executor.submit

    def refuse(work, *args):
        if work is int:
            return submit(work, *args)
        ranks[1].saver._executor.submit = submit
        raise InvalidArgument("not now")

    ranks[1].saver._executor.submit = refuse
    return (SaveFailed, InvalidArgument)


def torn(backend, ranks):
    begin, stager = save.begin, ranks[1].saver._stager

    def tear(at, *args, **more):
        capture = begin(at, *args, **more)
        if at is stager:
            save.begin = begin
            capture.wait(60)
            raise SaveFailed("the state changed while it was copied")
        return capture

    save.begin = tear
    return SaveFailed


def unknown(backend, ranks):
    backend.when("create", COMMIT.format(2), not_done(), nth=None)
    return CommitUnknown


def unknown_but_done(backend, ranks):
    backend.when("create", COMMIT.format(2), lost_answer(), nth=1)
    backend.when("create", COMMIT.format(2), not_done(), nth=None)
    return CommitUnknown


def lost(backend, ranks):
    void = encode_commit(Commit("model", 1, 2, "", "", void=True))

    async def voided(call):
        await backend._inner.create(call.path, void)
        return await call.proceed()

    backend.when("create", COMMIT.format(2), voided)
    return CommitConflict


FAILURES = [
    no_space,
    no_part,
    no_manifest,
    declined_by_one,
    declined_after_staging,
    torn,
    unknown,
    unknown_but_done,
    lost,
]


def fail_step_two(fail):
    """Step 1 is saved; chunk 3 changes and step 2 fails; chunk 5 changes. What there is then."""
    backend, states = FaultyBackend(MemoryBackend()), make_states(2)
    ranks = delta_ranks(2, backend, timeout=0.6 if fail in (unknown, unknown_but_done) else 60)
    save_all(ranks, states, 1)
    expected = fail(backend, ranks)
    touch(states, 2, chunks=(3,), own=True)
    results = start_all(ranks, states, 2)
    assert all(isinstance(result, expected) for result in results), results
    touch(states, 3, chunks=(5,))
    return backend, ranks, states


@pytest.mark.parametrize("fail", FAILURES)
def test_a_delta_after_a_failed_save_has_what_changed_since_the_committed_one(fail):
    backend, ranks, states = fail_step_two(fail)
    info = save_all(ranks, states, 3)
    assert not info.full and info.written > 2 * CHUNK
    held = copy_of(states)
    touch(states, 4, chunks=(6,))
    after = save_all(ranks, states, 4)
    assert not after.full and after.written == 64 + CHUNK
    check_step(backend, held, 3)
    check_step(backend, states, 4)


@pytest.mark.parametrize("fail", FAILURES)
def test_with_one_table_the_same_save_is_wrong(fail, monkeypatch):
    """The test above tells something: a delta against the digests of what was staged last is damaged."""
    staged = {}
    make_delta = publish.make_delta

    def against_the_arena(base, layout, digests, header_length):
        table = staged.get(base.rank)
        staged[base.rank] = digests
        if table is not None:
            by_index, start = {}, 0
            for slot in layout.slots:
                stop = start + digest_length(slot.nbytes, base.chunk_bytes)
                by_index[slot.item.spec.index] = table[start:stop]
                start = stop
            entries = tuple(replace(entry, digests=by_index[entry.index]) for entry in base.tensors)
            base = replace(base, tensors=entries)
        return make_delta(base, layout, digests, header_length)

    monkeypatch.setattr(publish, "make_delta", against_the_arena)
    backend, ranks, states = fail_step_two(fail)
    save_all(ranks, states, 3)
    assert not run_sync(verify(backend, "model", run_sync(find_commit(backend, "model", 3)))).ok


def prune_step_one(backend, and_then=lambda: None):
    """When the delta of step 2 has written its manifest, its parent is gone."""

    async def pruned(call):
        await backend._inner.delete(COMMIT.format(1))
        and_then()
        return await call.proceed()

    backend.when("write", "*/step-00000002/0001-1/manifest.json", pruned)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_delta_whose_parent_was_pruned_is_saved_in_full_under_the_next_try(count):
    backend, states = FaultyBackend(MemoryBackend()), make_states(count)
    ranks = delta_ranks(count, backend)
    save_all(ranks, states, 1)
    prune_step_one(backend)
    touch(states, 2, chunks=(3,))
    info = save_all(ranks, states, 2)
    assert info.full and info.path.endswith("step-00000002/0001-2")
    check_step(backend, states, 2)
    touch(states, 3, chunks=(4,))
    assert not save_all(ranks, states, 3).full
    check_step(backend, states, 3)


def test_what_the_given_up_try_wrote_is_cleaned_up():
    backend, states = FaultyBackend(MemoryBackend()), make_states(2)
    ranks = delta_ranks(2, backend)
    save_all(ranks, states, 1)
    prune_step_one(backend)
    touch(states, 2, chunks=(3,))
    save_all(ranks, states, 2)
    assert not run_sync(backend.list("model/step-00000002/0001-1/"))


def test_memory_that_changed_in_the_arena_fails_the_full_save_and_the_next_one_is_good():
    backend, states = FaultyBackend(MemoryBackend()), make_states(2)
    ranks = delta_ranks(2, backend)
    save_all(ranks, states, 1)

    def flip():
        saver = ranks[0].saver
        (slot,) = [slot for slot in saver._structures.known.layout.slots if slot.item.spec.fqn == "shared"]
        memoryview(saver._stager.arena)[slot.offset + 9 * CHUNK] ^= 1

    prune_step_one(backend, flip)
    touch(states, 2, chunks=(3,))
    results = start_all(ranks, states, 2)
    assert all(isinstance(result, SaveFailed) and "'shared'" in str(result) for result in results), results
    save_all(ranks, states, 3)
    check_step(backend, states, 3)


@pytest.mark.parametrize("deaf", [1, 2])
def test_ranks_that_know_different_parents_save_in_full_together(deaf):
    """One rank never hears that step 2 is committed: its delta would be against step 1."""
    backend, states = MemoryBackend(), make_states(3)
    ranks = delta_ranks(3, backend)
    save_all(ranks, states, 1)
    barrier = ranks[deaf].members.barrier
    meet = barrier.meet

    def unheard(*args):
        barrier.meet = meet
        meet(*args)
        raise BarrierTimeout("rank 0 did not say how it went", [0])

    barrier.meet = unheard
    touch(states, 2, chunks=(3,))
    results = start_all(ranks, states, 2)
    assert isinstance(results[deaf], BarrierTimeout) and isinstance(results[0], CheckpointInfo)
    touch(states, 3, chunks=(4,), own=True)
    info = save_all(ranks, states, 3)
    assert info.full and info.path.endswith("step-00000003/0001-2")
    check_step(backend, states, 3)
    touch(states, 4, chunks=(5,))
    assert not save_all(ranks, states, 4).full
    check_step(backend, states, 4)


@pytest.mark.parametrize("odd", [0, 1])
def test_a_rank_without_a_parent_makes_all_save_in_full(odd):
    backend, states = MemoryBackend(), make_states(2)
    ranks = delta_ranks(2, backend)
    save_all(ranks, states, 1)
    ranks[odd].lineage.base = None
    touch(states, 2, chunks=(3,))
    assert save_all(ranks, states, 2).full
    check_step(backend, states, 2)


def test_another_job_that_takes_over_between_two_tries_is_a_conflict():
    backend, states = FaultyBackend(MemoryBackend()), make_states(2)
    ranks = delta_ranks(2, backend)
    save_all(ranks, states, 1)
    taken = []

    def take_over():
        with dt.CheckpointManager(backend._inner, keep_last_n=None) as manager:
            taken.append(manager.save({"w": torch.zeros(3)}, 10))

    prune_step_one(backend, and_then=partial(together, take_over))
    touch(states, 2, chunks=(3,))
    results = start_all(ranks, states, 2)
    assert taken[0].generation == 2
    assert all(isinstance(result, CommitConflict) for result in results), results


def test_a_disk_that_was_full_gets_the_right_delta_once_there_is_room(mount):
    disk = mount("size=4m")
    state = {"w": torch.zeros(1 << 20, dtype=torch.uint8)}
    with delta_manager(disk / "checkpoints") as manager:
        manager.save(state, 1)
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(shutil.disk_usage(disk).free - 20 * CHUNK))
        state["w"][: 100 * CHUNK] = 2
        with pytest.raises(SaveFailed, match="The disk is full"):
            manager.save(state, 2)
        ballast.unlink()
        state["w"][-1] = 3
        info = manager.save(state, 3)
        assert not info.full and info.written == 64 + 101 * CHUNK
        found = manager.load_checkpoint()
    assert isinstance(found, dict) and torch.equal(found["w"], state["w"])


def delta_manager(backend):
    return dt.CheckpointManager(
        backend, delta=dt.DeltaPolicy(max_changed=1.0), chunk_bytes=CHUNK, keep_last_n=1
    )


def state_of(step: int) -> dict[str, torch.Tensor]:
    state = {"w": torch.zeros(8 * CHUNK, dtype=torch.uint8), "b": torch.arange(3)}
    state["w"][step * CHUNK] = step
    return state


def save_two_steps(backend: FaultyBackend, nth: int | None) -> list[tuple[str, str]]:
    """Step 1 in full, then step 2 as a delta, of which a call may be the last. Returns its calls."""
    with delta_manager(backend) as manager:
        manager.save(state_of(1), 1)
        before = len(backend.calls)
        if nth is not None:
            backend.when("*", "*", killed(), nth=nth)
        assert not manager.save(state_of(2), 2).full
    return backend.calls[before:]


CALLS = save_two_steps(FaultyBackend(MemoryBackend()), None)
COMMITTED = next(n for n, call in enumerate(CALLS, 1) if call == ("create", COMMIT.format(2)))


@pytest.mark.parametrize("nth", range(1, len(CALLS) + 1), ids=lambda n: f"{n}-{CALLS[n - 1][0]}")
def test_a_kill_before_any_call_of_a_delta_loses_nothing_committed(tmp_path: Path, nth: int) -> None:
    backend = LocalBackend(tmp_path)
    child = multiprocessing.get_context("fork").Process(
        target=save_two_steps, args=(FaultyBackend(backend), nth)
    )
    child.start()
    child.join(60)
    assert child.exitcode == 137
    with delta_manager(backend) as manager:
        state = state_of(0)
        step = manager.load(state).step
        assert step == (1 if nth <= COMMITTED else 2)
        assert all(torch.equal(state[name], tensor) for name, tensor in state_of(step).items())
        for step in (3, 4):
            manager.save(state_of(step), step)
            assert manager.verify(step).ok
        found = manager.load_checkpoint(step=4)
    assert isinstance(found, dict) and torch.equal(found["w"], state_of(4)["w"])
