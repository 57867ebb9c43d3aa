"""Meetings on a Store: what each rank learns, also when ranks are late, missing, unwilling or dead."""

from __future__ import annotations

import json
import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from dtruntime_torch import barrier as barrier_module
from dtruntime_torch.barrier import Barrier
from dtruntime_torch.errors import (
    BarrierTimeout,
    CommitConflict,
    DTRuntimeError,
    InvalidArgument,
    SaveFailed,
    SaveSkipped,
    StoreUnreachable,
    UnsupportedType,
)
from dtruntime_torch.membership import HashStore
from tests.meeting_ranks import (
    BRIEF,
    LONG,
    SHORT,
    TCPStore,
    barriers,
    connect,
    joined,
    launch,
    outcome,
    store_keeper,
    together,
)


@pytest.fixture
def store():
    return HashStore()


def raise_(error):
    raise error


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_all_learn_what_the_leader_made_of_the_values_in_the_order_of_ranks(store, world_size):
    answers = together(barriers(store, world_size), lambda rank: rank.meet("save", b"%d" % rank.rank, joined))
    assert answers == [b" ".join(b"%d" % rank for rank in range(world_size))] * world_size


def test_only_the_leader_acts_and_only_once_all_have_arrived(store):
    ranks = barriers(store, 3)
    acted = []

    def act(rank):
        return rank.meet("save", b"", lambda values: acted.append((rank.rank, len(values))) or b"done")

    assert together(ranks, act) == [b"done"] * 3
    assert acted == [(0, 3)]


@pytest.mark.parametrize("value", [b"", b"\x00", b"=", b"!", b"-[1]", bytes(range(256)), b"x" * 1_000_000])
def test_values_and_answers_are_any_bytes(store, value):
    answers = together(barriers(store, 2), lambda rank: rank.meet("save", value, lambda values: values[1]))
    assert answers == [value, value]


def test_an_error_of_ours_reaches_all_as_what_it_is(store):
    errors = together(
        barriers(store, 3), lambda rank: rank.meet("save", b"", lambda _: raise_(CommitConflict("too late")))
    )
    assert [(type(error), str(error)) for error in errors] == [(CommitConflict, "too late")] * 3


def test_an_error_of_others_reaches_all_with_its_name(store):
    errors = together(
        barriers(store, 2), lambda rank: rank.meet("save", b"", lambda _: raise_(PermissionError("locked")))
    )
    assert type(errors[0]) is PermissionError
    assert type(errors[1]) is DTRuntimeError
    assert str(errors[1]) == "PermissionError: locked"


def test_after_an_error_the_next_meeting_works(store):
    ranks = barriers(store, 2)
    together(ranks, lambda rank: rank.meet("save/1", b"", lambda _: raise_(SaveFailed("full"))))
    assert together(ranks, lambda rank: rank.meet("save/2", b"", joined)) == [b" ", b" "]


def test_an_announcement_reaches_all(store):
    answers = together(barriers(store, 3), lambda rank: rank.announce("pick", lambda: b"%d" % rank.rank))
    assert answers == [b"0"] * 3


def test_the_leader_announces_without_waiting(store):
    leader, follower = barriers(store, 2)
    assert leader.announce("pick", lambda: b"step 7") == b"step 7"
    assert follower.announce("pick", lambda: b"never asked") == b"step 7"


def test_an_error_in_an_announcement_reaches_all(store):
    errors = together(
        barriers(store, 2), lambda rank: rank.announce("pick", lambda: raise_(CommitConflict("gone")))
    )
    assert [str(error) for error in errors] == ["gone", "gone"]


def test_an_announcement_that_does_not_come_names_the_leader(store):
    _, follower = barriers(store, 2, BRIEF)
    with pytest.raises(BarrierTimeout, match="rank 0 did not say") as raised:
        follower.announce("pick", lambda: b"")
    assert raised.value.missing == (0,)
    assert not raised.value.decided


@pytest.mark.parametrize("missing", [(1,), (3,), (1, 3)])
def test_missing_followers_are_named_on_every_rank(store, missing):
    here = [rank for rank in barriers(store, 4, SHORT) if rank.rank not in missing]
    errors = together(here, lambda rank: rank.meet("save", b"", joined))
    assert [type(error) for error in errors] == [BarrierTimeout] * len(here)
    assert [(error.missing, error.decided) for error in errors] == [(missing, True)] * len(here)
    assert all(("rank 3" if missing == (3,) else str(list(missing))[1:-1]) in str(error) for error in errors)


