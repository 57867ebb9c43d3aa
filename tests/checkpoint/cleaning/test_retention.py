from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import dtruntime_torch as dt
from dtruntime_torch.checkpoint.cleaning.retention import KeepBest, RetentionPolicy
from dtruntime_torch.checkpoint.names import CommitKey
from dtruntime_torch.checkpoint.objects import Json
from dtruntime_torch.errors import InvalidArgument


def steps(policy: RetentionPolicy, *there: int, losses: dict[int, Json] | None = None) -> list[int]:
    """The steps that a policy keeps, of one generation that saved these."""
    metadata: dict[CommitKey, Json] = {CommitKey(1, step): None for step in there}
    metadata |= {CommitKey(1, step): {"loss": loss} for step, loss in (losses or {}).items()}
    return sorted(key.step for key in policy.kept(metadata))


def test_the_last_n_are_kept():
    assert steps(RetentionPolicy(keep_last_n=2), 1, 2, 3, 10) == [3, 10]


def test_fewer_than_n_are_all_kept():
    assert steps(RetentionPolicy(keep_last_n=5), 1, 2) == [1, 2]


def test_none_keeps_all():
    assert steps(RetentionPolicy(), 1, 2, 3) == [1, 2, 3]


def test_last_goes_by_generation_before_step():
    kept = RetentionPolicy(keep_last_n=1).kept({CommitKey(1, 900): None, CommitKey(2, 10): None})
    assert kept == {CommitKey(2, 10)}


def test_every_n_steps_are_kept_beside_the_last():
    assert steps(RetentionPolicy(keep_last_n=1, keep_every_n_steps=100), 50, 100, 150, 200, 250) == [
        100,
        200,
        250,
    ]


def test_pinned_steps_are_kept_beside_the_last():
    assert steps(RetentionPolicy(keep_last_n=1, pinned_steps=frozenset({2, 77})), 1, 2, 3) == [2, 3]


def test_a_step_that_was_saved_again_is_kept_as_the_newest_generation_saved_it():
    policy = RetentionPolicy(keep_last_n=1, keep_every_n_steps=10, pinned_steps=frozenset({5}))
    there = [CommitKey(1, 5), CommitKey(1, 10), CommitKey(2, 5), CommitKey(2, 10), CommitKey(2, 11)]
    assert policy.kept(dict.fromkeys(there)) == {CommitKey(2, 5), CommitKey(2, 10), CommitKey(2, 11)}


def test_the_best_of_a_metric_is_the_least():
    losses: dict[int, Json] = {1: 0.5, 2: 0.25, 3: 0.75, 4: 1.0}
    assert steps(RetentionPolicy(1, keep_best=KeepBest("loss")), losses=losses) == [2, 4]


def test_the_best_of_a_metric_may_be_the_greatest():
    losses: dict[int, Json] = {1: 5, 2: 0.25, 3: 0.75, 4: 1}
    policy = RetentionPolicy(1, keep_best=KeepBest("loss", n=2, mode="max"))
    assert steps(policy, losses=losses) == [1, 4]


def test_of_equally_good_ones_the_newest_is_kept():
    losses: dict[int, Json] = {1: 1, 2: 1.0, 3: 2}
    assert steps(RetentionPolicy(1, keep_best=KeepBest("loss")), losses=losses) == [2, 3]


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("none", [None, float("nan"), "0.1", True, [1], {}])
def test_what_is_no_number_counts_as_the_worst(mode, none):
    losses: dict[int, Json] = {1: 7.5, 2: none, 3: none}
    policy = RetentionPolicy(1, keep_best=KeepBest("loss", mode=mode))
    assert steps(policy, 4, losses=losses) == [1, 4]


