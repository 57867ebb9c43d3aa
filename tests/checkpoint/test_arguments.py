"""What a load is asked for, as all ranks compare it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dtruntime_torch.checkpoint.arguments import LoadOptions
from dtruntime_torch.errors import InvalidArgument


def test_a_step_that_is_like_an_int_becomes_one():
    step: Any = np.int64(7)
    checked = LoadOptions(step=step).checked()
    assert type(checked.step) is int and checked.step == 7


def test_keys_that_mean_the_same_are_equal():
    assert LoadOptions(keys=["b", "a"]).checked() == LoadOptions(keys=("a", "b", "a")).checked()


@pytest.mark.parametrize("keys", [[], (), [""], ["a", ""]], ids=repr)
def test_keys_without_a_name_are_refused(keys):
    with pytest.raises(
        InvalidArgument, match="no name in it, or an empty one; leave it out to load everything"
    ):
        LoadOptions(keys=keys).checked()


def test_what_is_no_step_is_refused():
    with pytest.raises(InvalidArgument, match="step is -1; it is an integer"):
        LoadOptions(step=-1).checked()


def test_nothing_given_is_everything_of_the_newest():
    assert LoadOptions().checked() == LoadOptions(None, None, strict=True, all_or_nothing=False)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (LoadOptions(), "step None"),
        (LoadOptions(7, ("a", "b")), "step 7 with keys ['a', 'b']"),
        (LoadOptions(strict=False), "step None with strict=False"),
        (
            LoadOptions(7, ["a"], strict=False, all_or_nothing=True),
            "step 7 with keys ['a'] with strict=False with all_or_nothing=True",
        ),
    ],
)
def test_only_what_is_not_the_default_is_named(options, text):
    assert str(options) == text
