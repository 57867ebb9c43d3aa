"""What goes straight to where it belongs, beside NumPy: every wanted byte lands once, and only whole chunks are read."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtruntime_torch.checkpoint.loading import landings as module
from dtruntime_torch.checkpoint.loading.chunk_needs import Run
from dtruntime_torch.checkpoint.loading.landings import Landing, Landings, find_landings, from_turn
from dtruntime_torch.checkpoint.loading.load_plan import index_parts, make_load_plan, whole_specs
from tests.checkpoint.loading.test_chunk_needs import checkpoints, whole
from tests.checkpoint.loading.test_load_plan import boxes_in, slices
from tests.checkpoint.plan_builders import tensor


@given(st.data(), checkpoints())
def test_every_wanted_byte_lands_once_where_it_belongs(data: st.DataObject, checkpoint) -> None:
    parts, shapes = checkpoint
    saved = index_parts(parts, 0)
    arrays = {name: np.random.default_rng(1).integers(1, 1 << 60, shape) for name, shape in shapes.items()}
    boxes = {name: data.draw(boxes_in(shapes[name])) for name in saved.tensors}
    specs = [
        tensor(name, *shapes[name], dtype="int64", offsets=offsets, shape=shape)
        for name, (offsets, shape) in boxes.items()
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE_BYTES", data.draw(st.sampled_from([1, 48, 1 << 20])))
        found = find_landings(make_load_plan(saved, parts, specs), boxes, parts)
    memory = {spec.fqn: bytearray(spec.nbytes) for spec in specs}
    landed = {spec.fqn: np.zeros(spec.nbytes, int) for spec in specs}
    for landing in (*found.straight, *found.edges):
        run, entry = landing.run, parts[landing.run.part].tensors[landing.run.entry]
        chunk_bytes = parts[run.part].chunk_bytes
        assert run.start % chunk_bytes == 0
        assert run.length % chunk_bytes == 0 or run.start + run.length == entry.nbytes
        stored = arrays[entry.fqn][slices(entry.offsets, entry.shape)].tobytes()
        source = run.start + landing.skip
        memory[landing.fqn][landing.at : landing.at + landing.length] = stored[
            source : source + landing.length
        ]
        landed[landing.fqn][landing.at : landing.at + landing.length] += 1
    assert all((one.skip, one.length) == (0, one.run.length) for one in found.straight)
    assert all(one.run.length <= parts[one.run.part].chunk_bytes for one in found.edges)
    for spec in specs:
        if spec.fqn in found.scattered:
            assert not landed[spec.fqn].any()
        else:
            assert (landed[spec.fqn] == 1).all()
            box = arrays[spec.fqn][slices(spec.offsets, spec.shape)]
            assert bytes(memory[spec.fqn]) == np.ascontiguousarray(box).tobytes()


def test_what_has_no_memory_of_its_own_is_left_out() -> None:
    parts, _ = whole(640, 1)
    saved = index_parts(parts, 0)
    plan = make_load_plan(saved, parts, whole_specs(saved))
    assert len(find_landings(plan, ["t0"], parts).straight) == 1
    assert find_landings(plan, ["t1"], parts) == Landings()


def row(*lengths: int) -> list[Landing]:
    return [Landing(Run(0, 0, 0, n, "f", 0), f"t{i}", 0, 0, n) for i, n in enumerate(lengths)]


@pytest.mark.parametrize(
    ("lengths", "turn", "turns", "first"),
    [
        ((10, 10, 10, 10), 0, 2, "t0"),
        ((10, 10, 10, 10), 1, 2, "t2"),
        ((10, 10, 10, 10), 3, 4, "t3"),
        ((30, 5, 5), 1, 2, "t1"),
        ((40,), 1, 2, "t0"),
    ],
)
def test_readers_of_one_host_begin_evenly_apart(lengths, turn, turns, first) -> None:
    landings = row(*lengths)
    turned = from_turn(landings, turn, turns)
    assert turned[0].fqn == first
    assert sorted(one.fqn for one in turned) == [one.fqn for one in landings]
    assert from_turn([], turn, turns) == []
