"""Which copies move many tensors of a device into the arena: as few as can be. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Span(NamedTuple):
    """Bytes of one storage that go to one place.

    Attributes:
        pair: number of the first pair that they belong to.
        storage: number of the storage.
        start: first byte in the storage.
        nbytes: how many.
        offset: first byte in the arena.
    """

    pair: int
    storage: int
    start: int
    nbytes: int
    offset: int


def merge_spans(spans: Iterable[Span]) -> list[Span]:
    """Merges what is adjacent both in a storage and in the arena.

    Args:
        spans: in any order; no two share bytes of the arena.

    Returns:
        Spans that move the same bytes, in the order of the arena, as few as can be.

    Example:
        >>> merge_spans([Span(1, 0, 8, 4, 104), Span(0, 0, 0, 8, 96), Span(2, 1, 12, 4, 108)])
        [Span(pair=0, storage=0, start=0, nbytes=12, offset=96), Span(pair=2, storage=1, start=12, nbytes=4, offset=108)]
    """
    merged: list[Span] = []
    for span in sorted(spans, key=lambda span: span.offset):
        last = merged[-1] if merged else None
        if last is not None and (last.storage, last.start + last.nbytes, last.offset + last.nbytes) == (
            span.storage,
            span.start,
            span.offset,
        ):
            merged[-1] = last._replace(pair=min(last.pair, span.pair), nbytes=last.nbytes + span.nbytes)
        else:
            merged.append(span)
    return merged
