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
- `impl` names the variant of the digest loop, one of `digest_impls()`; all give the same digests. None takes
  the one that the process chose: the widest, or what the environment variable DTRUNTIME_DIGEST_IMPL named at
  the first use. A name that this machine cannot run is a ValueError that lists those it can.
- `threads` is the number of threads that work, the calling one included. 0 lets the module choose: as many as
  there are CPUs to run on, at most 16. The pool that they come from is made at its first use.
- `queue_depth` is the number of requests of 8 MiB to a file that are in flight at once, each on a thread of that
  pool; 0 is 8, whatever the number of CPUs.
- `direct` lets whole pages (4096 bytes) of a file that lie together, from 256 KiB on, go past the page cache
  (O_DIRECT). What the file system does not take that way, and ends that fill no page, go through the cache.
- `cuda_*`, but for `cuda_device_count`, enqueue their work on a stream and return without waiting for it, also
  while the stream is captured into a CUDA graph. `device` is the number of the device and `stream` the raw handle
  of one of its streams (`torch.cuda.Stream.cuda_stream`; 0 is the default stream). Memory is given by address
  and trusted: a wrong one ends in a fault on the device. It must stay valid until the stream has passed the
  work: torch's caching allocator sees to that for memory that was allocated with the same stream current.
  ValueError if a number is out of range, before anything is enqueued; RuntimeError in CUDA's own words if the work
  cannot be enqueued, and in a build without CUDA, which says how to build with it.
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
    `torch.frombuffer(memoryview(arena), dtype=torch.uint8)`. Each such view keeps the memory alive and from
    being resized; it goes back to the system when the arena and the last view are gone. (torch lets go of the
    buffer and keeps the object: a tensor made from the arena itself keeps it alive, but not from being
    resized.) Fresh memory is zero. From 4 MiB on it starts at 2 MiB and lies in huge pages where the kernel
    gives them.

    Example:
        >>> from dtruntime_torch._C import Arena
        >>> arena = Arena(10_000)
        >>> len(arena), arena.address % 4096
        (10000, 0)
        >>> memoryview(arena)[:3] = b"abc"
    """

    def __init__(
        self, nbytes: int, *, name: str | None = None, pin: bool = False, dont_fork: bool = False
    ) -> None:
        """Maps `nbytes` bytes. The system hands out a page when it is first written, but see `name` and `pin`.

        Args:
            nbytes: its size.
            name: makes it shared memory that outlives the process: the file `/dev/shm/NAME`, readable to this
                user alone. 1 to 200 of `A-Z a-z 0-9 . _ -`, with no dot in front. `attach` finds it, whatever
                became of its maker; `unlink` removes it, and nothing else does. Its maker holds an exclusive
                `flock` on it as long as it lives. All of it is handed out at once, so that a full /dev/shm is
                found here and not when it is written.
            pin: pins it for CUDA. Where that cannot be done it is as without, and `pin_refusal` says why. Its
                pages are handed out at once, in parallel.
            dont_fork: leaves it out of children that fork makes. After a fork of a DataLoader the parent's
                writes then copy no pages, and the child holds none of the old. A child that touches it, by a
                view or by a call, ends with SIGSEGV, as it does with memory that is freed. `pin` implies it.

        Raises:
            MemoryError: the system refuses.
            FileExistsError: there is shared memory of that name.
            OSError: with `errno` and `filename`, as ENOSPC where /dev/shm is full. No name is left behind.
        """

    @staticmethod
    def attach(name: str) -> Arena:
        """Opens the shared memory that an arena of this name made, in this or any process, alive or dead.

        Returns:
            An arena with its contents, as large as it is. Who writes to it writes to every arena that shares
            it; resize it only where nobody else has it, who would end with SIGBUS past the new end.

        Raises:
            FileNotFoundError: there is none of that name.
            ValueError: that is no name for one, or no regular file.
            PermissionError: it belongs to another user.
            OSError: with `errno` and `filename`, as ELOOP for a symbolic link.
        """

    def unlink(self) -> None:
        """Removes its name, as `multiprocessing.shared_memory` does: memory that is in use stays.

        Raises:
            FileNotFoundError: its name was removed already; whatever bears it now is left alone.
            ValueError: it has none.
        """

    def populate(self, threads: int = 0) -> None:
        """Has the system hand out its pages now, in parallel, and leaves what is in them as it is.

        Args:
            threads: see above.

        Raises:
            MemoryError: there are not that many.
            OSError: with `errno`: it cannot be populated.
        """

    @property
    def name(self) -> str | None:
        """The name that it was made or attached with; also after `unlink`."""

    @property
    def pinned(self) -> bool:
        """Whether a device can reach it."""

    @property
    def pin_refusal(self) -> str | None:
        """Why it is not pinned though that was asked for, in CUDA's words, or that this build has no CUDA."""

    @property
    def nbytes(self) -> int:
        """Its size, as given."""

    @property
    def resizes(self) -> int:
        """How often it was resized since it was made: while that is the same, what is in it is still there."""

    @property
    def address(self) -> int:
        """The address of its first byte: a multiple of 4096, but see `read_file`. `resize` may change it."""

    def resize(self, nbytes: int) -> None:
        """Changes its size; the contents are undefined afterwards.

        The pages are kept where they suffice and more than half of them stays in use, else they are replaced
        and the old ones go back to the system. Name and pinning stay.

        Raises:
            BufferError: a view is in use, or a call works on the arena; nothing has changed.
            MemoryError: the system refuses; nothing has changed.
            OSError: as the constructor; nothing has changed.
            RuntimeError: the device refuses to unpin its old pages, in CUDA's words; nothing has changed.
        """

    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