@pytest.mark.parametrize("metadata", [None, [], "loss", {"accuracy": 1}])
def test_metadata_without_the_metric_counts_as_the_worst(metadata):
    policy = RetentionPolicy(1, keep_best=KeepBest("loss"))
    there = {CommitKey(1, 1): {"loss": 9}, CommitKey(1, 2): metadata, CommitKey(1, 3): None}
    assert policy.kept(there) == {CommitKey(1, 1), CommitKey(1, 3)}


def test_nothing_of_nothing_is_kept():
    assert RetentionPolicy(1, 1, KeepBest("loss"), frozenset({1})).kept({}) == set()


policies = st.builds(
    RetentionPolicy,
    st.integers(1, 4),
    st.none() | st.integers(1, 5),
    st.none() | st.builds(KeepBest, st.just("loss"), st.integers(1, 3), st.sampled_from(["min", "max"])),
    st.frozensets(st.integers(0, 9), max_size=3),
)


@given(
    policies,
    st.dictionaries(
        st.builds(CommitKey, st.integers(1, 3), st.integers(0, 9)),
        st.none() | st.fixed_dictionaries({"loss": st.floats()}),
        min_size=1,
    ),
)
def test_the_newest_is_always_kept(policy, metadata):
    kept = policy.kept(metadata)
    assert max(metadata) in kept <= metadata.keys()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("keep_last_n", 0),
        ("keep_last_n", -1),
        ("keep_last_n", 2.0),
        ("keep_last_n", True),
        ("keep_every_n_steps", 0),
        ("keep_best", "loss"),
        ("pinned_steps", [-1]),
        ("pinned_steps", ["7"]),
        ("pinned_steps", [2.5]),
        ("pinned_steps", [True]),
        ("pinned_steps", [[7]]),
        ("pinned_steps", 5),
        ("pinned_steps", "12"),
        ("chunk_bytes", 5000.5),
        ("chunk_bytes", "1MB"),
        ("chunk_bytes", 4095),
        ("timeout", "x"),
        ("timeout", float("nan")),
        ("timeout", float("inf")),
        ("timeout", True),
        ("timeout", 0),
    ],
)
def test_what_is_out_of_range_is_refused_at_the_door(tmp_path, name, value):
    with pytest.raises(InvalidArgument, match=name):
        dt.CheckpointManager(tmp_path, **{name: value})


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(("",), "metric"), ((7,), "metric"), (("loss", 0), "n of keep_best"), (("loss", 1, "least"), "mode")],
)
def test_a_keep_best_out_of_range_is_refused(arguments, named):
    with pytest.raises(InvalidArgument, match=named):
        KeepBest(*arguments)


def test_a_metric_that_is_nowhere_is_told_once(caplog):
    with dt.CheckpointManager(dt.MemoryBackend(), keep_last_n=1, keep_best=KeepBest("loss")) as manager:
        for step in (1, 2, 3):
            manager.save({"w": 1}, step, metadata={"Loss": 0.5, "accuracy": step})
        manager.prune()
    (record,) = [record for record in caplog.records if "keep_best" in record.message]
    assert record.levelname == "WARNING" and "'loss'" in record.message
    assert "step 1" in record.message and "['Loss', 'accuracy']" in record.message


@pytest.mark.parametrize("first", [0.5, float("nan")])
def test_a_metric_that_some_checkpoint_has_is_not_missed(first):
    policy = RetentionPolicy(1, keep_best=KeepBest("loss"))
    assert policy.missed_metric({CommitKey(1, 1): {"loss": first}, CommitKey(1, 2): None}) is None
    assert policy.missed_metric({}) is None
    assert RetentionPolicy(1).missed_metric({CommitKey(1, 1): None}) is None


@pytest.mark.parametrize("metadata", [None, "loss", ["loss"], {"loss": "0.5"}, {"loss": True}])
def test_what_is_no_number_is_no_metric(metadata):
    missed = RetentionPolicy(1, keep_best=KeepBest("loss")).missed_metric({CommitKey(1, 7): metadata})
    assert missed is not None and "step 7" in missed
