"""Who comes after whom: generations, claimed one after the other, and refused to who would overtake another."""

from __future__ import annotations

import asyncio
import os
import socket

import pytest

from dtruntime_torch.checkpoint import catalog
from dtruntime_torch.checkpoint.commit import check_not_replaced, claim_generation, commit
from dtruntime_torch.checkpoint.manifest import decode_generation
from dtruntime_torch.checkpoint.names import CommitKey
from dtruntime_torch.errors import CommitConflict, StorageError
from dtruntime_torch.storage import run_sync
from dtruntime_torch.testing.faulty_backend import (
    Call,
    FaultyBackend,
    hidden,
    lost_answer,
    not_done,
)
from tests.checkpoint.commits import (
    COMMIT,
    MANIFEST,
    NAME,
    also,
    claimed_by,
    creates,
    generation_path,
    manifest_of,
    run_id,
    void,
)


def claim_now(backend, time, number=1, seen=None, loaded=False, step=100, seconds=60.0):
    return run_sync(
        claim_generation(backend, NAME, run_id(number), seen, loaded, step, time.patience(seconds))
    )


def test_generations_are_claimed_in_order(backend, time):
    assert [claim_now(backend, time, number) for number in (1, 2, 3)] == [1, 2, 3]
    assert run_sync(catalog.generations(backend, NAME)) == [1, 2, 3]


def test_a_claim_says_who_it_is(backend, time):
    claim_now(backend, time, number=5)
    record = decode_generation(bytes(run_sync(backend.read(generation_path(1)))), "")
    assert (record.generation, record.run_id) == (1, run_id(5))
    assert (record.host, record.pid) == (socket.gethostname(), os.getpid())


def test_a_generation_is_above_those_of_commits_whose_record_is_gone(backend, time):
    run_sync(commit(backend, manifest_of(6, 10)))
    assert claim_now(backend, time) == 7


def test_of_many_that_claim_at_once_each_gets_a_generation_of_its_own(inner, time):
    """All have listed before the first one claims."""
    backend = FaultyBackend(inner)

    async def race():
        listed = asyncio.Event()
        waiting = []

        async def together(call):
            found = await call.proceed()
            waiting.append(call)
            if len(waiting) >= 8:
                listed.set()
            await asyncio.wait_for(listed.wait(), 60)
            return found

        backend.when("list", f"{NAME}/generations/", together, nth=None)
        claims = [claim_generation(backend, NAME, run_id(n), None, False, 1) for n in range(8)]
        return await asyncio.gather(*claims)

    assert sorted(run_sync(race())) == list(range(1, 9))


def test_a_claim_whose_answer_is_lost_is_read_back(backend, time):
    backend.when("create", generation_path(1), lost_answer())
    assert claim_now(backend, time) == 1
    assert backend.calls[-2:] == [("create", generation_path(1)), ("read", generation_path(1))]
    assert run_sync(catalog.generations(backend, NAME)) == [1]


def test_a_claim_that_was_not_done_is_made_again(backend, time):
    backend.when("create", generation_path(1), not_done())
    assert claim_now(backend, time) == 1


def test_a_claim_that_another_has_made_meanwhile_is_not_taken_for_ours(inner, backend, time):
    backend.when("create", generation_path(1), also(lambda: claimed_by(inner, 1), then=not_done()))
    assert claim_now(backend, time) == 2


def test_an_earlier_claim_of_the_same_run_is_not_taken_for_this_one(backend, time):
    assert claim_now(backend, time) == 1
    # As a network file system may cache it.
    backend.when("list", f"{NAME}/generations/", hidden(), nth=None)
    assert claim_now(backend, time) == 2


def test_a_record_that_cannot_be_read_takes_its_number(backend, time):
    run_sync(backend.write(generation_path(1), b"damaged"))
    backend.when("list", f"{NAME}/generations/", hidden(), nth=None)
    assert claim_now(backend, time) == 2


def test_a_claim_that_storage_does_not_answer_is_an_error(backend, time):
    backend.when("create", generation_path(1), not_done(StorageError("read only")), nth=None)
    with pytest.raises(StorageError, match=r"0001\.json.*read only"):
        claim_now(backend, time)


