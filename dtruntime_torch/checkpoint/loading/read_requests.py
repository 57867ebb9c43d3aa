"""Which ranges of which files to ask for. Pure.

Extents are read in the order in which they lie, neighbours together, in requests of bounded size: a request
costs a round trip, and its bytes are held in memory until they are checked.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from dtruntime_torch.checkpoint.format.records import Part

REQUEST_BYTES = 64 << 20
"""The most that one request asks for, unless a chunk or a header is larger."""

JOIN_BYTES = 64 << 10
"""A gap up to this long between two wanted ranges is read along: cheaper than another request."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Whole chunks of one tensor that lie in a row.

    Attributes:
        entry: position among the part's tensors.
        offset: first byte in the file.
        length: bytes.
        start: first byte within the tensor, at the border of a chunk.
    """

    entry: int
    offset: int
    length: int
    start: int


@dataclass(frozen=True, slots=True)
class ReadRequest:
    """Pieces that are read together: they ascend, and lie within REQUEST_BYTES."""

    file: int
    offset: int
    length: int
    pieces: tuple[Piece, ...]


def pieces_by_file(part: Part, wanted: Iterable[int]) -> dict[int, list[Piece]]:
    """What is wanted of each file, ascending, in pieces that a request can hold.

    Args:
        part: describes the tensors.
        wanted: positions among its tensors.
    """
    pieces: dict[int, list[Piece]] = {}
    most = max(1, REQUEST_BYTES // part.chunk_bytes) * part.chunk_bytes
    for position in wanted:
        start = 0
        for extent in part.tensors[position].extents:
            for done in range(0, extent.length, most):
                length = min(most, extent.length - done)
                piece = Piece(position, extent.offset + done, length, start + done)
                pieces.setdefault(extent.file, []).append(piece)
            start += extent.length
    for of_file in pieces.values():
        of_file.sort(key=lambda piece: piece.offset)
    return pieces


def split_at(pieces: Sequence[Piece], size: int, chunk_bytes: int) -> tuple[list[Piece], list[Piece]]:
    """What of the pieces a file of `size` bytes still has, in whole chunks, and what it lost."""
    there, lost = [], []
    for piece in pieces:
        whole = piece.length
        if piece.offset + piece.length > size:
            whole = max(0, size - piece.offset) // chunk_bytes * chunk_bytes
            rest = piece.length - whole
            lost.append(replace(piece, offset=piece.offset + whole, length=rest, start=piece.start + whole))
        if whole:
            there.append(replace(piece, length=whole))
    return there, lost


def requests_for(file: int, pieces: Sequence[Piece]) -> Iterator[ReadRequest]:
    """The requests that bring the pieces of one file, which ascend."""
    together: list[Piece] = []
    for piece in pieces:
        if together:
            begin, end = together[0].offset, together[-1].offset + together[-1].length
            if piece.offset - end > JOIN_BYTES or piece.offset + piece.length - begin > REQUEST_BYTES:
                yield _request(file, together)
                together = []
        together.append(piece)
    if together:
        yield _request(file, together)


def _request(file: int, pieces: Sequence[Piece]) -> ReadRequest:
    begin, end = pieces[0].offset, pieces[-1].offset + pieces[-1].length
    return ReadRequest(file, begin, end - begin, tuple(pieces))
