"""The keyed permutation: a bijection for every length, sliced as one likes, the same everywhere."""

from __future__ import annotations

import json
from collections import Counter
from itertools import permutations
from math import isqrt
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtruntime_torch import _C
from tests.boundaries import COUNTS

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "permutation.json").read_text())
WORD = (1 << 64) - 1
MOST = 1 << 62
words = st.integers(0, WORD)


def whole(n: int, key: tuple[int, int] = (1, 2)) -> list[int]:
    return _C.permute(n, key, start=0, stride=1, count=n)


def splitmix64(z: int) -> int:
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & WORD
    z = (z ^ z >> 27) * 0x94D049BB133111EB & WORD
    return z ^ z >> 31


def reference(n: int, key: tuple[int, int], position: int) -> int:
    """The definition once more, in the plainest words."""
    golden = 0x9E3779B97F4A7C15
    state = splitmix64((splitmix64(key[0] + golden & WORD) ^ key[1]) + golden & WORD)
    keys = [splitmix64(state + golden * i & WORD) for i in range(1, 9)]
    a = isqrt(n - 1) + 1
    b = -(-n // a)
    while True:
        right, left = divmod(position, a)
        for i in range(0, 8, 2):
            left = (left + (splitmix64(right + keys[i] & WORD) * a >> 64)) % a
            right = (right + (splitmix64(left + keys[i + 1] & WORD) * b >> 64)) % b
        position = left + a * right
        if position < n:
            return position


@pytest.mark.parametrize("n", COUNTS)
def test_it_is_a_bijection(n):
    for key in ((0, 0), (1, 2), (WORD, WORD)):
        assert sorted(whole(n, key)) == list(range(n))


def test_the_golden_vectors_hold():
    for case in VECTORS["cases"]:
        key = (case["seed"], case["epoch"])
        arguments = (case["n"], key, case["start"], case["stride"], len(case["values"]), VECTORS["version"])
        assert _C.permute(*arguments) == case["values"], case


@given(st.one_of(st.integers(1, 5000), st.integers(1, MOST)), words, words, st.data())
def test_it_agrees_with_its_definition(n, seed, epoch, data):
    position = data.draw(st.integers(0, n - 1))
    assert _C.permute(n, (seed, epoch), position, 1, 1) == [reference(n, (seed, epoch), position)]


@given(st.integers(1, 3000), words, st.data())
def test_a_slice_is_a_slice_of_the_whole(n, seed, data):
    start = data.draw(st.integers(0, n - 1))
    stride = data.draw(st.integers(1, n + 5))
    count = data.draw(st.integers(0, (n - 1 - start) // stride + 1))
    values = _C.permute(n, (seed, 9), start, stride, count)
    assert values == whole(n, (seed, 9))[start::stride][:count]


@pytest.mark.parametrize("n", [MOST, MOST - 1, (1 << 32) + 1, (1 << 61) + 1])
def test_the_largest_lengths_give_distinct_values_in_range(n):
    values = _C.permute(n, (5, 6), 0, n // 1000, 1000) + _C.permute(n, (5, 6), n - 1, 1, 1)
    assert len(set(values)) == 1001
    assert all(0 <= value < n for value in values)


def test_seed_and_epoch_change_the_order():
    orders = {tuple(whole(1000, key)) for key in ((0, 0), (0, 1), (1, 0), (1, 1), (1 << 63, 0), (0, 1 << 63))}
    assert len(orders) == 6


def test_every_order_of_four_is_reached_alike():
    orders = Counter(tuple(whole(4, (7, epoch))) for epoch in range(24_000))
    assert set(orders) == set(permutations(range(4)))
    assert max(abs(count - 1000) for count in orders.values()) < 160  # five standard deviations


def test_every_place_gets_every_value_alike():
    for position in (0, 6):
        values = Counter(_C.permute(7, (seed, 1), position, 1, 1)[0] for seed in range(7000))
        assert max(abs(count - 1000) for count in values.values()) < 150  # five standard deviations


def test_nothing_is_asked_of_an_empty_range():
    assert _C.permute(0, (0, 0), 0, 1, 0) == []
    assert _C.permute(5, (0, 0), 9, 1, 0) == []


@pytest.mark.parametrize("version", [-1, 1, 2, 1000])
def test_an_unknown_version_is_refused(version):
    with pytest.raises(ValueError, match="version"):
        _C.permute(10, (0, 0), 0, 1, 10, version)


@pytest.mark.parametrize(
    ("n", "start", "stride", "count"),
    [
        (0, 0, 1, 1),
        (-1, 0, 1, 0),
        (MOST + 1, 0, 1, 1),
        (10, 10, 1, 1),
        (10, 0, 1, 11),
        (10, 1, 3, 4),
        (10, 0, 0, 1),
        (10, 0, -1, 1),
        (10, -1, 1, 1),
        (10, 0, 1, -1),
        (10, 2, (1 << 63) - 1, 3),  # in 64 bits the last position wraps round to 0
        (10, 0, 1, (1 << 63) - 1),
    ],
)
def test_positions_outside_the_range_are_refused(n, start, stride, count):
    with pytest.raises(ValueError):
        _C.permute(n, (0, 0), start, stride, count)
