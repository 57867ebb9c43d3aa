"""How much is checked and measured."""

from __future__ import annotations

from dataclasses import dataclass

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes and counts of a run.

    Attributes:
        longest: every length from 0 to this is digested, at each of 16 alignments.
        ragged_chunks: how many chunks of any length are digested in one launch.
        ragged_longest: the longest of those.
        chunk_sizes: into which a tensor is cut.
        chunked_bytes: of that tensor, about.
        large_bytes: of the largest tensor that is digested.
        changed_chunks: how many chunks are compared with known digests.
        staging_bytes: staged in a round, about.
        staging_rounds: how often, while the sources are overwritten.
        training_rounds: how often the state of a training loop is staged, or saved, while it trains.
        copied_bytes: of the copies beside computation, and of the staging that is measured.
        pieces: of 64 KiB, of which every second is gathered: how many are.
        measured_bytes: of the memory whose digests are measured; a size that the device has no room for is left out.
        other_chunk_sizes: measured without a goal, on the first of these.
        launches: of a kernel between two looks at the clock.
        repetitions: of each measurement.
        layers: of the model that is trained.
        width: of its layers.
        samples: of a batch.
        tokens: of a sample.
        steps: of training after each save.
        windows: of as many steps, for each way to save.
    """

    longest: int
    ragged_chunks: int
    ragged_longest: int
    chunk_sizes: tuple[int, ...]
    chunked_bytes: int
    large_bytes: int
    changed_chunks: int
    staging_bytes: int
    staging_rounds: int
    training_rounds: int
    copied_bytes: int
    pieces: int
    measured_bytes: tuple[int, ...]
    other_chunk_sizes: tuple[int, ...]
    launches: int
    repetitions: int
    layers: int
    width: int
    samples: int
    tokens: int
    steps: int
    windows: int


FULL = Sizes(
    longest=5 * KIB,
    ragged_chunks=20_000,
    ragged_longest=96 * KIB,
    chunk_sizes=(64 * KIB, 64 * KIB + 1, 256 * KIB, MIB - 1, MIB, MIB + 1, 4 * MIB, 16 * MIB),
    chunked_bytes=80 * MIB,
    large_bytes=GIB,
    changed_chunks=5000,
    staging_bytes=128 * MIB,
    staging_rounds=60,
    training_rounds=4,
    copied_bytes=GIB,
    pieces=1000,
    measured_bytes=(GIB, 4 * GIB),
    other_chunk_sizes=(64 * KIB, 256 * KIB, 16 * MIB),
    launches=8,
    repetitions=15,
    layers=8,
    width=768,
    samples=8,
    tokens=512,
    steps=20,
    windows=5,
)

QUICK = Sizes(
    longest=2100,
    ragged_chunks=3000,
    ragged_longest=32 * KIB,
    chunk_sizes=(64 * KIB, MIB, 16 * MIB),
    chunked_bytes=40 * MIB,
    large_bytes=128 * MIB,
    changed_chunks=1000,
    staging_bytes=32 * MIB,
    staging_rounds=20,
    training_rounds=2,
    copied_bytes=256 * MIB,
    pieces=1000,
    measured_bytes=(GIB,),
    other_chunk_sizes=(),
    launches=4,
    repetitions=5,
    layers=4,
    width=512,
    samples=8,
    tokens=256,
    steps=10,
    windows=2,
)


def said(nbytes: int) -> str:
    """A size as one says it.

    Example:
        >>> said(3 << 20), said(1025)
        ('3 MiB', '1025 bytes')
    """
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if nbytes >= unit and nbytes % unit == 0:
            return f"{nbytes // unit} {name}"
    return f"{nbytes} bytes"
