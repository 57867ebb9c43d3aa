"""The native core of dtruntime_torch: digests, page-aligned memory, parallel file I/O, the permutation.

This stub is its manual. What holds for all of it:

- It needs neither torch nor NumPy: memory comes in through the buffer protocol, or as an address (an `int`,
  as `Tensor.data_ptr()` gives it).
- Sizes, offsets and lengths are in bytes and not negative (ValueError).
- A `Buffer` is anything with contiguous bytes: bytes, bytearray, memoryview, a NumPy array, an `Arena`. One
  that is not contiguous is a BufferError. It is pinned for the call: it cannot be resized or freed meanwhile.
  Whoever writes to it during the call gets an undefined digest or file.
- Every call that works on data releases the GIL, may be made from any thread, from several at once, and in
  a forked child.
- `threads` is the number of threads that work, the calling one included. 0 lets the module choose: for
  digests as many as there are CPUs to run on, at most 16; for files 8, which keeps that many requests in
  flight whatever the number of CPUs. The pool that they come from is made at its first use.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from os import PathLike
from typing import final

from typing_extensions import Buffer

@final
class Arena:
    """Host memory that starts at a page (4096 bytes) and is reused, save after save.

    It offers its bytes through the buffer protocol, writable: `memoryview(arena)`, `numpy.frombuffer(arena)`,
    `torch.frombuffer(arena, dtype=torch.uint8)`. Each such view keeps the memory alive; it goes back to the
    system when the arena and the last view are gone. Fresh memory is zero.

    Example:
        >>> from dtruntime_torch._C import Arena
        >>> arena = Arena(10_000)
        >>> len(arena), arena.address % 4096
        (10000, 0)
        >>> memoryview(arena)[:3] = b"abc"
    """

    def __init__(self, nbytes: int) -> None:
        """Maps `nbytes` bytes. The system hands out a page when it is first written.

        Raises:
            MemoryError: the system refuses.
        """

    @property
    def nbytes(self) -> int:
        """Its size, as given."""

    @property
    def address(self) -> int:
        """The address of its first byte: a multiple of 4096, but see `read_file`. `resize` may change it."""

    def resize(self, nbytes: int) -> None:
        """Changes its size; the contents are undefined afterwards.

        The pages are kept where they suffice and more than half of them stays in use, else they are replaced
        and the old ones go back to the system.

        Raises:
            BufferError: a view is in use, or a call works on the arena; nothing has changed.
            MemoryError: the system refuses; nothing has changed.
        """

    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

def digest(data: Buffer, chunk_bytes: int, threads: int = 0) -> bytes:
    """Digests `data` chunk by chunk: XXH3-128, seed 0, default secret.

    Args:
        data: the bytes; not kept.
        chunk_bytes: size of a chunk, at least 1. The last one may be shorter.
        threads: see above.

    Returns:
        16 bytes a chunk in canonical (big-endian) form, concatenated: the hex of 16 of them is what
        `xxhsum -H2` prints for that chunk. Empty for empty data.

    Example:
        >>> from dtruntime_torch._C import digest
        >>> digest(b"abcd", chunk_bytes=4).hex()
        '8d6b60383dfa90c21be79eecd1b1353d'
        >>> len(digest(bytes(10), chunk_bytes=4))
        48
    """

def digest_ranges(
    data: Buffer, offsets: Sequence[int], lengths: Sequence[int], chunk_bytes: int, threads: int = 0
) -> bytes:
    """Digests many ranges of one buffer.

    Args:
        data: the bytes; not kept.
        offsets: where each range starts in `data`. Ranges may overlap and be empty.
        lengths: the length of each.
        chunk_bytes: size of a chunk. Chunks are counted from the start of their range and never span two.
        threads: see above.

    Returns:
        For each range in turn what `digest` gives for it, concatenated.

    Raises:
        ValueError: a range ends after `data`, or the sequences differ in length; found before room for the
            digests is made.
    """

def copy_digest(
    arena: Arena,
    sources: Sequence[int],
    lengths: Sequence[int],
    offsets: Sequence[int],
    chunk_bytes: int,
    threads: int = 0,
) -> bytes:
    """Copies memory into an arena and digests what arrived there, in one pass over it.

    Args:
        arena: where to. It cannot be resized during the call.
        sources: the address of each source: readable for its length until the call returns, which the caller
            sees to (a wrong one ends the process), and not in the arena.
        lengths: bytes of each.
        offsets: where each goes in the arena. Those bytes are the call's own until it returns.
        chunk_bytes: size of a chunk, counted from the start of each source.
        threads: see above.

    Returns:
        The digests of the chunks of each source in turn, as `digest` gives them.

    Raises:
        ValueError: a target ends after the arena or overlaps another, a source of more than 0 bytes is null,
            or the sequences differ in length. Nothing was copied.
    """

def write_file(
    path: str | bytes | PathLike[str], data: Iterable[Buffer], threads: int = 0, direct: bool = True
) -> None:
    """Creates a file from buffers, one after another, and returns once its contents are durable.

    The space is reserved first, so that a full disk is found before anything is written (where the file
    system can). Then requests of 8 MiB are written in parallel, and the file is synced; its entry in the
    folder is not: sync the folder for that.

    Args:
        path: must not exist. Its folder must.
        data: the buffers; not kept. One whose address lies in its page as its bytes lie in the file's
            (address and file offset are equal modulo 4096) is written from where it is; any other is copied
            through a buffer of 8 MiB per thread.
        threads: see above.
        direct: past the page cache (O_DIRECT), for files from 256 KiB on. What the file system does not take
            that way, and the last bytes that fill no page, go through the cache.

    Raises:
        FileExistsError: there is something at `path`, which was left as it is.
        OSError: with `errno`, a text that names the failed step, and `filename`. What was written so far is
            left at `path`; delete it.
    """

def read_file(
    path: str | bytes | PathLike[str], offset: int, length: int, threads: int = 0, direct: bool = True
) -> Arena:
    """Reads exactly `length` bytes of a file, from `offset` on.

    Args:
        path: a regular file.
        offset: of the first byte.
        length: how many.
        threads: see above.
        direct: past the page cache (O_DIRECT), from 256 KiB on and where the file system can.

    Returns:
        A new arena of `length` bytes that belongs to the caller. Its address and `offset` are equal modulo
        4096, so that nothing had to be copied; it starts at a page if `offset` does.

    Raises:
        EOFError: the file is shorter. Found before memory is taken, or when the file shrinks during the call.
        ValueError: it is no regular file.
        MemoryError: the system refuses the memory.
        OSError: with `errno`, a text that names the failed step, and `filename`.
    """

def rename_noreplace(source: str | bytes | PathLike[str], target: str | bytes | PathLike[str]) -> None:
    """Renames a file in one step, and only if there is nothing at `target` (renameat2, RENAME_NOREPLACE).

    Raises:
        FileExistsError: there is something at `target`; nothing has changed.
        OSError: with `errno`, `filename` and `filename2`. EINVAL: the file system cannot do it; ENOSYS: the
            kernel cannot.
    """

def permute(n: int, key: tuple[int, int], start: int, stride: int, count: int, version: int = 0) -> list[int]:
    """Gives a slice of the keyed permutation of range(n), without a table.

    Args:
        n: 0 to 2**62.
        key: (seed, epoch), each in [0, 2**64).
        start: the first position.
        stride: from one position to the next, at least 1.
        count: how many; all positions lie in [0, n).
        version: of the permutation. 0, the only one, is provisional.

    Returns:
        `[p[start + i * stride] for i in range(count)]`, where `p` holds each of range(n) once, in an order
        that depends on `n` and `key` only: not on the machine, nor on how it is sliced.

    Raises:
        ValueError: an argument is out of range, or the version is not known.

    Example:
        >>> from dtruntime_torch._C import permute
        >>> permute(10, key=(1, 2), start=0, stride=1, count=10)
        [7, 2, 9, 5, 1, 8, 3, 0, 4, 6]
        >>> permute(10, key=(1, 2), start=1, stride=2, count=5)
        [2, 5, 8, 0, 6]
    """

def build_info() -> dict[str, object]:
    """Says how this module was built.

    Returns:
        "compiler": its name and version; "cuda": the version of the CUDA runtime that it was built for, as
        "13.0", or False; "simd": the widest instruction set that digests use, "scalar".
    """
