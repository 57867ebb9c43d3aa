"""The sampler's order, its resume and its refusals; where stock has an answer, beside stock."""

from __future__ import annotations

import copy
import time
import tracemalloc
from collections.abc import Mapping
from itertools import chain, islice

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DistributedSampler

from dtruntime_torch import _C
from dtruntime_torch.errors import InvalidArgument
from dtruntime_torch.sampler import BLOCK, ElasticDistributedSampler

LENGTHS = (1, 2, 3, 7, 8, 9, 31, 32, 33, 257, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5)
WORLD_SIZES = (1, 2, 3, 4, 7, 40)


def make(n: int, world_size: int = 1, rank: int = 0, **options: object) -> ElasticDistributedSampler:
    return ElasticDistributedSampler(range(n), world_size, rank, **options)  # type: ignore[arg-type]


def stock_for(n: int, world_size: int, rank: int, drop_last: bool = False) -> DistributedSampler[int]:
    return DistributedSampler(range(n), world_size, rank, shuffle=False, drop_last=drop_last)  # type: ignore[arg-type]


def at(consumed: int, n: int, world_size: int, rank: int, **options: object) -> ElasticDistributedSampler:
    sampler = make(n, world_size, rank, **options)
    sampler.load_state_dict(sampler.state_dict() | {"consumed": consumed})
    return sampler


def order(n: int, seed: int = 0, epoch: int = 0) -> list[int]:
    return _C.permute(n, (seed, epoch), 0, 1, n, 0)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("n", LENGTHS)
def test_without_shuffle_the_indices_are_stocks(n: int, world_size: int, drop_last: bool) -> None:
    for rank in range(world_size):
        ours = make(n, world_size, rank, shuffle=False, drop_last=drop_last)
        stock = stock_for(n, world_size, rank, drop_last)
        assert list(ours) == list(stock)
        assert (len(ours), ours.num_samples, ours.total_size) == (
            len(stock),
            stock.num_samples,
            stock.total_size,
        )
        assert ours.remaining == len(stock)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("n", LENGTHS)
def test_with_shuffle_the_ranks_share_the_permutation_as_stock_shares_a_range(
    n: int, world_size: int, drop_last: bool
) -> None:
    permutation = order(n, seed=5, epoch=3)
    for rank in range(world_size):
        ours = make(n, world_size, rank, seed=5, drop_last=drop_last)
        ours.set_epoch(3)
        stock = stock_for(n, world_size, rank, drop_last)
        assert list(ours) == [permutation[position] for position in stock]


def test_an_epoch_is_a_permutation() -> None:
    assert sorted(make(1000)) == list(range(1000))


def test_epochs_and_seeds_differ() -> None:
    orders = set()
    for seed, epoch in [(0, 0), (0, 1), (1, 0), (1, 1), (-1, 0), (2**64 - 2, 0)]:
        sampler = make(50, seed=seed)
        sampler.set_epoch(epoch)
        orders.add(tuple(sampler))
    assert len(orders) == 6


def test_it_is_a_distributed_sampler() -> None:
    assert isinstance(make(3), DistributedSampler)


def test_an_epoch_is_iterated_again_without_tracking_as_stock_does() -> None:
    sampler = make(20, 2)
    assert list(sampler) == list(sampler)


def test_two_iterators_do_not_disturb_each_other() -> None:
    sampler = make(20)
    first, second = iter(sampler), iter(sampler)
    assert list(islice(first, 5)) == list(islice(second, 5))


@pytest.mark.parametrize("shuffle", [False, True])
def test_the_first_index_of_a_billion_samples_takes_no_time_and_no_memory(shuffle: bool) -> None:
    sampler = make(10**9, 8, 3, shuffle=shuffle)
    tracemalloc.start()
    try:
        begin = time.perf_counter()
        list(islice(sampler, 3 * BLOCK))
        assert time.perf_counter() - begin < 1
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


@given(st.data(), st.integers(1, 60), st.booleans(), st.booleans())
def test_any_split_into_runs_of_any_size_consumes_the_reference_order_once(
    data: st.DataObject, n: int, shuffle: bool, drop_last: bool
) -> None:
    reference = order(n, seed=9, epoch=2) if shuffle else list(range(n))
    state: Mapping[str, object] | None = None
    served: list[int] = []
    while True:
        world_size = data.draw(st.integers(1, 5), label="world size")
        samplers = [
            make(n, world_size, r, shuffle=shuffle, seed=9, drop_last=drop_last) for r in range(world_size)
        ]
        for sampler in samplers:
            sampler.set_epoch(2)
            if state is not None:
                sampler.load_state_dict(state)
        left = samplers[0].remaining
        if left == 0:
            break
        taken = data.draw(st.integers(1, left), label="samples per rank")
        served += chain.from_iterable(zip(*(islice(s, taken) for s in samplers), strict=True))
        state = samplers[0].state_dict() | {"consumed": len(served)}
    assert served == (reference * 6)[: len(served)]
    if drop_last:
        assert n - world_size < len(served) <= n
    else:
        assert n <= len(served) < n + 5


