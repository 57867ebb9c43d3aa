"""What a delta writes, beside a byte diff of two images; and what is read back through its extents."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtruntime_torch.checkpoint.format.records import Part
from dtruntime_torch.checkpoint.names import Attempt
from dtruntime_torch.checkpoint.saving.delta import Delta, DeltaPolicy, make_delta
from dtruntime_torch.checkpoint.saving.layout import Layout
from dtruntime_torch.checkpoint.saving.shard_file import DELTA_HEADER, Shard, write_shard
from dtruntime_torch.checkpoint.specs import Extent
from dtruntime_torch.errors import InvalidArgument
from dtruntime_torch.storage import MemoryBackend, run_sync
from tests.checkpoint.plan_builders import flat, obj, plans_of
from tests.checkpoint.saved_checkpoints import CHUNK, Image, spec_of, stage

DTYPES = [np.uint8, np.float16, np.float64]


def image_of(arrays: dict[str, np.ndarray]) -> Image:
    (plan,) = plans_of([flat(*(spec_of(fqn, array) for fqn, array in arrays.items()), obj("epoch"))])
    return stage(plan, arrays, {"epoch": 3})


@st.composite
def histories(draw: st.DrawFn, resized: bool = False) -> list[Image]:
    """Images of one layout, each of which differs from the one before in any bytes, or in none.

    If `resized`, tensors may also have another size in the next, or be new, or gone.
    """
    lengths = draw(st.lists(st.integers(0, 70), min_size=1, max_size=5))
    arrays = {
        f"t{n}": np.arange(length).astype(draw(st.sampled_from(DTYPES))) for n, length in enumerate(lengths)
    }
    images = [image_of(arrays)]
    for _ in range(draw(st.integers(1, 4))):
        arrays = {fqn: array.copy() for fqn, array in arrays.items()}
        for n in draw(st.lists(st.integers(0, 5), max_size=2)) if resized else []:
            arrays.pop(f"t{n}", None)
            if draw(st.booleans()):
                arrays[f"t{n}"] = np.arange(draw(st.integers(0, 70))).astype(draw(st.sampled_from(DTYPES)))
        for array in arrays.values():
            flat_bytes = array.view(np.uint8)
            places = st.integers(0, max(len(flat_bytes) - 1, 0))
            for place in draw(st.lists(places, max_size=4)) if len(flat_bytes) else []:
                flat_bytes[place] ^= draw(st.integers(1, 255))
        images.append(image_of(arrays))
    return images


def save(backend: MemoryBackend, step: int, image: Image, base: Part | None) -> tuple[Shard, Delta | None]:
    delta = (
        None
        if base is None
        else make_delta(base, image.layout, image.digests, header_length=len(DELTA_HEADER))
    )
    view = memoryview(image.data)
    writing = write_shard(
        backend, "model", Attempt(1, step, 1), image.plan, image.layout, view, image.digests, CHUNK,
        image.values, delta,
    )  # fmt: skip
    return run_sync(writing), delta


def chunks(layout: Layout) -> Iterator[tuple[int, int]]:
    """The chunks of an image in order, one by one: [start, stop)."""
    for slot in layout.slots:
        for start in range(slot.offset, slot.offset + slot.nbytes, CHUNK):
            yield start, min(start + CHUNK, slot.offset + slot.nbytes)


def read_back(backend: MemoryBackend, part: Part) -> dict[str, bytes]:
    files = [bytes(run_sync(backend.read(f"model/{file.path}"))) for file in part.files]
    assert [len(data) for data in files] == [file.length for file in part.files]
    return {
        entry.fqn: b"".join(files[e.file][e.offset : e.offset + e.length] for e in entry.extents)
        for entry in part.tensors
    }


@given(histories() | histories(resized=True))
def test_every_delta_of_a_chain_reads_as_its_image(images):
    backend, base = MemoryBackend(), None
    for step, image in enumerate(images):
        shard, _ = save(backend, step, image, base)
        base = shard.part
        found = read_back(backend, base)
        assert found == {
            fqn: image.data[slice(*image.place(fqn))] for fqn in found
        }, f"step {step} of {len(images)}"


@given(histories())
def test_what_is_written_is_the_byte_diff_in_whole_chunks(images):
    backend = MemoryBackend()
    base = save(backend, 0, images[0], None)[0].part
    for step, (before, image) in enumerate(pairwise(images), 1):
        shard, delta = save(backend, step, image, base)
        base = shard.part
        differing = [(a, b) for a, b in chunks(image.layout) if before.data[a:b] != image.data[a:b]]
        assert delta is not None
        assert delta.changed_bytes == sum(stop - start for start, stop in differing)
        written = [(start, start + nbytes) for start, nbytes in delta.runs]
        covered = [byte for start, stop in written for byte in range(start, stop)]
        assert covered == [byte for start, stop in differing for byte in range(start, stop)]
        assert all(stop < start for (_, stop), (start, _) in pairwise(written))
        if not differing:
            assert shard.ref.data_length == 0
            continue
        path = f"model/{shard.part.files[-1].path}"
        expected = DELTA_HEADER + b"".join(image.data[start:stop] for start, stop in differing)
        assert bytes(run_sync(backend.read(path))) == expected


@given(histories())
def test_a_part_names_only_files_that_it_reads_and_no_two_extents_that_could_be_one(images):
    backend, base = MemoryBackend(), None
    for step, image in enumerate(images):
        base = save(backend, step, image, base)[0].part
        extents = [entry.extents for entry in base.tensors]
        if step:
            assert {e.file for of in extents for e in of} == set(range(len(base.files)))
        for left, right in (pair for of in extents for pair in pairwise(of)):
            assert (left.file, left.offset + left.length) != (right.file, right.offset)


def test_the_header_of_a_delta_file_is_64_bytes_of_length_and_json():
    text = b'{"format":"dtruntime.delta","version":1}'.ljust(56)
    assert (56).to_bytes(8, "little") + text == DELTA_HEADER


def test_a_save_without_any_change_writes_no_data_file():
    backend, image = MemoryBackend(), image_of({"w": np.arange(50, dtype=np.uint8)})
    base = save(backend, 1, image, None)[0].part
    shard, delta = save(backend, 2, image, base)
    assert delta is not None and delta.changed_bytes == 0 and shard.ref.data_length == 0
    assert shard.part.files == base.files and shard.part.tensors == base.tensors
    paths = [entry.path for entry in run_sync(backend.list("model/step-00000002/"))]
    assert paths == ["model/step-00000002/0001-1/shard-00000-of-00001.json"]


def test_a_file_of_which_nothing_is_left_is_not_named():
    backend = MemoryBackend()
    base = save(backend, 1, image_of({"w": np.zeros(40, np.uint8)}), None)[0].part
    part = save(backend, 2, image_of({"w": np.ones(40, np.uint8)}), base)[0].part
    assert [file.path for file in part.files] == ["step-00000002/0001-1/shard-00000-of-00001.delta"]


def test_chunks_of_a_base_that_lie_in_any_order_are_found():
    """The second delta moves a chunk to a third file, between two chunks of the second."""
    backend, array = MemoryBackend(), np.zeros(4 * CHUNK, np.uint8)
    part = save(backend, 1, image_of({"w": array}), None)[0].part
    for step, changed in ((2, (0, 1, 2)), (3, (1,)), (4, (0, 3))):
        array = array.copy()
        array[[CHUNK * chunk for chunk in changed]] = step
        part = save(backend, step, image_of({"w": array}), part)[0].part
        assert read_back(backend, part)["w"] == array.tobytes()
    assert [e.file for e in part.tensors[0].extents] == [2, 1, 0, 2]


def test_extents_of_a_base_that_are_apart_stay_apart():
    image = image_of({"w": np.arange(3 * CHUNK, dtype=np.uint8)})
    part = save(MemoryBackend(), 1, image, None)[0].part
    (file,), (entry,) = part.files, part.tensors
    apart = (Extent(0, 128, CHUNK), Extent(0, 128 + 2 * CHUNK, 2 * CHUNK))
    base = replace(part, files=(replace(file, length=1000),), tensors=(replace(entry, extents=apart),))
    assert make_delta(base, image.layout, image.digests, 64).extents == (apart,)


@pytest.mark.parametrize("before", [0, 1, 3 * CHUNK, 2 * CHUNK])
def test_of_a_tensor_of_another_size_all_is_written_and_of_the_others_what_changed(before):
    kept = np.arange(5 * CHUNK, dtype=np.uint8)
    images = [
        image_of({"own": np.zeros(size, np.uint8), "kept": kept, "changed": np.full(7, size, np.uint8)})
        for size in (before, 2 * CHUNK + 1)
    ]
    backend = MemoryBackend()
    base = save(backend, 1, images[0], None)[0].part
    shard, delta = save(backend, 2, images[1], base)
    assert delta is not None
    assert delta.changed_bytes == 2 * CHUNK + 1 + 7
    assert read_back(backend, shard.part)["kept"] == kept.tobytes()


def test_a_base_without_any_bytes_is_one_too():
    base = save(MemoryBackend(), 1, image_of({"a": np.zeros(0, np.uint8)}), None)[0].part
    image = image_of({"a": np.zeros(3, np.uint8)})
    for files in (base.files, ()):
        assert make_delta(replace(base, files=files), image.layout, image.digests, 64).changed_bytes == 3


@pytest.mark.parametrize("byte", [0, 15])
def test_a_digest_that_differs_in_one_byte_is_another(byte):
    image = image_of({"w": np.arange(3 * CHUNK, dtype=np.uint8)})
    part = save(MemoryBackend(), 1, image, None)[0].part
    digests = bytearray(image.digests)
    digests[16 + byte] ^= 1
    assert make_delta(part, image.layout, bytes(digests), 64).changed_bytes == CHUNK


@pytest.mark.parametrize(
    ("policy", "full"),
    [
        (DeltaPolicy(), False),
        (DeltaPolicy(max_changed=0.5), False),
        (DeltaPolicy(max_changed=0.49), True),
        (DeltaPolicy(max_files=3), True),
        (DeltaPolicy(max_files=4), False),
        (DeltaPolicy(max_size=3), True),
        (DeltaPolicy(max_size=5), False),
        (DeltaPolicy(full_every=3), True),
        (DeltaPolicy(full_every=4), False),
    ],
)
def test_each_rule_of_the_policy_asks_for_a_full_save(policy, full):
    nbytes = 8 << 20
    used = 4 * nbytes if policy.max_size != 2 else nbytes
    assert policy.asks_for_full(changed=nbytes // 2, nbytes=nbytes, files=3, used=used, deltas=2) is full


def test_a_state_without_bytes_never_asks_for_a_full_save():
    assert not DeltaPolicy().asks_for_full(changed=0, nbytes=0, files=0, used=64, deltas=5)


@pytest.mark.parametrize(
    "bad",
    [
        {"max_changed": -0.1},
        {"max_changed": 1.1},
        {"max_changed": "x"},
        {"max_changed": True},
        {"max_files": 1},
        {"max_files": 2.5},
        {"full_every": 0},
        {"full_every": 1.5},
        {"full_every": True},
    ],
)
def test_a_policy_out_of_range_is_refused(bad):
    with pytest.raises(InvalidArgument, match=next(iter(bad))):
        replace(DeltaPolicy(), **bad)