def test_a_missing_leader_is_named_by_the_followers(store):
    errors = together(barriers(store, 3, SHORT)[1:], lambda rank: rank.meet("save", b"", joined))
    assert [(error.missing, error.decided) for error in errors] == [((0,), False)] * 2
    assert all("rank 0 did not come to 'save' within 1 s" in str(error) for error in errors)


def test_who_is_late_learns_that_the_leader_gave_up(store):
    *early, late = barriers(store, 3, SHORT)
    together(early, lambda rank: rank.meet("save", b"", joined))
    with pytest.raises(BarrierTimeout) as raised:
        late.meet("save", b"", joined)
    assert (raised.value.missing, raised.value.decided) == ((2,), True)


def test_the_leader_may_be_later_than_others_wait(store):
    hasty = barriers(store, 2, BRIEF)[1]
    with pytest.raises(BarrierTimeout) as raised:
        hasty.meet("save", b"part", joined)
    assert not raised.value.decided
    leader = barriers(store, 2)[0]
    assert leader.meet("save", b"mine", joined) == b"mine part"


def test_a_follower_waits_for_a_leader_that_waits_for_others(store):
    leader, follower, last = barriers(store, 3, LONG)
    follower.timeout = 0.05  # it is over before the last rank comes, and the leader's is not
    arrived = threading.Event()
    asked = iter(range(1_000_000))

    def interrupt():
        if next(asked) > 10:  # far beyond its own time: pauses double from 1 ms to 0.25 s
            arrived.set()

    with ThreadPoolExecutor(2) as threads:
        led = threads.submit(leader.meet, "save", b"0", joined)
        followed = threads.submit(follower.meet, "save", b"1", joined, interrupt)
        assert arrived.wait(LONG)
        assert last.meet("save", b"2", joined) == b"0 1 2"
        assert (led.result(), followed.result()) == (b"0 1 2", b"0 1 2")


def test_an_arrival_cannot_be_taken_back(store):
    hasty = barriers(store, 2, BRIEF)[1]
    with pytest.raises(BarrierTimeout):
        hasty.meet("save", b"part", joined)
    hasty.decline("save", SaveFailed("changed my mind"))
    assert barriers(store, 2)[0].meet("save", b"mine", joined) == b"mine part"


def test_a_follower_that_declines_with_an_error_ends_the_meeting_for_all(store):
    *willing, unwilling = barriers(store, 3)
    acted = []
    unwilling.decline("groups", UnsupportedType("optimizer: a lambda"))
    errors = together(willing, lambda rank: rank.meet("groups", b"", lambda _: acted.append(1) or b""))
    assert [type(error) for error in errors] == [UnsupportedType] * 2
    assert {str(error) for error in errors} == {"rank 2 takes no part: optimizer: a lambda"}
    assert acted == []


def test_a_follower_that_declines_with_bytes_has_them_in_the_meeting(store):
    *willing, unwilling = barriers(store, 3)
    unwilling.decline("save", b"no part")
    answers = together(willing, lambda rank: rank.meet("save", b"part", joined))
    assert answers == [b"part part no part"] * 2
    assert store.num_keys() == 0  # it has departed, so nobody waits for it


@pytest.mark.parametrize("reason", [UnsupportedType("optimizer: a lambda"), b"no part"])
def test_a_leader_that_declines_ends_meetings_and_announcements(store, reason):
    leader, *followers = barriers(store, 3)
    leader.decline("groups", reason)
    leader.decline("pick", reason)
    expected = UnsupportedType if isinstance(reason, Exception) else DTRuntimeError
    met = together(followers, lambda rank: rank.meet("groups", b"", joined))
    told = together(followers, lambda rank: rank.announce("pick", lambda: b""))
    assert [type(error) for error in met + told] == [expected] * 4


def test_an_interrupt_ends_the_wait_of_a_follower(store):
    _, follower = barriers(store, 2)
    with pytest.raises(SaveFailed, match="elsewhere"):
        follower.meet("groups", b"", joined, interrupt=lambda: SaveFailed("they are elsewhere"))


