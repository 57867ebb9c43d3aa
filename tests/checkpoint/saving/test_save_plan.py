"""Who writes what: over all ranks each element once, evenly, and refused where ranks contradict each other."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtruntime_torch.checkpoint.saving.save_plan import make_save_plan
from dtruntime_torch.checkpoint.specs import FlatSpecs, ObjectSpec, PathKey, SavePlan, TensorSpec
from dtruntime_torch.errors import InvalidArgument
from tests.checkpoint.plan_builders import World, flat, obj, plans_of, tensor, worlds


def names(plan: SavePlan) -> list[str]:
    return [item.name for item in plan.tensors]


@given(worlds(), st.integers(0, 5))
def test_over_all_ranks_each_element_is_written_once(world: World, representative: int) -> None:
    plans = plans_of(world.states, representative)
    held = {spec.fqn: spec for state in world.states for spec in state.tensors if not spec.per_rank}
    written = {fqn: np.zeros(spec.global_shape, int) for fqn, spec in held.items()}
    times = Counter[str]()
    for plan in plans:
        for item in plan.tensors:
            if not item.spec.per_rank:
                box = zip(item.spec.offsets, item.spec.shape, strict=True)
                written[item.name][tuple(slice(start, start + size) for start, size in box)] += 1
                times[item.name] += 1
    for fqn, count in written.items():
        assert (count == 1).all(), fqn
        assert times[fqn] == 1 or count.size, fqn


@given(worlds())
def test_over_all_ranks_each_object_is_written_once_by_the_lowest_rank(world: World) -> None:
    expected: dict[str, int] = {}
    for rank, state in enumerate(world.states):
        for spec in state.objects:
            if not spec.per_rank:
                expected.setdefault(spec.fqn, rank)
    written = [
        (spec.fqn, rank)
        for rank, plan in enumerate(plans_of(world.states))
        for spec in plan.objects
        if not spec.per_rank
    ]
    assert sorted(written) == sorted(expected.items())


@given(worlds())
def test_what_differs_by_rank_is_written_by_each_rank_that_holds_it(world: World) -> None:
    for rank, (state, plan) in enumerate(zip(world.states, plans_of(world.states), strict=True)):
        own = [spec.fqn for spec in state.tensors if spec.per_rank]
        assert [item.name for item in plan.tensors if item.spec.per_rank] == [
            f"{fqn}.rank-{rank:05d}" for fqn in own
        ]
        own_objects = [spec for spec in state.objects if spec.per_rank]
        assert [spec for spec in plan.objects if spec.per_rank] == own_objects


@given(worlds())
def test_a_plan_keeps_the_order_of_the_state(world: World) -> None:
    for plan in plans_of(world.states):
        indices = [item.spec.index for item in plan.tensors]
        assert indices == sorted(indices)


# Single elements are not shared out.
sizes = st.lists(st.integers(0, 1000).filter(lambda size: size != 1), min_size=1, max_size=30)


@given(sizes, st.integers(1, 6))
def test_bytes_of_spread_tensors_are_balanced(sizes: list[int], world_size: int) -> None:
    state = flat(*(tensor(f"t{n}", size, spread=True) for n, size in enumerate(sizes)))
    loads = [sum(item.spec.nbytes for item in plan.tensors) for plan in plans_of([state] * world_size)]
    assert max(loads) - min(loads) <= 4 * max(sizes)
    assert sum(loads) == 4 * sum(sizes)


@given(sizes, st.integers(1, 6))
def test_bytes_of_a_dtensors_replicas_are_balanced(sizes: list[int], world_size: int) -> None:
    everyone = tuple(range(world_size))
    state = flat(*(tensor(f"t{n}", s, layout="replicate", holders=everyone) for n, s in enumerate(sizes)))
    loads = [sum(item.spec.nbytes for item in plan.tensors) for plan in plans_of([state] * world_size)]
    assert max(loads) - min(loads) <= 4 * max(sizes)


def test_a_rank_that_alone_holds_much_gets_less_of_what_it_shares() -> None:
    common = [tensor(f"shared{n}", 10, spread=True) for n in range(4)]
    states = [flat(tensor("own", 20, spread=True), *common), flat(*common)]
    first, second = plans_of(states)
    assert sum(item.spec.nbytes for item in first.tensors) == sum(item.spec.nbytes for item in second.tensors)


def test_a_plain_tensor_is_written_by_the_lowest_rank_that_holds_it() -> None:
    plans = plans_of([flat(), flat(tensor("running_mean", 3)), flat(tensor("running_mean", 3))])
    assert [names(plan) for plan in plans] == [[], ["running_mean"], []]


def test_a_tensor_that_the_optimizer_of_the_lowest_rank_does_not_own_is_not_spread() -> None:
    shared, bare = tensor("w", 8, spread=True), tensor("w", 8)
    assert [names(plan) for plan in plans_of([flat(bare), flat(shared)])] == [["w"], []]
    both = flat(shared, tensor("v", 8, spread=True))
    assert [names(plan) for plan in plans_of([both, flat(bare), flat(bare)])] == [["w", "v"], [], []]


def test_every_shard_is_written_also_where_no_optimizer_owns_it() -> None:
    states = [
        flat(
            tensor("w", 4, layout="s", holders=(r,), offsets=(2 * r,), shape=(2,), spread=bool(r)),
        )
        for r in (0, 1)
    ]
    assert [names(plan) for plan in plans_of(states)] == [["w"], ["w"]]


def test_the_largest_are_placed_first() -> None:
    state = flat(*(tensor(f"t{size}{n}", size, spread=True) for n, size in enumerate([2, 2, 4])))
    assert [sum(item.spec.nbytes for item in plan.tensors) for plan in plans_of([state] * 2)] == [16, 16]


def test_single_elements_are_written_by_the_lowest_rank_so_that_few_parts_have_to_be_read() -> None:
    """As AdamW's steps, beside the shards of FSDP2."""

    def shard(rank: int) -> TensorSpec:
        return tensor("w", 8, layout="mesh", offsets=(2 * rank,), shape=(2,), holders=(rank,), spread=True)

    steps = [tensor(f"step{n}", spread=True) for n in range(8)]
    plans = plans_of([flat(shard(rank), *steps) for rank in range(4)])
    assert [len(plan.tensors) for plan in plans] == [9, 1, 1, 1]
    assert [plan.completed_by for plan in plans] == [(), (0,), (0,), (0,)]


