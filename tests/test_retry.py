"""The pauses of a retry policy, and the ones that it refuses to describe."""

from __future__ import annotations

import errno

import pytest

from dtruntime_torch import RetryPolicy
from dtruntime_torch.errors import InvalidArgument, StorageError
from dtruntime_torch.retry import retrying
from dtruntime_torch.storage import run_sync


def test_there_is_one_pause_fewer_than_tries():
    assert len(list(RetryPolicy(attempts=4).delays())) == 3
    assert list(RetryPolicy(attempts=1).delays()) == []


def test_pauses_grow_by_the_factor_up_to_the_greatest():
    policy = RetryPolicy(attempts=6, initial=2.0, max=20.0, factor=3.0, jitter=0.0)
    assert list(policy.delays()) == [2.0, 6.0, 18.0, 20.0, 20.0]


def test_chance_only_makes_a_pause_shorter_by_its_share():
    policy = RetryPolicy(attempts=3, initial=10.0, factor=1.0, jitter=0.25)
    draws = iter([0.0, 1.0])
    assert list(policy.delays(draw=lambda: next(draws))) == [10.0, 7.5]


def test_no_try_begins_after_the_deadline():
    policy = RetryPolicy(attempts=9, initial=4.0, factor=1.0, jitter=0.0, deadline=12.0)
    now = iter([100.0, 101.0, 106.0, 111.0])  # when it began, and before each pause: a try takes a second
    assert list(policy.delays(clock=lambda: next(now))) == [4.0, 4.0]


@pytest.mark.parametrize(
    "bad",
    [
        {"attempts": 0},
        {"attempts": 2.5},
        {"attempts": True},
        {"initial": "1s"},
        {"max": None},
        {"factor": [2]},
        {"jitter": True},
        {"deadline": "1h"},
        {"initial": -1.0},
        {"initial": 5.0, "max": 4.0},
        {"max": float("inf")},
        {"initial": float("nan")},
        {"factor": 0.5},
        {"jitter": 1.5},
        {"deadline": -1.0},
    ],
    ids=str,
)
def test_a_policy_out_of_range_is_refused(bad):
    with pytest.raises(InvalidArgument):
        RetryPolicy(**bad)


def failing(*errors):
    """Work that raises these one after the other, and then returns how often it was called."""
    left = list(errors)

    async def work():
        if left:
            raise left.pop(0)
        return len(errors) + 1

    return work


def do(policy, work, slept=None):
    async def sleep(seconds):
        if slept is not None:
            slept.append(seconds)

    return run_sync(retrying(policy, work, sleep=sleep))


def test_what_may_pass_is_tried_again_after_the_pauses_of_the_policy():
    slept = []
    policy = RetryPolicy(attempts=3, initial=7.0, factor=2.0, jitter=0.0)
    assert do(policy, failing(OSError("a"), OSError("b")), slept) == 3
    assert slept == [7.0, 14.0]


def test_what_does_not_pass_is_raised_at_once_and_as_it_is():
    slept, bug = [], ValueError("a bug")
    with pytest.raises(ValueError) as caught:
        do(RetryPolicy(), failing(bug), slept)
    assert caught.value is bug and slept == []


def test_the_last_error_says_how_often_and_for_how_long_it_was_tried():
    with pytest.raises(StorageError, match=r"^\[Errno 5\] third \(tried 3 times in 0\.0 s\)$") as caught:
        do(
            RetryPolicy(attempts=3, initial=0.0),
            failing(OSError("first"), OSError("second"), OSError(5, "third")),
        )
    assert caught.value.errno == 5 and isinstance(caught.value.__cause__, OSError)


def test_what_lasts_until_somebody_changes_it_is_not_tried_again():
    slept, refused = [], StorageError("read-only")
    refused.errno = errno.EROFS
    with pytest.raises(StorageError) as caught:
        do(RetryPolicy(), failing(refused), slept)
    assert caught.value is refused and slept == []


def test_a_policy_of_one_try_leaves_the_error_alone():
    error = OSError("only")
    with pytest.raises(OSError) as caught:
        do(RetryPolicy(attempts=1), failing(error))
    assert caught.value is error