def test_an_interrupt_of_the_leader_ends_the_meeting_for_all_who_have_come(store):
    leader, follower, absent = barriers(store, 3)

    def interrupt():
        return SaveFailed("they are elsewhere") if 1 in leader.arrivals("groups") else None

    errors = together(
        [leader, follower],
        lambda rank: rank.meet("groups", b"", joined, interrupt if rank is leader else None),
    )
    assert [(type(error), str(error)) for error in errors] == [(SaveFailed, "they are elsewhere")] * 2
    with pytest.raises(SaveFailed, match="elsewhere"):
        absent.meet("groups", b"", joined)


def test_an_interrupt_that_saw_what_came_after_the_decision_is_ignored(store):
    leader, follower = barriers(store, 2)
    with ThreadPoolExecutor(1) as threads:

        def interrupt():
            led = threads.submit(leader.meet, "groups", b"mine", joined)
            store.wait(["run/groups/answer"])
            assert not led.done()  # it sees the follower off
            return SaveFailed("they are elsewhere")

        assert follower.meet("groups", b"yours", joined, interrupt) == b"mine yours"


def test_no_key_remains_of_a_hundred_meetings(store):
    ranks = barriers(store, 3)

    def save(rank):
        for step in range(100):
            rank.announce(f"{step}/attempt", lambda: b"1")
            rank.meet(f"{step}/commit", b"part", joined)

    assert together(ranks, save) == [None] * 3
    assert store.num_keys() == 0


def test_the_keys_of_a_meeting_that_failed_go_once_the_last_has_seen_it(store):
    *early, late = barriers(store, 3, SHORT)
    together(early, lambda rank: rank.meet("save/1", b"", joined))
    assert store.num_keys() > 0
    with pytest.raises(BarrierTimeout):
        late.meet("save/1", b"", joined)
    together([*early, late], lambda rank: rank.meet("save/2", b"", joined))
    assert store.num_keys() == 0


def test_has_begun_tells_whether_anyone_has_arrived(store):
    leader, follower = barriers(store, 2)
    assert not leader.has_begun("save")
    follower.decline("save", b"part")
    assert leader.has_begun("save")
    assert leader.arrivals("save") == {1: b"part"}


def test_two_incarnations_on_one_store_do_not_see_each_other(store):
    old = barriers(store, 2, BRIEF, prefix="old")
    new = barriers(store, 2, prefix="new")
    with pytest.raises(BarrierTimeout):
        old[1].meet("save/1", b"old part", joined)
    old[0].decline("pick", SaveFailed("old"))
    assert together(new, lambda rank: rank.meet("save/1", b"new part", joined)) == [b"new part new part"] * 2
    assert together(new, lambda rank: rank.announce("pick", lambda: b"new")) == [b"new"] * 2


def test_what_was_decided_is_not_decided_again(store):
    with pytest.raises(BarrierTimeout):
        barriers(store, 2, BRIEF)[0].meet("save", b"", joined)
    barriers(store, 2)[1].decline("save", b"")
    with pytest.raises(InvalidArgument, match="serves once"):
        barriers(store, 2)[0].meet("save", b"", joined)


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_is_below_the_world_size(store, rank):
    with pytest.raises(InvalidArgument, match=f"rank is {rank}"):
        Barrier(store, rank, 2, LONG)


def test_what_is_too_large_for_the_store_is_refused(store):
    large = bytes((64 << 20) + 1)
    ranks = barriers(store, 2)
    with pytest.raises(InvalidArgument, match="too many for the Store"):
        ranks[1].meet("save/1", large, joined)
    errors = together(ranks, lambda rank: rank.meet("save/2", b"", lambda _: large))
    assert [type(error) for error in errors] == [InvalidArgument] * 2


@pytest.mark.parametrize("stored", [b"?", b"!", b"!{}", b"![]", b'!{"type": 1}', b"!" + b"[" * 100_000])
def test_an_answer_that_cannot_be_read_is_an_error_of_ours(store, stored):
    store.set("run/pick/answer", stored)
    with pytest.raises(DTRuntimeError, match="do all ranks run one version"):
        barriers(store, 2)[1].announce("pick", lambda: b"")


def test_a_rank_that_waits_does_not_block_others_who_have_the_same_client():
    """A TCPStore client answers one call at a time, a wait included."""
    store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    leader, follower = barriers(store, 2, timeout=5.0)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(follower.meet, "save", b"1", joined)
        store.wait(["run/save/begun"])
        assert leader.meet("save", b"0", joined) == b"0 1"
        assert waiting.result() == b"0 1"


