"""What a delta writes: the chunks whose digest is not that of the last committed save. Pure.

A delta names where each chunk lies, in its own file or in that of an earlier save, so that nothing is ever replayed.
It needs the digests of the last *committed* save: those of the arena may be of one that failed. Comparing costs a
few milliseconds for ten thousand tensors; a chunk is written whole if one byte of it changed, a tensor if its size did.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from dtruntime_torch.checkpoint.format.records import Commit, FileRef, Part, TensorEntry
from dtruntime_torch.checkpoint.names import CommitKey
from dtruntime_torch.checkpoint.saving.layout import Layout, Slot
from dtruntime_torch.checkpoint.specs import Extent, Members
from dtruntime_torch.counts import check_count, check_number
from dtruntime_torch.errors import InvalidArgument

Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]

SMALL = 1 << 20
"""Bytes that are not worth a full save: headers, and states of a few chunks."""


@dataclass(frozen=True, slots=True)
class DeltaPolicy:
    """When a save writes everything, though it could write only what changed.

    A save is full, on all ranks alike, if the one before it found one of these:

    Attributes:
        max_changed: more than this share of all bytes had changed, chunks counted whole.
        max_files: one more file would make more than so many that a rank reads from; at least 2.
        max_size: the files that it reads from are more than so many times as large as the state, because little of
            them is still needed; more than 1.
        full_every: with it one in so many saves is full; None for no such rule.

    Raises:
        InvalidArgument: a value is out of range.

    Example:
        >>> DeltaPolicy(full_every=3).asks_for_full(changed=1, nbytes=100, files=3, used=101, deltas=2)
        True
    """

    max_changed: float = 0.5
    max_files: int = 32
    max_size: float = 2.0
    full_every: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= check_number("max_changed", self.max_changed) <= 1:
            raise InvalidArgument(f"max_changed is {self.max_changed}; it is a share, from 0 to 1")
        # A delta reads from two files.
        check_count("max_files", self.max_files, least=2)
        if not check_number("max_size", self.max_size) > 1:
            raise InvalidArgument(f"max_size is {self.max_size}; a full save is 1, so it is more than that")
        if self.full_every is not None:
            check_count("full_every", self.full_every)

    def asks_for_full(self, changed: int, nbytes: int, files: int, used: int, deltas: int) -> bool:
        """Whether the next save is to be full.

        Args:
            changed: bytes of the chunks that changed in this save, on all ranks.
            nbytes: bytes of all tensors, on all ranks.
            files: the most files that a rank's part names.
            used: bytes of all files that the parts name.
            deltas: saves since the last full one, this one among them.
        """
        return (
            changed > self.max_changed * nbytes
            or files >= self.max_files
            or used > self.max_size * nbytes + SMALL
            or (self.full_every is not None and deltas + 1 >= self.full_every)
        )


@dataclass(frozen=True, slots=True)
class Base:
    """What a rank knows of the last save that is surely committed; the next delta is against it.

    Attributes:
        commit: as it lies on storage.
        part: this rank's.
        members: who held what when it was saved. All ranks know it alike, and so whether it is a base still.
        deltas: saves since the last full one, this one among them.
        full_next: the leader asked for a full save next.
        since: the last full save. What was committed from it on, up to this, may hold what a delta uses.
    """

    commit: Commit
    part: Part
    members: Members
    deltas: int
    full_next: bool
    since: CommitKey


@dataclass(frozen=True, slots=True)
class Delta:
    """A save against a base.

    Attributes:
        changed_bytes: bytes of the chunks that are written.
        runs: (offset in the image, bytes) of what is written, in this order; neighbours are one run.
        files: the files of the base that still hold something.
        extents: of each tensor, in the order of the layout. They number `files`, and after them the file that is
            written now.
    """

    changed_bytes: int
    runs: tuple[tuple[int, int], ...]
    files: tuple[FileRef, ...]
    extents: tuple[tuple[Extent, ...], ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Chunks:
    """Chunks of ranges of bytes, in their order: of each its range, its first byte, and its bytes."""

    owner: Integers
    start: Integers
    length: Integers


def make_delta(base: Part, layout: Layout, digests: bytes, header_length: int) -> Delta:
    """Compares an image with a part; a tensor that has another size there, or is not there, changed as a whole.

    Args:
        base: the part.
        layout: of the image.
        digests: of the chunks of the image, 16 bytes each, in the order of the layout.
        header_length: bytes before the data in the file that is written now.
    """
    by_fqn = {entry.fqn: entry for entry in base.tensors}
    entries = [_of_same_size(by_fqn.get(slot.item.spec.fqn), slot) for slot in layout.slots]
    chunks = _cut([(slot.offset, slot.nbytes) for slot in layout.slots], base.chunk_bytes)
    known = np.array([entry is not None for entry in entries], np.bool_)[chunks.owner]
    old = b"".join(entry.digests for entry in entries if entry is not None)
    changes = ~known
    changes[known] = (_rows(digests)[known] != _rows(old)).any(axis=1)
    changed = np.flatnonzero(changes)
    files, file, offset = _places(entries, base.files, base.chunk_bytes, known, changes)
    lengths = chunks.length[changed]
    file[changed] = len(files)
    offset[changed] = header_length + np.cumsum(lengths) - lengths
    return Delta(
        changed_bytes=int(lengths.sum()),
        runs=_runs(chunks, changed),
        files=files,
        extents=_extents(chunks, file, offset, len(layout.slots)),
    )


def _of_same_size(entry: TensorEntry | None, slot: Slot) -> TensorEntry | None:
    spec = slot.item.spec
    if entry is None or (entry.dtype, entry.offsets, entry.shape) != (spec.dtype, spec.offsets, spec.shape):
        return None
    return entry


def _rows(digests: bytes) -> NDArray[np.uint64]:
    return np.frombuffer(digests, np.uint64).reshape(-1, 2)


def _cut(ranges: Sequence[tuple[int, int]], chunk_bytes: int) -> _Chunks:
    """Cuts ranges, (first byte, bytes), into chunks."""
    offsets, lengths = np.array(ranges, np.int64).reshape(-1, 2).T
    counts = -(-lengths // chunk_bytes)
    owner = np.repeat(np.arange(len(counts)), counts)
    done = (np.arange(len(owner)) - (np.cumsum(counts) - counts)[owner]) * chunk_bytes
    return _Chunks(owner, offsets[owner] + done, np.minimum(lengths[owner] - done, chunk_bytes))


def _places(
    entries: Sequence[TensorEntry | None],
    files: Sequence[FileRef],
    chunk_bytes: int,
    known: Flags,
    changes: Flags,
) -> tuple[tuple[FileRef, ...], Integers, Integers]:
    """Which files of the base are still needed; and of each chunk its file, numbered by these, and place there.

    Of a chunk that is not known there, or changed, file and place say nothing.
    """
    extents = [extent for entry in entries if entry is not None for extent in entry.extents]
    chunks = _cut([(extent.offset, extent.length) for extent in extents], chunk_bytes)
    file, offset = np.zeros((2, len(known)), np.int64)
    file[known] = np.array([extent.file for extent in extents], np.int64)[chunks.owner]
    offset[known] = chunks.start
    needed = np.unique(file[~changes])
    renumbered = np.zeros(len(files) + 1, np.int64)  # one more: a base may have no file
    renumbered[needed] = np.arange(len(needed))
    return tuple(files[number] for number in needed), renumbered[file], offset


def _runs(chunks: _Chunks, changed: Integers) -> tuple[tuple[int, int], ...]:
    # Nothing lies between two tensors of an image, so neighbours in the table are neighbours there.
    first = np.flatnonzero(np.diff(changed, prepend=-2) != 1)
    starts = chunks.start[changed[first]]
    nbytes = _sums(chunks.length[changed], first)
    return tuple(zip(starts.tolist(), nbytes.tolist(), strict=True))


def _extents(chunks: _Chunks, file: Integers, offset: Integers, slots: int) -> tuple[tuple[Extent, ...], ...]:
    """Merges what lies in a row, tensor by tensor."""
    apart = np.ones(len(file), np.bool_)
    apart[1:] = (
        (chunks.owner[1:] != chunks.owner[:-1])
        | (file[1:] != file[:-1])
        | (offset[1:] != offset[:-1] + chunks.length[:-1])
    )
    first = np.flatnonzero(apart)
    columns = (chunks.owner[first], file[first], offset[first], _sums(chunks.length, first))
    rows = zip(*(column.tolist() for column in columns), strict=True)
    found = {
        slot: tuple(Extent(*row[1:]) for row in group) for slot, group in groupby(rows, lambda row: row[0])
    }
    return tuple(found.get(slot, ()) for slot in range(slots))


def _sums(lengths: Integers, first: Integers) -> Integers:
    """The sum from each of `first` up to the next."""
    return np.add.reduceat(lengths, first) if len(first) else first