@pytest.mark.parametrize("inner", [tensor("m.a", 3), obj("m.a")], ids=["a tensor", "an object"])
def test_what_is_a_value_on_one_rank_and_a_container_on_another_is_refused(
    inner: TensorSpec | ObjectSpec,
) -> None:
    below = replace(inner, path=(PathKey("dict", "m"), PathKey("dict", "a")))
    told = r"'m' on ranks \[0\] is a value by itself, and has 'm.a' on ranks \[1\] in it.*PerRank"
    with pytest.raises(InvalidArgument, match=told):
        plans_of([flat(obj("m")), flat(below)])


def test_an_empty_dict_gives_way_to_what_others_hold_in_it() -> None:
    below = replace(obj("m.a"), path=(PathKey("dict", "m"), PathKey("dict", "a")))
    assert len(plans_of([flat(replace(obj("m"), is_empty=True)), flat(below)])) == 2


def test_a_key_with_a_dot_is_no_container() -> None:
    assert len(plans_of([flat(obj("m")), flat(obj("m.a"))])) == 2


def test_what_differs_by_rank_may_be_a_value_on_one_and_a_container_on_another() -> None:
    below = replace(obj("m.a", per_rank=True), path=(PathKey("dict", "m"), PathKey("dict", "a")))
    assert len(plans_of([flat(obj("m", per_rank=True)), flat(below)])) == 2


def test_tied_tensors_are_written_under_each_name() -> None:
    (plan,) = plans_of([flat(tensor("embed", 4), tensor("head", 4, alias="embed"))])
    assert names(plan) == ["embed", "head"]


