"""Tensors out of the memory that chunks were read into, beside NumPy, whatever lies where."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from dtruntime_torch import _C
from dtruntime_torch.checkpoint.format.records import Part
from dtruntime_torch.checkpoint.loading.assembly import Assembled, Staged
from dtruntime_torch.checkpoint.loading.chunk_needs import Run, needs_of, runs_of
from dtruntime_torch.checkpoint.loading.load_plan import index_parts, make_load_plan
from dtruntime_torch.checkpoint.loading.node_shares import divide
from dtruntime_torch.checkpoint.loading.placement import place
from dtruntime_torch.checkpoint.specs import TensorSpec
from tests.checkpoint.loading.test_chunk_needs import checkpoints, whole
from tests.checkpoint.loading.test_load_plan import boxes_in, slices
from tests.checkpoint.plan_builders import tensor


def stored_bytes(parts: dict[int, Part], rank: int, position: int, whole: np.ndarray) -> bytes:
    entry = parts[rank].tensors[position]
    return whole[slices(entry.offsets, entry.shape)].tobytes()


def stage(parts, needs, arrays, ranks: int = 1) -> Staged:
    """Puts the needed chunks where each of so many ranks would read them, and noise everywhere else."""
    staged = Staged()
    shares = divide([needs] * ranks, parts)
    for runs in (*shares.own, *shares.common):
        placement = place(runs)
        memory = memoryview(_C.Arena(max(1, placement.nbytes)))
        memory[:] = b"\xa5" * len(memory)
        for run, at in placement.runs:
            data = stored_bytes(parts, run.part, run.entry, arrays[parts[run.part].tensors[run.entry].fqn])
            memory[at : at + run.length] = data[run.start : run.start + run.length]
        staged.add(placement.runs, memory)
    return staged


@given(st.data(), checkpoints(), st.integers(1, 3))
def test_every_wanted_element_comes_from_where_it_is_stored(data: st.DataObject, checkpoint, ranks) -> None:
    parts, shapes = checkpoint
    arrays = {name: np.random.default_rng(1).integers(1, 1 << 60, shape) for name, shape in shapes.items()}
    saved = index_parts(parts, 0)
    specs: list[TensorSpec] = []
    for name in saved.tensors:
        offsets, shape = data.draw(boxes_in(shapes[name]))
        specs.append(tensor(name, *shapes[name], dtype="int64", offsets=offsets, shape=shape))
    plan = make_load_plan(saved, parts, specs)
    found = Assembled(plan, specs, parts, stage(parts, needs_of(plan, parts), arrays, ranks), {})
    for spec in specs:
        expected = np.ascontiguousarray(arrays[spec.fqn][slices(spec.offsets, spec.shape)])
        assert found[spec.fqn].is_contiguous() and tuple(found[spec.fqn].shape) == spec.shape
        np.testing.assert_array_equal(found[spec.fqn].numpy(), expected.reshape(spec.shape))


def test_what_is_stored_as_it_is_wanted_is_not_copied() -> None:
    parts, needs = whole(6400, 3)
    saved = index_parts(parts, 0)
    specs = [tensor(f"t{n}", 6400, dtype="uint8") for n in range(3)]
    plan = make_load_plan(saved, parts, specs)
    placement = place(runs_of(parts, needs))
    arena = _C.Arena(placement.nbytes)
    staged = Staged()
    staged.add(placement.runs, memoryview(arena))
    addresses = [t.data_ptr() - arena.address for t in Assembled(plan, specs, parts, staged, {}).values()]
    assert addresses == [64, 6464, 12864]


def test_a_tensor_at_an_odd_address_is_moved_to_an_even_one() -> None:
    parts, needs = whole(6400, 1)
    saved = index_parts(parts, 0)
    spec = tensor("t0", 6400, dtype="uint8")
    plan = make_load_plan(saved, parts, [spec])
    memory = memoryview(_C.Arena(8192))
    memory[3:6403] = bytes(n % 251 for n in range(6400))
    staged = Staged()
    staged.add([(runs_of(parts, needs)[0], 3)], memory)
    assert torch.frombuffer(staged.range(0, 0, 0, 6400, 16), dtype=torch.uint8).data_ptr() % 16 == 0
    assert bytes(staged.range(0, 0, 0, 6400, 16)) == bytes(memory[3:6403])
    assert Assembled(plan, [spec], parts, staged, {})["t0"].data_ptr() % 2 == 1


def test_large_tensors_are_put_together_in_memory_of_their_own() -> None:
    parts, needs = whole(5 << 20, 1, chunk_bytes=1 << 20)
    arrays = {"t0": np.arange(5 << 20, dtype=np.uint64).astype(np.uint8)}
    saved = index_parts(parts, 0)
    spec = tensor("t0", 5 << 20, dtype="uint8")
    plan = make_load_plan(saved, parts, [spec])
    staged = stage(parts, needs, arrays, ranks=2)
    np.testing.assert_array_equal(Assembled(plan, [spec], parts, staged, {})["t0"].numpy(), arrays["t0"])


def test_what_is_put_together_is_not_kept() -> None:
    parts, needs = whole(640, 1)
    spec = tensor("t0", 640, dtype="uint8")
    plan = make_load_plan(index_parts(parts, 0), parts, [spec])
    found = Assembled(plan, [spec], parts, stage(parts, needs, {"t0": np.zeros(640, np.uint8)}, ranks=2), {})
    assert found["t0"] is not found["t0"] and list(found) == ["t0"] and len(found) == 1


def test_neighbours_in_memory_that_are_none_in_the_shard_are_not_joined() -> None:
    memory = memoryview(_C.Arena(128))
    memory[:] = b"a" * 64 + b"b" * 64
    staged = Staged()
    staged.add([(Run(0, 0, 128, 64, "f", 128), 64), (Run(0, 0, 0, 64, "f", 64), 0)], memory)
    found = bytes(staged.range(0, 0, 0, 192, 1))
    assert (found[:64], found[128:]) == (b"a" * 64, b"b" * 64)
