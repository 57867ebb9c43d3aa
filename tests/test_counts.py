"""Counts and numbers at the door: what is none is refused with its name, and not later with a TypeError."""

from __future__ import annotations

import pytest

from dtruntime_torch.counts import check_count, check_number
from dtruntime_torch.errors import InvalidArgument


@pytest.mark.parametrize("count", [2, 7])
def test_a_count_comes_back_as_it_is(count):
    assert check_count("files", count, least=2, most=7) == count


@pytest.mark.parametrize("count", [1, 8, 2.5, 3.0, True, "3", None, [3]])
def test_what_is_no_count_or_out_of_range_is_refused_by_name(count):
    with pytest.raises(InvalidArgument, match="files is .* it is a whole number from 2 to 7"):
        check_count("files", count, least=2, most=7)


@pytest.mark.parametrize("number", ["3", None, True, [3.0], 3j])
def test_what_is_no_number_is_refused_by_name(number):
    with pytest.raises(InvalidArgument, match="share is "):
        check_number("share", number)