@given(st.integers(1, 80), st.sampled_from([6, 12]), st.integers(0, 90))
def test_with_the_same_global_batch_a_step_sees_the_same_samples_on_any_world_size(
    n: int, global_batch: int, consumed: int
) -> None:
    def steps(world_size: int) -> list[list[int]]:
        ranks = [list(at(consumed, n, world_size, rank)) for rank in range(world_size)]
        positions = list(chain.from_iterable(zip(*ranks, strict=True)))[: max(n - consumed, 0)]
        return [positions[i : i + global_batch] for i in range(0, len(positions), global_batch)]

    assert steps(1) == steps(2) == steps(3) == steps(6)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("consumed", [0, 1, 9, 10, 11, 12, 100])
def test_remaining_is_what_iterating_still_yields(consumed: int, drop_last: bool) -> None:
    for rank in range(4):
        sampler = at(consumed, 10, 4, rank, drop_last=drop_last)
        assert sampler.remaining == len(list(sampler))
        assert len(sampler) == (2 if drop_last else 3)


@pytest.mark.parametrize("consumed", [10, 12, 13, 1000])
def test_a_state_at_the_end_yields_nothing_until_the_next_epoch(consumed: int) -> None:
    sampler = at(consumed, 10, 4, 1)
    assert list(sampler) == list(sampler) == []
    sampler.set_epoch(1)
    assert len(list(sampler)) == 3


def test_a_resumed_tail_is_padded_with_the_epochs_first_samples() -> None:
    assert [list(at(7, 10, 4, rank, shuffle=False)) for rank in range(4)] == [[7], [8], [9], [0]]


def test_a_resumed_tail_is_dropped_where_it_does_not_divide() -> None:
    assert [list(at(3, 10, 4, r, shuffle=False, drop_last=True)) for r in range(4)] == [[3], [4], [5], [6]]


def test_set_epoch_keeps_the_position_of_the_same_epoch() -> None:
    sampler = at(4, 10, 1, 0)
    sampler.set_epoch(0)
    assert sampler.remaining == 6
    sampler.set_epoch(1)
    assert (sampler.remaining, sampler.epoch) == (10, 1)


@pytest.mark.parametrize("epoch", [-1, 2**64, 1.0, "1", None, True])
def test_a_bad_epoch_is_refused_and_changes_nothing(epoch: object) -> None:
    sampler = at(4, 10, 1, 0)
    with pytest.raises(InvalidArgument, match="epoch"):
        sampler.set_epoch(epoch)  # type: ignore[arg-type]
    assert (sampler.epoch, sampler.remaining) == (0, 6)


def test_the_state_is_plain_and_the_same_on_all_ranks() -> None:
    states = [at(4, 10, 3, rank, seed=7).state_dict() for rank in range(3)]
    assert states[0] == states[1] == states[2]
    assert states[0] == {"version": 0, "epoch": 0, "consumed": 4, "seed": 7, "n": 10, "shuffle": True}
    assert {type(value) for value in states[0].values()} == {int, bool}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"n": 11}, "length is 11"),
        ({"seed": 1}, "seed is 1"),
        ({"version": 1}, "version is 1"),
        ({"shuffle": False}, "shuffle is False"),
        ({"epoch": -1}, "epoch"),
        ({"consumed": -1}, "consumed"),
        ({"epoch": 1.0}, "'epoch'"),
        ({"consumed": "3"}, "'consumed'"),
        ({"consumed": True}, "'consumed'"),
        ({"shuffle": 1}, "'shuffle'"),
        ({"n": None}, "'n'"),
        ({"consumed": 2**64}, "consumed"),
        ({"more": 1}, "exactly"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(
    change: dict[str, object], named: str
) -> None:
    sampler = at(4, 10, 1, 0)
    before = sampler.state_dict()
    with pytest.raises(InvalidArgument, match=named):
        sampler.load_state_dict(before | {"epoch": 5} | change)
    assert sampler.state_dict() == before


@pytest.mark.parametrize("state", [None, [], {}, {"epoch": 1}, "state"])
def test_what_is_no_state_is_refused(state: object) -> None:
    with pytest.raises(InvalidArgument, match="exactly"):
        make(10).load_state_dict(state)  # type: ignore[arg-type]


@pytest.mark.parametrize("rank", [-1, 3, 4])
def test_a_rank_outside_the_world_is_refused_as_stock_refuses_it(rank: int) -> None:
    with pytest.raises(ValueError, match="Invalid rank"):
        DistributedSampler(range(5), 3, rank)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="Invalid rank"):
        make(5, 3, rank)


def test_without_a_process_group_the_ranks_must_be_given() -> None:
    with pytest.raises(ValueError):
        DistributedSampler(range(5))  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="num_replicas"):
        ElasticDistributedSampler(range(5))  # type: ignore[arg-type]


def test_an_empty_dataset_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="no samples"):
        make(0)


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, 0.5, "0", None, False])
def test_a_bad_seed_is_refused(seed: object) -> None:
    with pytest.raises(InvalidArgument, match="seed"):
        make(5, seed=seed)


def test_a_copy_goes_on_where_the_original_stands() -> None:
    sampler = at(4, 10, 2, 1)
    assert list(copy.deepcopy(sampler)) == list(sampler)


def test_a_dataset_without_a_length_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="no length"):
        ElasticDistributedSampler(iter([]), num_replicas=1, rank=0)  # type: ignore[arg-type]
