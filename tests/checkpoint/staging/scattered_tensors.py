"""Tensors whose chunks lie anywhere in several files, as a delta leaves them, with the part that says where."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import xxhash
from hypothesis import strategies as st

from dtruntime_torch.checkpoint.format.records import FileRef, Part, TensorEntry
from dtruntime_torch.checkpoint.specs import Extent
from dtruntime_torch.storage import run_sync
from dtruntime_torch.storage.backend import StorageBackend
from tests.checkpoint.plan_builders import part_of, stored

CHUNK = 8
HEADER = 64


class Place(NamedTuple):
    """Where an extent goes: the file, the gap before it there, its length, and how early it is written."""

    file: int
    gap: int
    length: int
    rank: int = 0


@dataclass
class Stored:
    """Tensors on storage: what they hold, where, and the part that says so."""

    files: list[bytearray]
    tensors: list[bytes]
    part: Part

    def chunks_of(self, file: int) -> Iterator[tuple[int, int, int, int]]:
        """Tensor, offset in the file, length and start in the tensor of each chunk in a file."""
        for number, entry in enumerate(self.part.tensors):
            start = 0
            for extent in entry.extents:
                for done in range(0, extent.length, CHUNK) if extent.file == file else ():
                    yield number, extent.offset + done, min(CHUNK, extent.length - done), start + done
                start += extent.length

    def put(self, backend: StorageBackend) -> StorageBackend:
        for ref, data in zip(self.part.files, self.files, strict=True):
            run_sync(backend.write(f"model/{ref.path}", bytes(data)))
        return backend


def file_path(number: int) -> str:
    return f"step-0000000{number}/0001-1/shard-00000-of-00001.safetensors"


def digests_of(data: bytes, chunk: int = CHUNK) -> bytes:
    return b"".join(xxhash.xxh3_128_digest(data[at : at + chunk]) for at in range(0, len(data), chunk))


def pattern(length: int, salt: int = 0) -> bytes:
    return bytes((31 * n + salt) % 251 for n in range(length))


def make(tensors: Sequence[bytes], places: Sequence[Sequence[Place]], n_files: int) -> Stored:
    """`places`: for each tensor its extents, in order."""
    files = [bytearray(pattern(HEADER, salt)) for salt in range(n_files)]
    extents: dict[tuple[int, int], Extent] = {}
    sources = []
    for number, of_tensor in enumerate(places):
        start = 0
        for place in of_tensor:
            sources.append((place.rank, number, start, place))
            start += place.length
    for _, number, start, place in sorted(sources, key=lambda source: source[:3]):
        file = files[place.file]
        file += bytes(place.gap)
        extents[number, start] = Extent(place.file, len(file), place.length)
        file += tensors[number][start : start + place.length]
    entries: list[TensorEntry] = []
    for number, data in enumerate(tensors):
        entry = stored(f"t{number}", (len(data),), dtype="uint8", digests=digests_of(data))
        placed = tuple(extent for (of, _), extent in sorted(extents.items()) if of == number)
        entries.append(replace(entry, extents=placed))
    refs = tuple(
        FileRef(file_path(number), len(data), HEADER, xxhash.xxh3_128_digest(bytes(data[:HEADER])))
        for number, data in enumerate(files)
    )
    return Stored(files, list(tensors), replace(part_of(0, *entries, chunk_bytes=CHUNK), files=refs))


def full(*lengths: int) -> Stored:
    """One file, one extent a tensor, nothing between: what a full save writes."""
    tensors = [pattern(length, salt=number) for number, length in enumerate(lengths)]
    return make(tensors, [[Place(0, 0, len(data))] if data else [] for data in tensors], 1)


@st.composite
def deltas(draw: st.DrawFn) -> Stored:
    """Tensors whose chunks lie in several extents over two files, in any order, with gaps between."""
    n_files = 2
    tensors = [pattern(n, salt) for salt, n in enumerate(draw(st.lists(st.integers(0, 60), max_size=6)))]
    cuts = [draw(st.sets(st.sampled_from(range(CHUNK, 60, CHUNK)))) for _ in tensors]
    places = []
    for data, cut in zip(tensors, cuts, strict=True):
        borders = [0, *sorted(at for at in cut if at < len(data)), len(data)] if data else []
        places.append(
            [
                Place(
                    draw(st.integers(0, n_files - 1)),
                    draw(st.sampled_from([0, 0, 1, 50])),
                    end - start,
                    draw(st.integers(0, 9)),
                )
                for start, end in itertools.pairwise(borders)
            ]
        )
    return make(tensors, places, n_files)
