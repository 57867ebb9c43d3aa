"""Who holds what, as the ranks learn it from each other."""

from __future__ import annotations

import json
import zlib
from dataclasses import replace

import pytest
from hypothesis import given, settings

from dtruntime_torch.checkpoint.saving import groups
from dtruntime_torch.checkpoint.saving.groups import learn, signature
from dtruntime_torch.checkpoint.saving.save_plan import make_save_plan
from dtruntime_torch.checkpoint.specs import PathKey
from dtruntime_torch.errors import BarrierTimeout, SaveFailed, UnsupportedType
from dtruntime_torch.membership import HashStore
from tests.checkpoint.plan_builders import World, flat, obj, plans_of, tensor, worlds
from tests.meeting_ranks import SHORT, barriers, joined, together

SHARD = tensor("w", 8, 4, layout="mesh", offsets=(0, 0), shape=(4, 4), holders=(0, 2))
STAGES = (
    flat(tensor("stage0.weight", 4), tensor("shared", 2, spread=True), obj("step")),
    flat(tensor("stage1.weight", 6), tensor("shared", 2, spread=True), obj("step")),
)


@pytest.fixture
def store():
    return HashStore()


def learnt(store, states, key="groups"):
    """What each rank learns when rank r holds states[r]."""
    return together(barriers(store, len(states)), lambda rank: learn(rank, key, states[rank.rank]))


@pytest.mark.parametrize(
    "change",
    [
        {"offsets": (4, 0)},
        {"shape": (3, 4)},
        {"holders": (1, 3)},
    ],
)
def test_shards_of_one_tensor_have_one_signature(change):
    assert signature(flat(replace(SHARD, **change))) == signature(flat(SHARD))


@pytest.mark.parametrize("kind", [{"per_rank": True}, {"is_bytes": True}])
def test_what_may_differ_by_rank_has_one_signature_whatever_its_length(kind):
    short, long = (tensor("w", n, dtype="uint8", **kind) for n in (3, 5))
    assert signature(flat(short)) == signature(flat(long))


@pytest.mark.parametrize(
    "change",
    [
        {"fqn": "v"},
        {"path": (PathKey("dict", "v"),)},
        {"path": (PathKey("list", 0),)},
        {"dtype": "float64"},
        {"global_shape": (4, 8)},
        {"layout": "another mesh"},
        {"holders": None},
        {"spread": True},
        {"per_rank": True},
        {"is_bytes": True},
        {"alias": "v"},
    ],
    ids=str,
)
def test_whatever_else_differs_tells_in_the_signature(change):
    assert signature(flat(replace(SHARD, **change))) != signature(flat(SHARD))


def test_a_signature_tells_keys_of_different_types_apart():
    paths = [(PathKey("dict", key),) for key in (1, "1", True, 1.0, b"1", (1,), None)]
    assert len({signature(flat(tensor("1", 2, path=path))) for path in paths}) == len(paths)


def test_a_signature_tells_the_order_and_tensors_from_objects():
    a, b = tensor("a", 2), tensor("b", 2)
    states = [flat(a, b), flat(b, a), flat(a, obj("b")), flat(obj("b"), a), flat(a)]
    assert len({signature(state) for state in states}) == len(states)


def test_ranks_that_hold_alike_are_one_group_and_keep_their_own_structure(store):
    states = [flat(replace(SHARD, offsets=(4 * (rank % 2), 0))) for rank in range(4)]
    for rank, found in enumerate(learnt(store, states)):
        assert list(found.members.values()) == [(0, 1, 2, 3)]
        assert list(found.specs.values()) == [states[rank]]


