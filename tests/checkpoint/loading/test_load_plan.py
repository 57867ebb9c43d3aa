"""Who needs what, beside NumPy: whatever way a tensor is stored, reading a box of it equals slicing it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtruntime_torch.checkpoint.format.records import Part, TensorEntry
from dtruntime_torch.checkpoint.loading.load_plan import index_parts, make_load_plan, whole_specs
from dtruntime_torch.checkpoint.specs import LoadPlan, SavePlan, Shape, TensorSpec
from dtruntime_torch.errors import CheckpointMismatch, CorruptCheckpoint
from tests.checkpoint.plan_builders import (
    Box,
    flat,
    obj,
    part_of,
    plans_of,
    stored,
    stored_object,
    tensor,
    worlds,
)


def whole(fqn: str, *shape: int) -> TensorSpec:
    return tensor(fqn, *shape, dtype="int64")


def box_of(fqn: str, global_shape: Shape, box: Box) -> TensorSpec:
    return tensor(fqn, *global_shape, dtype="int64", offsets=box[0], shape=box[1])


def plan(parts: dict[int, Part], *wanted: TensorSpec, rank: int = 0) -> LoadPlan:
    return make_load_plan(index_parts(parts, rank), parts, wanted)


def slices(offsets: Shape, shape: Shape) -> tuple[slice, ...]:
    return tuple(slice(start, start + size) for start, size in zip(offsets, shape, strict=True))


@st.composite
def partitions(draw: st.DrawFn, shape: Shape) -> list[Box]:
    """Boxes that make up an array, cut again and again anywhere along any dimension."""
    boxes: list[Box] = [((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 6)) if shape else 0):
        offsets, sizes = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        axis = draw(st.integers(0, len(shape) - 1))
        cut = draw(st.integers(0, sizes[axis]))
        for start, size in ((0, cut), (cut, sizes[axis] - cut)):
            moved = (*offsets[:axis], offsets[axis] + start, *offsets[axis + 1 :])
            boxes.append((moved, (*sizes[:axis], size, *sizes[axis + 1 :])))
    return draw(st.permutations(boxes))


@st.composite
def boxes_in(draw: st.DrawFn, shape: Shape) -> Box:
    starts = tuple(draw(st.integers(0, size)) for size in shape)
    return starts, tuple(draw(st.integers(0, size - at)) for size, at in zip(shape, starts, strict=True))


@given(st.data(), st.lists(st.integers(0, 6), max_size=3).map(tuple), st.integers(1, 4))
def test_reading_a_box_equals_slicing(data: st.DataObject, shape: Shape, n_ranks: int) -> None:
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    boxes = data.draw(partitions(shape))
    entries: dict[int, list[TensorEntry]] = {0: [stored("other", (2,))]}
    for box in boxes:
        entries.setdefault(data.draw(st.integers(0, n_ranks - 1)), []).append(stored("x", shape, box))
    parts = {rank: part_of(rank, *held) for rank, held in entries.items()}
    wanted = [box_of("x", shape, data.draw(boxes_in(shape))) for _ in range(2)]
    made = plan(parts, *wanted)
    for spec in wanted:
        target, times = np.full(spec.shape, -1), np.zeros(spec.shape, int)
        for item in made.items:
            if item.wanted is spec:
                entry = parts[item.rank].tensors[item.entry]
                source = array[slices(entry.offsets, entry.shape)]
                target[slices(item.target, item.shape)] = source[slices(item.source, item.shape)]
                times[slices(item.target, item.shape)] += 1
        assert (times == 1).all()
        np.testing.assert_array_equal(target, array[slices(spec.offsets, spec.shape)])


def parts_of(plans: Sequence[SavePlan]) -> dict[int, Part]:
    """What is stored if all ranks write what was planned."""
    return {
        saved.rank: part_of(
            saved.rank,
            *(
                stored(
                    item.spec.fqn,
                    item.spec.global_shape,
                    (item.spec.offsets, item.spec.shape),
                    dtype=item.spec.dtype,
                    per_rank=item.spec.per_rank,
                )
                for item in saved.tensors
            ),
            *(stored_object(spec.fqn, per_rank=spec.per_rank) for spec in saved.objects),
        )
        for saved in plans
    }


def completed(plan: SavePlan, parts: Mapping[int, Part]) -> dict[int, Part]:
    """The part of a rank, and those that complete it."""
    return {rank: parts[rank] for rank in (plan.rank, *plan.completed_by)}


@given(worlds())
def test_what_was_planned_to_be_saved_can_be_loaded_by_every_rank(world) -> None:
    parts = parts_of(plans_of(world.states))
    for rank, state in enumerate(world.states):
        saved = index_parts(parts, rank)
        make_load_plan(saved, parts, state.tensors)
        assert {spec.fqn for spec in state.objects} <= saved.objects.keys()


@given(worlds(), st.integers(0, 5))
def test_a_part_and_those_that_complete_it_name_all_that_there_is(world, representative) -> None:
    plans = plans_of(world.states, representative)
    parts = parts_of(plans)
    for own in plans:
        every, some = (index_parts(of, own.rank) for of in (parts, completed(own, parts)))
        assert every.tensors.keys() == some.tensors.keys()
        assert every.objects.keys() == some.objects.keys()


@given(worlds())
def test_a_part_and_those_that_complete_it_hold_all_that_the_rank_held(world) -> None:
    plans = plans_of(world.states)
    parts = parts_of(plans)
    for own in plans:
        some = completed(own, parts)
        make_load_plan(index_parts(some, own.rank), some, world.states[own.rank].tensors)


def test_shards_of_dtensors_are_completed_by_who_writes_what_is_replicated() -> None:
    states = [
        flat(
            tensor("w", 8, layout="mesh", offsets=(2 * rank,), shape=(2,), holders=(rank,)),
            tensor("step"),
            obj("lr"),
        )
        for rank in range(4)
    ]
    assert [plan.completed_by for plan in plans_of(states)] == [(), (0,), (0,), (0,)]


def test_a_shard_that_is_empty_is_completed_by_who_may_write_the_first() -> None:
    """As five classes on eight ranks."""
    rows = [(rank, 1) if rank < 5 else (5, 0) for rank in range(8)]
    states = [
        flat(
            tensor("head", 5, layout="m", offsets=(at,), shape=(n,), holders=(rank,), first_holders=(0,)),
            tensor("step"),
        )
        for rank, (at, n) in enumerate(rows)
    ]
    assert {plan.completed_by for plan in plans_of(states)[1:]} == {(0,)}


def test_a_shard_that_others_write_otherwise_is_completed_by_all() -> None:
    def half(rank: int) -> TensorSpec:
        first = rank // 2 * 2
        at = (4 * (rank - first),)
        return tensor(
            "w", 8, layout=f"{first}", offsets=at, shape=(4,), holders=(rank,), first_holders=(first,)
        )

    plans = plans_of([flat(half(rank)) for rank in range(4)])
    assert [plan.completed_by for plan in plans] == [(), (), (0, 1, 3), (0, 1, 2)]


def test_a_stage_is_completed_by_one_writer_of_each_other_stage() -> None:
    def shard(fqn: str, first: int, rank: int) -> TensorSpec:
        return tensor(fqn, 8, layout=fqn, offsets=(4 * (rank - first),), shape=(4,), holders=(rank,))

    states = [flat(shard(f"stage{rank // 2}", rank // 2 * 2, rank)) for rank in range(6)]
    for plan in plans_of(states):
        stages = [other // 2 for other in plan.completed_by]
        assert sorted([*stages, plan.rank // 2]) == [0, 1, 2]


@given(st.data(), st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple))
def test_a_missing_shard_is_a_gap(data: st.DataObject, shape: Shape) -> None:
    boxes = [box for box in data.draw(partitions(shape)) if np.prod(box[1])]
    kept = [stored("x", shape, box) for box in boxes[1:]] or [stored("x", shape, ((0,) * len(shape),) * 2)]
    with pytest.raises(CorruptCheckpoint, match=r"tensor 'x': .* leave a gap"):
        plan({0: part_of(0, *kept)}, whole("x", *shape))


@given(st.data(), st.lists(st.integers(1, 5), max_size=3).map(tuple))
def test_a_shard_stored_twice_is_an_overlap(data: st.DataObject, shape: Shape) -> None:
    boxes = [box for box in data.draw(partitions(shape)) if np.prod(box[1], dtype=int)]
    again = data.draw(st.sampled_from(boxes))
    parts = {0: part_of(0, *(stored("x", shape, b) for b in boxes)), 1: part_of(1, stored("x", shape, again))}
    with pytest.raises(CorruptCheckpoint, match=r"tensor 'x': .* ranks .* overlap"):
        plan(parts, whole("x", *shape))


def test_an_overlap_that_makes_up_for_a_gap_is_found() -> None:
    boxes = [((0, 0), (2, 2)), ((1, 0), (1, 2)), ((3, 0), (1, 2))]
    with pytest.raises(CorruptCheckpoint, match="overlap"):
        plan({0: part_of(0, *(stored("x", (4, 2), box) for box in boxes))}, whole("x", 4, 2))


def test_shards_that_touch_nothing_wanted_are_not_read() -> None:
    parts = {r: part_of(r, stored("x", (4,), ((r,), (1,)))) for r in range(4)}
    assert [item.rank for item in plan(parts, box_of("x", (4,), ((1,), (2,)))).items] == [1, 2]


def test_a_tensor_without_elements_needs_no_reads() -> None:
    assert plan({0: part_of(0, stored("x", (0, 3)))}, whole("x", 0, 3)).items == ()


@pytest.mark.parametrize("wanted", [whole("y", 4), whole("x", 5), tensor("x", 4, dtype="float32")])
def test_what_the_checkpoint_does_not_hold_is_a_mismatch(wanted: TensorSpec) -> None:
    with pytest.raises(CheckpointMismatch, match=f"tensor '{wanted.fqn}'"):
        plan({0: part_of(0, stored("x", (4,)))}, wanted)


def test_of_what_differs_by_rank_a_rank_sees_its_own() -> None:
    parts = {
        r: part_of(r, stored("seed", (r,), per_rank=True), stored_object("rng", r, per_rank=True))
        for r in (0, 1)
    }
    for rank in (0, 1):
        saved = index_parts(parts, rank)
        assert saved.tensors["seed"].global_shape == (rank,)
        assert saved.tensors["seed"].per_rank
        assert saved.objects["rng"].value == rank
    assert index_parts(parts, 2).tensors == {}
    assert index_parts(parts, 2).objects == {}


@pytest.mark.parametrize(
    "other",
    [
        stored("x", (3,)),
        stored("x", (4,), dtype="float64"),
        stored("x", (4,), is_bytes=True),
        stored_object("x"),
    ],
)
def test_parts_that_contradict_each_other_are_corrupt(other) -> None:
    for parts in (
        {0: part_of(0, stored("x", (4,))), 1: part_of(1, other)},
        {0: part_of(0, other), 1: part_of(1, stored("x", (4,)))},
    ):
        with pytest.raises(CorruptCheckpoint, match=r"ranks \[0, 1\] contradict each other about 'x'"):
            index_parts(parts, 0)


def test_an_object_stored_twice_is_corrupt() -> None:
    with pytest.raises(CorruptCheckpoint, match=r"ranks \[0, 1\] contradict"):
        index_parts({r: part_of(r, stored_object("x")) for r in (0, 1)}, 0)


def test_what_is_known_of_a_tensor_is_kept() -> None:
    entry = stored("x", (4,), alias="y", index=7)
    saved = index_parts({3: part_of(3, stored("w", (1,)), entry)}, 0).tensors["x"]
    assert (saved.dtype, saved.path, saved.index, saved.alias) == ("int64", entry.path, 7, "y")
    assert saved.shards == ((3, 1),)


def test_everything_can_be_wanted_whole() -> None:
    parts = {r: part_of(r, stored("x", (4,), ((2 * r,), (2,))), stored("e", (0,))) for r in (0, 1)}
    saved = index_parts(parts, 0)
    specs = whole_specs(saved)
    assert [(spec.fqn, spec.offsets, spec.shape) for spec in specs] == [("x", (0,), (4,)), ("e", (0,), (0,))]
    assert [item.target for item in make_load_plan(saved, parts, specs).items] == [(0,), (2,)]


def test_many_shards_are_checked_for_overlaps_quickly() -> None:
    parts = {r: part_of(r, stored("x", (4000, 2), ((r, 0), (1, 2)))) for r in range(4000)}
    began = time.process_time()
    assert len(plan(parts, whole("x", 4000, 2)).items) == 4000
    assert time.process_time() - began < 1.0
