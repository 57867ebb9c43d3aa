"""Any sequence of saves, failures, kills, restarts and prunes: what is committed is what was saved, bit for bit."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.checkpoint.random_jobs import World, tensors

RANKS = st.integers(1, 4)
CALLS = st.integers(1, 40)
CHANGES = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5000)), max_size=3)
ACTIONS = st.one_of(
    st.tuples(st.just("save"), CHANGES),
    st.tuples(st.just("save"), CHANGES),
    st.tuples(st.just("fault"), CHANGES, RANKS, CALLS, st.booleans()),
    st.tuples(st.just("die"), CHANGES, RANKS, CALLS, st.booleans(), RANKS),
    st.tuples(st.just("restart"), RANKS),
    st.tuples(st.just("prune")),
)


def act(world: World, action: tuple, salt: int) -> None:
    kind, *rest = action
    if kind in ("save", "fault", "die"):
        world.change(rest[0])
    if kind == "save":
        world.save()
    elif kind == "fault":
        world.save_with_a_fault(*rest[1:])
    elif kind == "die":
        world.save_and_die(*rest[1:4])
        world.begin(rest[4], salt)
    elif kind == "restart":
        world.begin(rest[0], salt)
    else:
        world.prune()


@pytest.mark.parametrize("keep", [None, 2])
@settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow])
@given(
    held=tensors(),
    chunk_bytes=st.sampled_from([4096, 8192, 1 << 20]),
    ranks=RANKS,
    actions=st.lists(ACTIONS, min_size=2, max_size=7),
    last=RANKS,
)
def test_whatever_happens_what_is_committed_is_what_was_saved(keep, held, chunk_bytes, ranks, actions, last):
    world = World(held, chunk_bytes, keep)
    world.begin(ranks, 0)
    for salt, action in enumerate(actions):
        act(world, action, salt)
        world.check()
    world.begin(last, 7)
    world.save()
    world.prune()
    world.check()
    assert world.reported[-1] == world.step
    world.check_nothing_is_left_over()
    world.end()