def test_ranks_that_hold_different_things_learn_what_the_others_hold(store):
    states = [STAGES[rank // 2] for rank in range(4)]
    one, two = signature(STAGES[0]), signature(STAGES[1])
    for rank, found in enumerate(learnt(store, states)):
        assert found.members == {one: (0, 1), two: (2, 3)}
        assert found.specs[signature(states[rank])] == states[rank]
        other = two if rank < 2 else one
        assert found.specs[other] == STAGES[other == two]


@settings(max_examples=40)
@given(world=worlds())
def test_every_rank_plans_as_if_it_knew_what_each_other_holds(world: World):
    found = learnt(HashStore(), world.states)
    world_size = len(world.states)
    plans = [
        make_save_plan(rank, world_size, own, known.specs, known.members)
        for rank, (own, known) in enumerate(zip(world.states, found, strict=True))
    ]
    # Which of several parts complete one depends on whose structure was shown.
    written = [[replace(plan, completed_by=()) for plan in of] for of in (plans, plans_of(world.states))]
    assert written[0] == written[1]


def test_names_of_any_characters_travel(store):
    two_halves = "\ud83d\ude00"  # which JSON would join to one character
    odd = flat(tensor("tab\t é \N{GRINNING FACE}", 2, alias=f'"\\\x00{two_halves}'), obj(two_halves))
    found = learnt(store, [odd, flat()])
    assert found[1].specs[signature(odd)] == odd


def test_no_key_remains(store):
    learnt(store, [STAGES[0], STAGES[1], STAGES[0]])
    assert store.num_keys() == 0


def test_the_next_structure_is_learnt_by_another_key(store):
    ranks = barriers(store, 2)
    first = together(ranks, lambda rank: learn(rank, "save/1", STAGES[rank.rank]))
    second = together(ranks, lambda rank: learn(rank, "save/2", STAGES[1 - rank.rank]))
    assert list(first[0].members) == list(reversed(second[0].members))


def test_a_rank_that_does_not_come_is_named(store):
    ranks = barriers(store, 3, timeout=SHORT)[:2]
    errors = together(ranks, lambda rank: learn(rank, "groups", STAGES[0], busy_key="commit"))
    assert [(type(error), error.missing) for error in errors] == [(BarrierTimeout, (2,))] * 2


@pytest.mark.parametrize("changed", [(0,), (2,), (1, 2), (0, 2)])
def test_where_only_some_ranks_see_a_change_they_say_so_at_once(store, changed):
    def save(rank):
        if rank.rank not in changed:
            return rank.meet("commit", b"part", joined)
        try:
            learn(rank, "groups", STAGES[0], busy_key="commit")
        except SaveFailed as error:
            rank.decline("commit", b"no part")
            return error
        return None

    found = together(barriers(store, 3), save)
    assert all(type(found[rank]) is SaveFailed for rank in changed)
    # One that fails while another of them is still on its way does not know of it.
    named = [str(list(ranks)) for ranks in (changed, *((rank,) for rank in changed))]
    for rank in changed:
        assert any(f"changed on ranks {ranks} only" in str(found[rank]) for ranks in named)
        assert "manager.prepare(state)" in str(found[rank])


def test_why_another_rank_declined_comes_before_that(store):
    leader, unwilling, changed = barriers(store, 3)
    unwilling.decline("groups", UnsupportedType("optimizer: a lambda"))
    unwilling.decline("commit", b"no part")
    with pytest.raises(UnsupportedType, match="rank 1 takes no part: optimizer: a lambda"):
        learn(changed, "groups", STAGES[0], busy_key="commit")
    assert leader.arrivals("commit") == {1: b"no part"}


def test_ranks_that_learnt_sooner_are_not_taken_for_ranks_that_saw_no_change(store):
    ranks = barriers(store, 4)

    def saves(rank):
        for step in range(30):
            learn(rank, f"{step}/groups", STAGES[rank.rank % 2], busy_key=f"{step}/commit")
            rank.meet(f"{step}/commit", b"part", joined)

    assert together(ranks, saves) == [None] * 4


TENSOR = {
    "fqn": "w", "index": 0, "dtype": "float32", "global_shape": [2], "offsets": [0], "shape": [2], "layout": "",
    "path": [["d", "w"]], "holders": None, "first_holders": [], "spread": False, "per_rank": False, "alias": None, "is_bytes": False, "part_of": "",
}  # fmt: skip


def packed(**change):
    return zlib.compress(json.dumps({"tensors": [{**TENSOR, **change}], "objects": []}).encode())


@pytest.mark.parametrize(
    "shown",
    [
        b"no zlib",
        packed()[:-4],
        zlib.compress(b"no JSON"),
        zlib.compress(b"[]"),
        zlib.compress(b'{"tensors": []}'),
        zlib.compress(b'{"tensors": [NaN], "objects": []}'),
        zlib.compress(b"[" * 100_000),
        zlib.compress(b'{"tensors": [], "objects": []}' + b" " * 2_000_000),
        packed(fqn=1),
        packed(fqn={"~": "no such tag", "v": ""}),
        packed(dtype="float31"),
        packed(dtype=None),
        packed(shape=[2, 2]),
        packed(offsets=[-1]),
        packed(global_shape=[True]),
        packed(holders=["0"]),
        packed(alias=0),
        packed(spread=0),
    ],
)
def test_a_structure_that_cannot_be_read_is_an_error_that_names_its_rank(store, monkeypatch, shown):
    monkeypatch.setattr(groups, "MAX_STRUCTURE_BYTES", 1_000_000)

    def act(rank):
        if rank.rank == 0:
            return learn(rank, "groups", STAGES[0])
        rank.meet("groups", b"f" * 64, joined)
        return rank.meet("groups/specs", shown, joined)

    error, _ = together(barriers(store, 2), act)
    assert type(error) is SaveFailed
    assert "rank 1 showed a structure that cannot be read" in str(error)


def test_what_is_refused_above_is_taken_when_it_is_right():
    assert groups._unpack(packed(), 1).tensors[0] == tensor("w", 2)


@pytest.mark.parametrize(
    "answer",
    [
        b"no JSON",
        b"{}",
        b'{"groups": [["a", [0]]]}',
        b'{"groups": [["a", [0, 1]], ["b", [1]]]}',
        b'{"groups": [["a"], ["b"]]}',
        b'{"groups": [["a", [0, "1"]]]}',
    ],
)
def test_groups_that_cannot_be_read_are_an_error(store, answer):
    def act(rank):
        if rank.rank == 1:
            return learn(rank, "groups", STAGES[0])
        return rank.meet("groups", b"", lambda _: answer)

    _, error = together(barriers(store, 2), act)
    assert type(error) is SaveFailed
    assert "rank 0 showed a structure that cannot be read" in str(error)


@pytest.mark.parametrize("answer", [b"", b"\0" * 7, b"\0" * 7 + b"\2a", b"\0" * 8, b"\0" * 24])
def test_structures_that_are_cut_off_are_an_error(store, answer):
    mine, theirs = (signature(specs) for specs in STAGES)

    def act(rank):
        if rank.rank == 1:
            return learn(rank, "groups", STAGES[0])
        rank.meet("groups", b"", lambda _: json.dumps({"groups": [[theirs, [0]], [mine, [1]]]}).encode())
        return rank.meet("groups/specs", b"", lambda _: answer)

    _, error = together(barriers(store, 2), act)
    assert type(error) is SaveFailed
    assert "cut off" in str(error)