def test_ranks_meet_and_miss_each_other_on_a_file_store(tmp_path):
    stores = [dist.FileStore(str(tmp_path / "store"), 3) for _ in range(3)]
    ranks = [barriers(store, 3)[rank] for rank, store in enumerate(stores)]
    assert together(ranks, lambda rank: rank.meet("save", b"%d" % rank.rank, joined)) == [b"0 1 2"] * 3
    ranks[0].timeout = ranks[1].timeout = SHORT
    errors = together(ranks[:2], lambda rank: rank.meet("next", b"", joined))
    assert [(type(error), error.missing) for error in errors] == [(BarrierTimeout, (2,))] * 2


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_meet_on_a_tcp_store(world_size):
    store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    before = store.num_keys()
    ranks = [launch("everything", rank, world_size, store.port) for rank in range(world_size)]
    found = [outcome(rank) for rank in ranks]
    for rank, of in enumerate(found):
        assert of["values"] == [" ".join(f"{r}.{i}" for r in range(world_size)) for i in range(3)]
        assert of["told"] == 200_002
        assert of["failing"] == "somebody was here first"
        if rank != world_size - 1:
            assert of["without the last"][:2] == [[world_size - 1], True], of
        if rank != 0:
            assert of["without the leader"][:2] == [[0], False], of
    # Of the meetings that not all came to, who was there, and the decision of the first.
    assert store.num_keys() - before == 2 * (2 * (world_size - 1) + 1)


def test_a_store_whose_keeper_died_is_a_clear_error():
    with store_keeper() as (keeper, port):
        leader, follower = barriers(connect(port), 2)
        keeper.kill()
        keeper.wait()
        for rank in (leader, follower):
            with pytest.raises(
                StoreUnreachable, match="the process that keeps it, rank 0 or torchrun's agent"
            ):
                rank.meet("save", b"", joined)


def test_a_keeper_that_dies_while_a_rank_waits_is_a_clear_error():
    with store_keeper() as (keeper, port), ThreadPoolExecutor(1) as threads:
        watch = connect(port)
        waiting = threads.submit(barriers(connect(port), 2)[1].meet, "save", b"", joined)
        watch.wait(["run/save/begun"])
        keeper.kill()
        assert isinstance(waiting.exception(LONG), StoreUnreachable)


def test_a_leader_that_acted_knows_it_even_if_it_can_tell_nobody(caplog):
    with store_keeper() as (keeper, port):
        leader, follower = barriers(connect(port), 2)
        follower.decline("save", b"part")

        def commit(values):
            keeper.kill()
            keeper.wait()
            return b"committed"

        assert leader.meet("save", b"mine", commit) == b"committed"
    assert "rank 0 is done with save, but could not say so" in caplog.text


def test_a_follower_that_dies_once_it_has_arrived_counts_and_is_named(caplog, monkeypatch):
    monkeypatch.setattr(barrier_module, "GRACE_SECONDS", 0.2)
    with store_keeper() as (_, port):
        leader = barriers(connect(port), 2)[0]
        assert launch("dies once it has arrived", 1, 2, port).wait(LONG) == 0
        with caplog.at_level(logging.WARNING):
            assert leader.meet("last", b"mine", joined) == b"mine my part"
    assert "rank 1 did not fetch the answer of last" in caplog.text


def test_errors_travel_as_json_and_nothing_else(store):
    barriers(store, 2)[0].decline("pick", CommitConflict("too late"))
    stored = store.get("run/pick/answer")
    assert json.loads(stored[1:]) == {"type": "CommitConflict", "message": "too late"}


def test_a_store_that_cannot_be_connected_to_is_unreachable():
    class Gone:
        def clone(self) -> object:
            raise RuntimeError("connection refused")

    with pytest.raises(StoreUnreachable, match="no longer answers"):
        Barrier(Gone(), rank=0, world_size=1, timeout=60)  # type: ignore[arg-type]


def test_what_a_rank_declined_beside_a_meeting_is_deleted_when_all_have_departed():
    store = HashStore()
    barriers = [Barrier(store, rank, 2, timeout=60) for rank in range(2)]
    aside = barriers[0].beside()
    for key in ("first", "second"):
        aside.void(key, SaveSkipped("no time"))
        with pytest.raises(SaveSkipped):
            barriers[1].meet(key, b"", lambda values: b"")
    assert not [key for key in store.list_keys() if key.startswith("first/")]