def digest_impls() -> tuple[str, ...]:
    """Names the variants of the digest loop that this machine can run, widest first.

    Returns:
        On x86-64 of "avx512" (AVX-512F) and "avx2" those that the processor has, on aarch64 "neon", and "scalar"
        last, which runs everywhere.

    Example:
        >>> from dtruntime_torch._C import digest, digest_impls
        >>> {digest(b"abcd", 4, impl=impl).hex() for impl in digest_impls()}
        {'8d6b60383dfa90c21be79eecd1b1353d'}
    """

def digest(data: Buffer, chunk_bytes: int, threads: int = 0, *, impl: str | None = None) -> bytes:
    """Digests `data` chunk by chunk: XXH3-128, seed 0, default secret.

    Args:
        data: the bytes; not kept.
        chunk_bytes: size of a chunk, at least 1. The last one may be shorter.
        threads: see above.
        impl: see above.

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
    data: Buffer,
    offsets: Sequence[int],
    lengths: Sequence[int],
    chunk_bytes: int,
    threads: int = 0,
    *,
    impl: str | None = None,
) -> bytes:
    """Digests many ranges of one buffer.

    Args:
        data: the bytes; not kept.
        offsets: where each range starts in `data`. Ranges may overlap and be empty.
        lengths: the length of each.
        chunk_bytes: size of a chunk. Chunks are counted from the start of their range and never span two.
        threads: see above.
        impl: see above.

    Returns:
        For each range in turn what `digest` gives for it, concatenated.

    Raises:
        ValueError: a range ends after `data`, or the sequences differ in length; found before room for the
            digests is made.
    """

def digest_into(
    digests: int, source: int, nbytes: int, chunk_bytes: int, threads: int = 0, *, impl: str | None = None
) -> None:
    """Does what `digest` does, from an address to an address, which are trusted: a wrong one ends the process.

    Args:
        digests: where the digests go: 16 bytes a chunk, which are the call's own until it returns.
        source: the address of the bytes. It may be 0 if `nbytes` is.
        nbytes: how many.
        chunk_bytes: size of a chunk, at least 1.
        threads: see above.
        impl: see above.

    Example:
        >>> import ctypes
        >>> from dtruntime_torch._C import digest_into
        >>> source, digests = ctypes.create_string_buffer(b"abcd"), ctypes.create_string_buffer(16)
        >>> digest_into(ctypes.addressof(digests), ctypes.addressof(source), nbytes=4, chunk_bytes=4)
        >>> digests.raw.hex()
        '8d6b60383dfa90c21be79eecd1b1353d'
    """

def copy_digest(
    arena: Arena,
    sources: Sequence[int],
    lengths: Sequence[int],
    offsets: Sequence[int],
    chunk_bytes: int,
    threads: int = 0,
    *,
    impl: str | None = None,
    stream: bool | None = None,
) -> bytes:
    """Copies memory into an arena and digests what arrived there, in one pass over it.

    Each byte is read once: the digests hold for what is in the arena also if somebody writes to a source
    meanwhile.

    Args:
        arena: where to. It cannot be resized during the call.
        sources: the address of each source: readable for its length until the call returns, which the caller
            sees to (a wrong one ends the process), and not in the arena.
        lengths: bytes of each.
        offsets: where each goes in the arena. Those bytes are the call's own until it returns.
        chunk_bytes: size of a chunk, counted from the start of each source.
        threads: see above.
        impl: see above.
        stream: whether to store past the caches, where the variant can. None does so from 8 MiB on, all sources
            together: what does not fit in the caches anyhow is copied faster, and leaves them to others.

    Returns:
        The digests of the chunks of each source in turn, as `digest` gives them.

    Raises:
        ValueError: a target ends after the arena or overlaps another, a source of more than 0 bytes is null,
            or the sequences differ in length. Nothing was copied.
    """

@final
class CopyJob:
    """Copies memory into an arena and digests what arrives, in the background: `copy_digest`, but at once back.

    It starts as it is made. Threads of low priority (10 nicer than the one that made them) take the chunks in
    the order of the copies, so that a training loop keeps the CPUs that it needs. Who waits for some of the
    copies does what is left of them, with as many threads of normal priority.

    Until it is done, or `cancel` has returned, the sources must stay readable and unchanged and the targets
    are its own; the source of copy `i` may be written again as soon as `wait([i])` has returned True. It keeps
    the arena alive, and from being resized, until `done`, `wait` or `digests` has said that it is done, or it
    was cancelled. Dropping it cancels it; so does the end of the interpreter. In a forked child a job that
    was not done never will be.

    Given the digests of what the targets hold already, it digests each chunk of a source first, and copies it
    only if it differs.

    Example:
        >>> from dtruntime_torch._C import Arena, CopyJob, digest
        >>> source, arena = Arena(10), Arena(100)
        >>> memoryview(source)[:] = b"0123456789"
        >>> job = CopyJob(arena, [source.address], [10], [64], chunk_bytes=4)
        >>> job.wait(timeout=60)
        True
        >>> bytes(memoryview(arena)[64:74]), job.digests() == digest(source, 4)
        (b'0123456789', True)
        >>> memoryview(source)[5:6] = b"x"
        >>> again = CopyJob(arena, [source.address], [10], [64], chunk_bytes=4, known=job.digests())
        >>> again.wait(timeout=60), again.nbytes_copied, again.chunks_skipped
        (True, 4, 2)
        >>> bytes(memoryview(arena)[64:74]), again.digests() == digest(source, 4)
        (b'01234x6789', True)
    """

    def __init__(
        self,
        arena: Arena,
        sources: Sequence[int],
        lengths: Sequence[int],
        offsets: Sequence[int],
        chunk_bytes: int,
        threads: int = 0,
        known: Buffer | None = None,
        hold: bool = False,
    ) -> None:
        """Starts it. Arguments as those of `copy_digest`, but that `threads` work in the background, beside who
        waits. 0: as many as there are CPUs to run on, at most 16. Where the system has no thread to give, only
        `wait` makes progress.

        Args:
            arena: see above, as for those that follow.
            sources: see above.
            lengths: see above.
            offsets: see above.
            chunk_bytes: see above.
            threads: see above.
            known: the digests of what the targets hold now, as `digests` gives them; copied. They are trusted: a
                chunk whose source has its known digest is not written. None: all is copied.
            hold: the threads begin at `release`, so that they take no CPU from the caller until then. Who waits helps
                as ever.

        Raises:
            ValueError: as `copy_digest`, or `known` is not 16 bytes a chunk. Nothing was copied.
        """

    def wait(
        self, copies: Sequence[int] | None = None, timeout: float | None = None, help: bool = True
    ) -> bool:
        """Helps, and returns once these copies are done.

        Args:
            copies: their numbers, counted from 0; the first is helped first. None: all.
            timeout: seconds, looked at between two chunks; 0 only asks. None: no end.
            help: False leaves the work to the background, as long as that has a thread: for who is in no hurry, and
                would take a CPU from training.

        Returns:
            True when they are done, False when the time was over before.

        Raises:
            IndexError: there is no such copy.
            RuntimeError: they are not done and never will be: this is a forked child, or it was cancelled, which
                another thread may still be doing: call `cancel` before the sources go.
            KeyboardInterrupt: or whatever a signal's handler raises. The job goes on.
        """

    def release(self) -> None:
        """Lets the threads begin, if they were held."""

    def cancel(self) -> None:
        """Starts no further chunk, and returns when no thread touches the memory. What is done stays done."""

    @property
    def done(self) -> bool:
        """Whether all copies are."""

    @property
    def nbytes(self) -> int:
        """The bytes of all copies."""

    @property
    def nbytes_done(self) -> int:
        """How many of them have arrived, or were found to be there."""

    @property
    def nbytes_copied(self) -> int:
        """How many of them were copied."""

    @property
    def chunks_skipped(self) -> int:
        """How many chunks were found to be there."""

    def digests(self) -> bytes:
        """Gives what `copy_digest` would have returned: the digests of all chunks, copied or not.

        Raises:
            ValueError: it is not done yet.
            RuntimeError: it was cancelled before it was done.
        """

def copy_digest_into(
    digests: int,
    target: int,
    source: int,
    nbytes: int,
    chunk_bytes: int,
    threads: int = 0,
    *,
    impl: str | None = None,
) -> None:
    """Does what `copy_digest` does for one source, with addresses, which are trusted: a wrong one ends the process.

    Args:
        digests: where the digests go: 16 bytes a chunk.
        target: where the copy goes. It and `digests` are the call's own until it returns.
        source: the address of the bytes; they overlap neither.
        nbytes: how many.
        chunk_bytes: size of a chunk, at least 1.
        threads: see above.
        impl: see above.
    """

def read_memory(data: Buffer, threads: int = 0) -> int:
    """Reads every byte and does next to nothing with it: a yardstick for benchmarks of `digest`.

    Args:
        data: the bytes; not kept.
        threads: see above.

    Returns:
        The exclusive or of its 8-byte little-endian words, so that no read can be left out. The last bytes of each MiB
        that fill no 64 do not count.

    Example:
        >>> from dtruntime_torch._C import read_memory
        >>> read_memory(bytes([1] * 8 + [0] * 48 + [2] * 8)) == 0x0303030303030303
        True
    """

def copy_streaming(target: Buffer, source: Buffer, threads: int = 0) -> None:
    """Copies past the caches (non-temporal stores) and does nothing else: a yardstick for `copy_digest`.

    Args:
        target: writable, as long as `source`, and not overlapping it.
        source: the bytes; not kept.
        threads: see above.

    Raises:
        ValueError: they differ in length.
    """

def write_file(
    path: str | bytes | PathLike[str], data: Iterable[Buffer], queue_depth: int = 0, direct: bool = True
) -> None:
    """Creates a file from buffers, one after another, and returns once its contents are durable.

    Its entry in the folder is not durable: sync the folder for that. For the rest see `write_extents`.

    Args:
        path: must not exist. Its folder must.
        data: the buffers; not kept.
        queue_depth: see above.
        direct: see above.

    Raises:
        FileExistsError: there is something at `path`, which was left as it is.
        MemoryError: the system refuses the memory to copy what lies unaligned.
        OSError: as `write_extents`.
    """

def write_extents(
    path: str | bytes | PathLike[str],
    data: Buffer,
    extents: Sequence[tuple[int, int, int]],
    *,
    nbytes: int | None = None,
    queue_depth: int = 0,
    direct: bool = True,
    sync_folder: bool = False,
) -> None:
    r"""Creates a file from pieces of one buffer, and returns once its contents are durable.

    The space for the whole length is reserved first, so that a full disk is found before anything is written
    (where the file system can). Then the requests are written, and the file is synced.

    An extent that lies in its page of memory as it lies in its page of the file (address and file offset are
    equal modulo 4096) is written from where it is. The others, and neighbours in the file that are apart in
    memory, are copied through a buffer of 8 MiB per request in flight.

    Args:
        path: must not exist. Its folder must.
        data: the memory; not kept.
        extents: (offset in `data`, offset in the file, length) of each piece, in any order. What none covers
            reads as zeros.
        nbytes: the length of the file, or None for where the last extent ends.
        queue_depth: see above.
        direct: see above.
        sync_folder: makes also the file's name durable, which a crash may lose otherwise. For a file that is
            written where it stays; one that is renamed afterwards needs its folder synced then.

    Raises:
        ValueError: two extents share a byte of the file, or one ends after `data` or after `nbytes`; nothing
            was made.
        FileExistsError: there is something at `path`, which was left as it is.
        MemoryError: the system refuses the memory to copy what lies unaligned.
        OSError: with `errno`, a text that names the failed step and the offset in the file, and `filename`.
            What was written so far is left at `path`, perhaps in its full length: delete it. Nothing that
            failed is tried again: after a failed sync the system may have dropped what it could not write, and
            would report success the next time.

    Example:
        >>> from dtruntime_torch._C import write_extents
        >>> write_extents("extents", b"abcdef", [(0, 4, 2), (4, 0, 2)], nbytes=8)
        >>> open("extents", "rb").read()
        b'ef\x00\x00ab\x00\x00'
    """

def read_file(
    path: str | bytes | PathLike[str], offset: int, length: int, queue_depth: int = 0, direct: bool = True
) -> Arena:
    """Reads exactly `length` bytes of a file, from `offset` on.

    Args:
        path: a regular file.
        offset: of the first byte.
        length: how many.
        queue_depth: see above.
        direct: see above.

    Returns:
        A new arena of `length` bytes that belongs to the caller. Its address and `offset` are equal modulo
        4096, so that nothing had to be copied; it starts at a page if `offset` does.

    Raises:
        EOFError: the file is shorter. Found before memory is taken, or when the file shrinks during the call.
        ValueError: it is no regular file.
        MemoryError: the system refuses the memory.
        OSError: with `errno`, a text that names the failed step and the offset, and `filename`.
    """

def read_extents(
    path: str | bytes | PathLike[str],
    arena: Buffer,
    extents: Sequence[tuple[int, int, int]],
    *,
    queue_depth: int = 0,
    direct: bool = True,
) -> None:
    """Reads pieces of a file to where they belong in memory, and writes no other byte of it.

    Args:
        path: a regular file.
        arena: the memory, writable. After a failure the contents of the extents are undefined.
        extents: (offset in `arena`, offset in the file, length) of each piece, in any order. Where memory and
            file offset are equal modulo 4096 the bytes come without a copy.
        queue_depth: see above.
        direct: see above.

    Raises:
        ValueError: two extents share a byte of the file or of the memory, one ends after the memory, or `path`
            is no regular file; nothing was read.
        EOFError: the file is shorter. Found before anything is read, or when the file shrinks during the call.
        OSError: with `errno`, a text that names the failed step and the offset, and `filename`.
        MemoryError: the system refuses the memory to copy what lies unaligned.
    """

def read_and_digest(
    path: str | bytes | PathLike[str],
    targets: Iterable[Buffer],
    offsets: Sequence[int],
    chunk_bytes: int,
    threads: int = 0,
) -> bytes:
    """Reads pieces of a file to where they belong and digests their chunks while they are in the caches.

    Through the page cache, so that memory may lie anywhere, and what one process has read the others of the host find
    there. Pieces are read in the order in which they are given.

    Args:
        path: a regular file.
        targets: the memory of each piece, writable. After a failure its contents are undefined.
        offsets: where each begins in the file. Pieces may overlap there.
        chunk_bytes: size of a chunk. Chunks are counted from the start of their piece and never span two.
        threads: that read at once; 0: one for each CPU and at least 4, to keep a disk busy.

    Returns:
        The digests of all chunks, as `digest` gives them, in the order of the pieces.

    Raises:
        ValueError: two targets share a byte, the sequences differ in length, or `path` is no regular file; nothing was
            read.
        EOFError, OSError: as for `read_extents`.
    """

def rename_noreplace(source: str | bytes | PathLike[str], target: str | bytes | PathLike[str]) -> None:
    """Renames a file in one step, and only if there is nothing at `target` (renameat2, RENAME_NOREPLACE).

    Raises:
        FileExistsError: there is something at `target`; nothing has changed.
        OSError: with `errno`, `filename` and `filename2`. EINVAL: the file system cannot do it; ENOSYS: the
            kernel cannot.
    """

def inject_fault(call: str, nth: int, action: str, value: int = 0) -> None:
    """For tests alone: lets a system call of the file functions fail, in the whole process.

    Faults add up until `clear_faults`. A call meets the one that was set first.

    Args:
        call: "open", "fstat", "fcntl", "fallocate", "ftruncate", "pwrite", "pread", "fsync", "close",
            "renameat2", or "any", which counts them all.
        nth: which of these calls, counted from 1 at the first fault that was set since `clear_faults`; 0 is
            each. A call that is repeated because a signal interrupted it counts again.
        action: "fail": reports the errno `value` and does nothing (a close does close). "shorten": a pread or
            pwrite transfers at most `value` bytes. "kill": the process ends by SIGKILL instead of the call.
        value: see `action`.

    Raises:
        ValueError: there is no such call or action, or they do not go together with `value`.
    """

def clear_faults() -> dict[str, int]:
    """For tests alone: removes all faults that `inject_fault` set.

    Returns:
        How many calls of each kind were made since the first fault was set, "any" being their sum.

    Example:
        >>> from dtruntime_torch._C import clear_faults, inject_fault, write_file
        >>> inject_fault("pwrite", 1, "fail", 28)
        >>> write_file("file", [b"data"])
        Traceback (most recent call last):
        OSError: [Errno 28] No space left on device (writing 4 bytes at offset 0): 'file'
        >>> clear_faults()["pwrite"]
        1
    """

def cuda_device_count() -> int:
    """Gives the number of CUDA devices: 0 without a driver, and in a build without CUDA.

    Raises:
        RuntimeError: there is a driver that cannot be used, as one that is too old; in CUDA's words.

    Example:
        >>> from dtruntime_torch._C import cuda_device_count
        >>> cuda_device_count() >= 0
        True
    """

def cuda_list_chunks(
    sources: Sequence[int],
    lengths: Sequence[int],
    targets: Sequence[int],
    chunk_bytes: int,
    chunks: int,
    device: int,
    stream: int,
) -> None:
    """Stores the list of chunks that the other functions work on.

    Args:
        sources: the address of each piece of memory, at any alignment.
        lengths: bytes of each. One of 0 bytes has no chunk.
        targets: where each is to be copied: device memory, or pinned memory of the host that is mapped for the
            device. 0 where it is not copied; may be empty if none is.
        chunk_bytes: size of a chunk, counted from the start of each piece; its last one may be shorter.
        chunks: device memory, aligned to 8, of 24 bytes a chunk.
        device: see `cuda_device_count`.
        stream: see there.
    """

def cuda_digest(
    chunks: int, count: int, digests: int, queue: int, device: int, stream: int, copy: bool = False
) -> None:
    """Stores the digest of each chunk of a list, as `digest` gives it.

    Args:
        chunks: what `cuda_list_chunks` stored.
        count: how many there are, below 2**31.
        digests: 16 bytes a chunk, aligned to 16: device memory, or pinned memory of the host that is mapped for
            the device.
        queue: scratch memory of 4 bytes, aligned to 4, this call's own until the stream has passed it.
        device: see `cuda_device_count`.
        stream: see there.
        copy: copies each chunk to its target in the same pass. Then each has one, and none overlaps a source.
    """

def cuda_find_changed(
    digests: int, known: int, count: int, changed: int, changed_count: int, device: int, stream: int
) -> None:
    """Compares digests with known ones, and brings these up to date.

    Args:
        digests: of `count` chunks, 16 bytes each, aligned to 16.
        known: as many, aligned to 16; equal to `digests` afterwards. Both may lie in pinned memory of the host.
        count: below 2**31.
        changed: where the numbers of the chunks that differ go, in any order: room for `count` uint32.
        changed_count: where their number goes: one uint32.
        device: see `cuda_device_count`.
        stream: see there.
    """

def cuda_gather_changed(
    chunks: int,
    changed: int,
    changed_count: int,
    most: int,
    staging: int,
    stride: int,
    device: int,
    stream: int,
) -> None:
    """Copies the chunks that changed to one place, or each to its target.

    Args:
        chunks: what `cuda_list_chunks` stored.
        changed: what `cuda_find_changed` stored, which is read on the device.
        changed_count: the same.
        most: no more chunks than this can have changed, below 2**31.
        staging: the i-th changed chunk goes to `staging + i * stride`; 0: to its own target.
        stride: at least the length of the longest chunk.
        device: see `cuda_device_count`.
        stream: see there.
    """

def cuda_read(data: int, nbytes: int, sink: int, device: int, stream: int) -> None:
    """Reads memory as fast as plain loads can, which is what the speed of `cuda_digest` is compared with.

    Args:
        data: device memory, aligned to 16.
        nbytes: how much.
        sink: device memory of 8 bytes, where a sum that nobody needs goes.
        device: see `cuda_device_count`.
        stream: see there.
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
        "13.0", or False; "simd": the variant of the digest loop that this process uses, one of `digest_impls()`.

    Raises:
        ValueError: DTRUNTIME_DIGEST_IMPL names a variant that this machine cannot run.
    """
