"""Chunks straight into tensors, beside NumPy and xxhash: what is sound arrives, what is damaged is named."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from dtruntime_torch.checkpoint.format.records import Part
from dtruntime_torch.checkpoint.loading import home_reader, landings
from dtruntime_torch.checkpoint.loading.home_reader import read_home
from dtruntime_torch.checkpoint.loading.landings import find_landings
from dtruntime_torch.checkpoint.loading.load_plan import index_parts, make_load_plan, whole_specs
from dtruntime_torch.checkpoint.specs import TensorSpec
from dtruntime_torch.errors import Damage, StorageError
from dtruntime_torch.storage import MemoryBackend, run_sync
from tests.checkpoint.loading.test_chunk_needs import checkpoints, whole
from tests.checkpoint.loading.test_load_plan import boxes_in, slices
from tests.checkpoint.plan_builders import tensor
from tests.checkpoint.staging.scattered_tensors import digests_of


class Chunked(MemoryBackend):
    """Files in memory that are read in chunks, digested by xxhash."""

    fails: str | None = None

    async def read_chunks(
        self, path: str, offsets: Sequence[int], into: Sequence[memoryview], chunk_bytes: int
    ) -> bytes:
        if path == self.fails:
            raise StorageError(f"{path} cannot be read")
        for offset, memory in zip(offsets, into, strict=True):
            await self.read_range(path, offset, memory.nbytes, into=memory)
        return b"".join(digests_of(bytes(memory), chunk_bytes) for memory in into)


def put(parts: dict[int, Part], arrays: dict[str, np.ndarray]) -> tuple[Chunked, dict[int, Part]]:
    """Writes the files of a checkpoint; its parts come back with all digests."""
    backend, digested = Chunked(), {}
    for rank, part in parts.items():
        files = [bytearray(b"\x77" * ref.length) for ref in part.files]
        entries = []
        for entry in part.tensors:
            data = np.ascontiguousarray(arrays[entry.fqn][slices(entry.offsets, entry.shape)]).tobytes()
            start = 0
            for extent in entry.extents:
                files[extent.file][extent.offset : extent.offset + extent.length] = data[
                    start : start + extent.length
                ]
                start += extent.length
            entries.append(replace(entry, digests=digests_of(data, part.chunk_bytes)))
        refs = []
        for ref, file in zip(part.files, files, strict=True):
            run_sync(backend.write(f"model/{ref.path}", bytes(file)))
            header = xxhash.xxh3_128_digest(bytes(file[: ref.header_length]))
            refs.append(replace(ref, header_digest=header))
        digested[rank] = replace(part, tensors=tuple(entries), files=tuple(refs))
    return backend, digested


def read(
    backend: Chunked, parts: dict[int, Part], specs: Sequence[TensorSpec], turn: tuple[int, int] = (0, 1)
) -> tuple[list[Damage], dict[str, torch.Tensor]]:
    plan = make_load_plan(index_parts(parts, 0), parts, specs)
    homes = {spec.fqn: torch.full(spec.shape, -1, dtype=torch.int64) for spec in specs if spec.nbytes}
    found = find_landings(plan, homes.keys(), parts)
    return run_sync(read_home(backend, backend, "model", parts, found, homes, turn)), homes


def arrays_of(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    return {name: np.random.default_rng(1).integers(1, 1 << 60, shape) for name, shape in shapes.items()}


@given(st.data(), checkpoints(), st.integers(0, 2))
def test_every_wanted_element_arrives_where_it_belongs(data: st.DataObject, checkpoint, turn) -> None:
    arrays = arrays_of(checkpoint[1])
    backend, parts = put(checkpoint[0], arrays)
    specs = []
    for name in index_parts(parts, 0).tensors:
        offsets, shape = data.draw(boxes_in(arrays[name].shape))
        specs.append(tensor(name, *arrays[name].shape, dtype="int64", offsets=offsets, shape=shape))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(landings, "PIECE_BYTES", data.draw(st.sampled_from([1, 1 << 20])))
        patch.setattr(home_reader, "CALL_BYTES", data.draw(st.sampled_from([1, 100, 1 << 20])))
        patch.setattr(home_reader, "EDGE_BYTES", data.draw(st.sampled_from([1, 1 << 20])))
        patch.setattr(home_reader, "BLOCK_BYTES", data.draw(st.sampled_from([1, 1 << 20])))
        patch.setattr(home_reader, "BLOCK_CHUNKS", data.draw(st.sampled_from([0, 1, 2])))
        damage, homes = read(backend, parts, specs, (turn, 3))
    assert damage == []
    for spec in (spec for spec in specs if spec.nbytes):
        expected = arrays[spec.fqn][slices(spec.offsets, spec.shape)]
        np.testing.assert_array_equal(homes[spec.fqn].numpy(), expected)


@given(st.data(), checkpoints())
def test_any_flipped_bit_is_named(data: st.DataObject, checkpoint) -> None:
    arrays = arrays_of(checkpoint[1])
    backend, parts = put(checkpoint[0], arrays)
    places = [
        (part, entry, extent) for part in parts.values() for entry in part.tensors for extent in entry.extents
    ]
    if not places:
        return
    part, entry, extent = data.draw(st.sampled_from(places))
    at = extent.offset + data.draw(st.integers(0, extent.length - 1))
    path = f"model/{part.files[extent.file].path}"
    file = bytearray(run_sync(backend.read(path)))
    file[at] ^= 1 << data.draw(st.integers(0, 7))
    run_sync(backend.write(path, bytes(file)))
    damage, _ = read(backend, parts, whole_specs(index_parts(parts, 0)))
    (found,) = damage
    assert (found.file, found.tensor) == (path, entry.fqn)
    assert found.start <= at < found.stop <= found.start + part.chunk_bytes


@pytest.fixture
def stored() -> tuple[Chunked, dict[int, Part]]:
    """One tensor of five chunks in one file."""
    parts, _ = whole(320, 1)
    entry = replace(parts[0].tensors[0], dtype="int64", global_shape=(40,), shape=(40,))
    return put({0: replace(parts[0], tensors=(entry,))}, {"t0": np.arange(40)})


def test_a_file_that_is_gone_is_named(stored) -> None:
    backend, parts = stored
    path = f"model/{parts[0].files[0].path}"
    run_sync(backend.delete(path))
    damage, _ = read(backend, parts, whole_specs(index_parts(parts, 0)))
    assert {one.file for one in damage} == {path}


def test_a_storage_that_fails_is_no_damage(stored) -> None:
    backend, parts = stored
    backend.fails = f"model/{parts[0].files[0].path}"
    with pytest.raises(StorageError, match="cannot be read"):
        read(backend, parts, whole_specs(index_parts(parts, 0)))


def test_too_few_digests_are_no_success(stored) -> None:
    backend, parts = stored

    class Terse(Chunked):
        async def read_chunks(self, *arguments, **more) -> bytes:
            return (await super().read_chunks(*arguments, **more))[:16]

    for entry in run_sync(backend.list("")):
        path = entry.path
    terse = Terse()
    run_sync(terse.write(path, run_sync(backend.read(path))))
    with pytest.raises(StorageError, match="16 bytes of digests, not 80"):
        read(terse, parts, whole_specs(index_parts(parts, 0)))


def test_no_read_is_left_under_way(stored) -> None:
    backend, parts = stored

    async def count() -> int:
        plan = make_load_plan(index_parts(parts, 0), parts, whole_specs(index_parts(parts, 0)))
        homes = {"t0": torch.zeros(40, dtype=torch.int64)}
        await read_home(backend, backend, "model", parts, find_landings(plan, homes, parts), homes)
        return len(asyncio.all_tasks())

    assert run_sync(count()) == 1
