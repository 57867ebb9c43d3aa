"""A rank's part on storage: what stock readers and our own reader find, and what is refused or cleaned up."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xxhash
from safetensors.numpy import load

from dtruntime_torch.checkpoint.format.records import Part, PartRef
from dtruntime_torch.checkpoint.loading.chunk_reader import check_part
from dtruntime_torch.checkpoint.manifest import decode_part
from dtruntime_torch.checkpoint.names import Attempt
from dtruntime_torch.checkpoint.saving.shard_file import delete_shard, write_shard
from dtruntime_torch.checkpoint.specs import Extent
from dtruntime_torch.errors import InvalidArgument, StorageError
from dtruntime_torch.storage import LocalBackend, MemoryBackend, run_sync
from dtruntime_torch.testing.faulty_backend import FaultyBackend, not_done
from tests.checkpoint.plan_builders import flat, obj, plans_of, tensor
from tests.checkpoint.saved_checkpoints import CHUNK, Arrays, Image, spec_of, stage, write

ATTEMPT = Attempt(7, 100, 1)
FOLDER = "model/step-00000100/0007-1"
ARRAYS: Arrays = {
    "bytes": np.arange(33, dtype=np.uint8),
    "empty": np.zeros((0, 4), np.float64),
    "weight": np.arange(20, dtype=np.float32).reshape(4, 5),
    "scalar": np.array(7, np.int64),
}


@pytest.fixture
def image() -> Image:
    (plan,) = plans_of([flat(*(spec_of(fqn, array) for fqn, array in ARRAYS.items()), obj("epoch"))])
    return stage(plan, ARRAYS, {"epoch": 3})


def part_at(backend: MemoryBackend | LocalBackend) -> Part:
    path = f"{FOLDER}/shard-00000-of-00001.json"
    return decode_part(bytes(run_sync(backend.read(path))), path)


def paths(backend: MemoryBackend) -> list[str]:
    return [entry.path for entry in run_sync(backend.list(""))]


def test_stock_safetensors_reads_what_was_written(image: Image) -> None:
    backend = MemoryBackend()
    write(backend, "model", ATTEMPT, image)
    found = load(bytes(run_sync(backend.read(f"{FOLDER}/shard-00000-of-00001.safetensors"))))
    assert found.keys() == ARRAYS.keys()
    for fqn, array in ARRAYS.items():
        np.testing.assert_array_equal(found[fqn], array, strict=True)


def test_our_reader_reads_what_was_written(image: Image, tmp_path: Path) -> None:
    backend = LocalBackend(tmp_path)
    write(backend, "model", ATTEMPT, image)
    part = part_at(backend)
    assert run_sync(check_part(backend, "model", part)) == []
    for entry in part.tensors:
        extent = entry.extents[0] if entry.extents else Extent(0, 0, 0)
        path = f"model/{part.files[extent.file].path}"
        data = run_sync(backend.read_range(path, extent.offset, extent.length))
        assert bytes(data) == ARRAYS[entry.fqn].tobytes()


def test_the_part_describes_every_leaf_in_the_order_of_the_state(image: Image) -> None:
    backend = MemoryBackend()
    write(backend, "model", ATTEMPT, image)
    part = part_at(backend)
    assert [(entry.fqn, entry.index) for entry in part.tensors] == [(f, n) for n, f in enumerate(ARRAYS)]
    assert [(entry.fqn, entry.value) for entry in part.objects] == [("epoch", 3)]
    assert (part.rank, part.world_size, part.generation, part.step) == (0, 1, 7, 100)
    assert (part.attempt, part.chunk_bytes) == (ATTEMPT.path, CHUNK)
    weight = part.tensors[2]
    assert (weight.dtype, weight.shape, weight.name) == ("float32", (4, 5), "weight")
    data = ARRAYS["weight"].tobytes()
    assert weight.digests == b"".join(
        xxhash.xxh3_128_digest(data[at : at + CHUNK]) for at in range(0, len(data), CHUNK)
    )
    assert part.tensors[1].extents == ()


def test_the_reference_pins_the_part_and_the_part_its_file(image: Image) -> None:
    backend = MemoryBackend()
    ref = write(backend, "model", ATTEMPT, image)
    encoded = bytes(run_sync(backend.read(f"{FOLDER}/{ref.path}")))
    digest = hashlib.sha256(encoded).hexdigest()
    assert ref == PartRef(0, "shard-00000-of-00001.json", len(encoded), digest, len(image.data))
    (file,) = part_at(backend).files
    header = image.layout.header
    assert file.path == f"{ATTEMPT.path}/shard-00000-of-00001.safetensors"
    assert (file.length, file.header_length) == (len(image.data), len(header))
    assert file.header_digest == xxhash.xxh3_128_digest(header)


def test_a_shard_and_what_differs_by_rank_keep_their_boxes() -> None:
    half = tensor("w", 4, layout="s", holders=(1,), offsets=(2,), shape=(2,), spread=True)
    other = replace(half, holders=(0,), offsets=(0,))
    seed = tensor("seed", 1, per_rank=True)
    plan = plans_of([flat(other, seed), flat(half, seed)])[1]
    backend = MemoryBackend()
    arrays = {"w": np.arange(2, dtype=np.float32), "seed": np.zeros(1, np.float32)}
    ref = write(backend, "model", ATTEMPT, stage(plan, arrays))
    part = decode_part(bytes(run_sync(backend.read(f"{FOLDER}/{ref.path}"))), ref.path)
    assert [(e.name, e.global_shape, e.offsets, e.shape, e.per_rank) for e in part.tensors] == [
        ("w", (4,), (2,), (2,), False),
        ("seed.rank-00001", (1,), (0,), (1,), True),
    ]


def test_the_data_is_durable_before_the_part_that_describes_it(image: Image) -> None:
    backend = FaultyBackend(MemoryBackend())
    write(backend, "model", ATTEMPT, image)
    written = [path for operation, path in backend.calls if operation == "write"]
    assert [path.rpartition(".")[2] for path in written] == ["safetensors", "json"]


def test_an_image_that_does_not_fit_is_refused_and_nothing_written(image: Image) -> None:
    backend = MemoryBackend()
    for bad in (
        replace(image, data=image.data + b"x"),
        replace(image, digests=image.digests[:-16]),
        replace(image, data=bytes(len(image.data))),
    ):
        with pytest.raises(InvalidArgument, match="layout"):
            write(backend, "model", ATTEMPT, bad)
    assert paths(backend) == []


@pytest.mark.parametrize("suffix", ["safetensors", "json"])
def test_what_a_failed_write_left_is_deleted(image: Image, suffix: str) -> None:
    inner = MemoryBackend()
    backend = FaultyBackend(inner)
    backend.when("write", f"*.{suffix}", not_done())
    with pytest.raises(StorageError):
        write(backend, "model", ATTEMPT, image)
    run_sync(delete_shard(backend, "model", ATTEMPT, 0, 1))
    assert paths(inner) == []


def test_deleting_leaves_the_files_of_other_ranks_and_attempts(image: Image) -> None:
    backend = MemoryBackend()
    others = [(Attempt(7, 100, 2), 0), (Attempt(7, 200, 1), 0), (ATTEMPT, 1)]
    for attempt, rank in [(ATTEMPT, 0), *others]:
        plan = replace(image.plan, rank=rank, world_size=2)
        write(backend, "model", attempt, replace(image, plan=plan))
    run_sync(delete_shard(backend, "model", ATTEMPT, 0, 2))
    assert len(paths(backend)) == 2 * len(others)
    assert f"{FOLDER}/shard-00000-of-00002.safetensors" not in paths(backend)
    run_sync(delete_shard(backend, "model", ATTEMPT, 0, 2))


def test_the_image_may_be_a_view_of_an_arena(image: Image) -> None:
    backend = MemoryBackend()
    view = memoryview(bytearray(image.data + bytes(100)))[: image.layout.length]
    run_sync(
        write_shard(
            backend, "model", ATTEMPT, image.plan, image.layout, view, image.digests, CHUNK, image.values
        )
    )
    assert run_sync(check_part(backend, "model", part_at(backend))) == []
