"""The lengths at which length-dependent code changes its path, shared by all tests.

A round number hides mistakes; the numbers beside it show them. Sizes are in bytes.
"""

from __future__ import annotations


def around(*values: int) -> tuple[int, ...]:
    return tuple(sorted({near for value in values for near in (value - 1, value, value + 1)}))


SMALL = tuple(range(9))

# The chunk that tests use where they may choose: several of them fit in a tensor of a test.
CHUNK_BYTES = 4096
PAGE_BYTES = 4096

# XXH3 takes another path above each of these, and again at each block of 1024.
XXH3_SEAMS = (0, 3, 8, 16, 128, 240, 1024, 2048)

# Sizes of tensors, images and buffers.
LENGTHS = tuple(
    sorted({*SMALL, *around(16, 128, 240, 1024), *around(CHUNK_BYTES, 2 * CHUNK_BYTES, 1 << 16, 1 << 20)})
)

# csrc/core/file_io.h: from here on past the page cache, and in requests of this size.
DIRECT_FROM = 256 << 10
REQUEST_BYTES = 8 << 20
FILE_LENGTHS = tuple(
    sorted({*SMALL, *around(PAGE_BYTES, DIRECT_FROM, REQUEST_BYTES), 2 * REQUEST_BYTES + PAGE_BYTES + 1})
)

# Lengths of datasets: powers of 2 and of 4 (a permutation on a power of 4 needs no cycle walking, one on the
# next number needs it most), squares, and primes.
COUNTS = tuple(
    sorted({*range(1, 9), *around(*(1 << k for k in range(3, 13))), *around(9 * 9, 31 * 31), 97, 1009, 4099})
)