def test_of_two_layouts_of_one_name_that_of_the_lowest_rank_is_written() -> None:
    def half(rank: int, layout: str, first: int) -> FlatSpecs:
        offset = 2 * (rank - first)
        spec = tensor("w", 4, layout=layout, holders=(rank,), offsets=(offset,), shape=(2,), spread=True)
        return flat(spec)

    states = [half(0, "a", 0), half(1, "a", 0), half(2, "b", 2), half(3, "b", 2)]
    assert [names(plan) for plan in plans_of(states)] == [["w"], ["w"], [], []]


def test_a_holder_that_leaves_the_tensor_out_of_its_state_is_not_counted_on() -> None:
    spec = tensor("w", 4, layout="replicate", holders=(0, 1))
    assert [names(plan) for plan in plans_of([flat(), flat(spec)])] == [[], ["w"]]


def test_of_a_dtensor_without_elements_one_rank_stores_the_whole_shape() -> None:
    states = [
        flat(tensor("w", 4, 0, layout="s", holders=(r,), offsets=(2 * r, 0), shape=(2, 0))) for r in (0, 1)
    ]
    first, second = plans_of(states)
    assert (first.tensors[0].spec.offsets, first.tensors[0].spec.shape) == ((0, 0), (4, 0))
    assert not second.tensors


def test_an_empty_shard_is_not_written() -> None:
    states = [
        flat(tensor("w", 1, layout="s", holders=(r,), offsets=(min(r, 1),), shape=(1 - r,))) for r in (0, 1)
    ]
    assert [names(plan) for plan in plans_of(states)] == [["w"], []]


def test_bytes_may_differ_in_length_and_are_the_lowest_ranks() -> None:
    states = [flat(tensor("blob", n, dtype="uint8", is_bytes=True)) for n in (3, 5)]
    assert [names(plan) for plan in plans_of(states)] == [["blob"], []]


@pytest.mark.parametrize(
    ("other", "description"),
    [
        (tensor("x", 3), "float32 tensor of shape [3]"),
        (tensor("x", 2, dtype="int64"), "int64 tensor of shape [2]"),
        (tensor("x", 2, per_rank=True), "dt.PerRank float32 tensor of shape [2]"),
        (tensor("x", 2, dtype="uint8", is_bytes=True), "bytes of length 2"),
        (obj("x"), "no tensor"),
    ],
)
def test_a_name_for_different_things_is_refused_by_all_ranks(other, description: str) -> None:
    states = [flat(tensor("x", 2)), flat(tensor("x", 2)), flat(other)]
    with pytest.raises(InvalidArgument) as refusal:
        plans_of(states)
    assert "'x' differs between ranks: float32 tensor of shape [2] on ranks [0, 1]; " in str(refusal.value)
    assert f"{description} on ranks [2]" in str(refusal.value)


@pytest.mark.parametrize(
    ("specs", "hint"),
    [
        ([tensor("__metadata__", 2)], "__metadata__"),
        ([tensor("a\ud800", 2)], "not valid Unicode"),
        ([tensor("x", 2, per_rank=True), tensor("x.rank-00000", 2)], "'x.rank-00000'; rename"),
    ],
)
def test_a_name_that_cannot_be_stored_is_refused(specs, hint: str) -> None:
    with pytest.raises(InvalidArgument, match=hint):
        plans_of([flat(*specs)])


def test_a_sharded_tensor_that_is_marked_per_rank_is_refused() -> None:
    spec = tensor("w", 4, layout="s", holders=(0,), shape=(2,), per_rank=True)
    with pytest.raises(InvalidArgument, match="'w' is a sharded DTensor in dt.PerRank"):
        plans_of([flat(spec)])


def test_planning_ten_thousand_tensors_of_many_ranks_is_quick() -> None:
    everyone = tuple(range(64))
    state = flat(
        *(tensor(f"plain{n}", 5, spread=True) for n in range(5000)),
        *(tensor(f"replicated{n}", 5, layout="r", holders=everyone) for n in range(5000)),
    )
    began = time.process_time()
    make_save_plan(3, 64, state, {"all": state}, {"all": everyone})
    assert time.process_time() - began < 1.0