@pytest.mark.parametrize("step", [100, 99, 0])
def test_who_loaded_nothing_may_not_save_at_or_below_the_newest_step(backend, time, step):
    run_sync(claimed_by(backend, 7))
    run_sync(commit(backend, MANIFEST))
    with pytest.raises(CommitConflict) as raised:
        claim_now(backend, time, step=step)
    for part in (
        f"step {step} of 'model'",
        "step 100",
        "generation 7",
        "process 4711 on node-3",
        "load that first",
        "another name",
        "a step above 100",
    ):
        assert part in str(raised.value)
    assert generation_path(8) not in creates(backend)


def test_who_loaded_nothing_may_save_above_the_newest_step(backend, time):
    run_sync(commit(backend, MANIFEST))
    assert claim_now(backend, time, step=101) == 8


def test_a_void_is_no_newest_commit(backend, time):
    run_sync(commit(backend, MANIFEST))
    run_sync(claimed_by(backend, 8))
    run_sync(void(backend, 8, 500))
    assert claim_now(backend, time, step=101) == 9


def test_the_newest_commit_is_that_of_the_highest_generation(backend, time):
    for generation, step in [(7, 100), (8, 50)]:
        run_sync(commit(backend, manifest_of(generation, step)))
    with pytest.raises(CommitConflict, match="above 50"):
        claim_now(backend, time, step=50)
    assert claim_now(backend, time, step=60) == 9


def test_a_damaged_newest_commit_is_the_newest_all_the_same(backend, time):
    run_sync(backend.write(COMMIT, b"damaged"))
    with pytest.raises(CommitConflict, match="its record cannot be read"):
        claim_now(backend, time)


def test_who_loaded_the_newest_goes_on_at_any_step(backend, time):
    run_sync(commit(backend, MANIFEST))
    assert claim_now(backend, time, seen=CommitKey(7, 100), loaded=True, step=50) == 8


def test_who_loaded_before_another_committed_is_refused(backend, time):
    run_sync(claimed_by(backend, 8))
    for generation, step in [(7, 100), (8, 110)]:
        run_sync(commit(backend, manifest_of(generation, step)))
    with pytest.raises(CommitConflict) as raised:
        claim_now(backend, time, seen=CommitKey(7, 100), loaded=True, step=120)
    for part in ("since this job loaded", "step 110", "generation 8", "process 4711 on node-3", "load again"):
        assert part in str(raised.value)
    assert generation_path(9) not in creates(backend)


def test_who_loaded_what_is_gone_is_refused(backend, time):
    with pytest.raises(CommitConflict, match="are gone; load again"):
        claim_now(backend, time, seen=CommitKey(7, 100), loaded=True)


def test_a_commit_that_comes_while_one_claims_is_seen(inner, backend, time):
    """Whoever claimed in the meantime has the number; whoever has committed in the meantime is found."""

    async def another():
        await claimed_by(inner, 1)
        await commit(inner, manifest_of(1, 100))

    backend.when("create", generation_path(1), also(another, then=Call.proceed))
    with pytest.raises(CommitConflict, match="process 4711 on node-3"):
        claim_now(backend, time)


def test_a_commit_that_comes_between_the_two_listings_is_seen(inner, backend, time):
    async def another():
        await claimed_by(inner, 1)
        await commit(inner, manifest_of(1, 100))

    async def after_the_first_listing(call):
        found = await call.proceed()
        await another()
        return found

    backend.when("list", f"{NAME}/*", after_the_first_listing)
    with pytest.raises(CommitConflict, match="process 4711 on node-3"):
        claim_now(backend, time)


def test_who_has_the_highest_generation_goes_on(backend, time):
    run_sync(check_not_replaced(backend, NAME, claim_now(backend, time)))


def test_who_meets_a_higher_generation_is_told_by_whom_it_was_replaced(backend, time):
    mine = claim_now(backend, time)
    run_sync(claimed_by(backend, 2))
    with pytest.raises(
        CommitConflict, match=r"replaced by generation 2 \(process 4711 on node-3, since 2026"
    ):
        run_sync(check_not_replaced(backend, NAME, mine))


def test_who_was_replaced_by_an_unreadable_record_is_told(backend, time):
    run_sync(backend.write(generation_path(2), b"damaged"))
    with pytest.raises(CommitConflict, match=r"generation 2 \(its record cannot be read\)"):
        run_sync(check_not_replaced(backend, NAME, 1))
