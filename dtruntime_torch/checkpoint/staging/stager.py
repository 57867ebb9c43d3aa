"""Moves tensors into the arena while training goes on, and says when each may be overwritten.

The order, for each source:

| its bytes are                     | they are read                         | it may be overwritten once            |
|-----------------------------------|---------------------------------------|---------------------------------------|
| in host memory, contiguous        | in the background                     | `before_overwrite` returned           |
| in host memory, strided           | before `start` returns                | `start` returned                      |
| on a CUDA device                  | there, after what its current stream  | `before_overwrite` returned, by what  |
|                                   | had to do when `start` was called     | then goes to the current stream       |
| on another device                 | before `start` returns                | `start` returned                      |

A device also digests its sources, before anything that its current stream is given once `start` has returned. What is
overwritten too early all the same, behind the back of this, differs when it arrives: `wait` fails, and names it.

Reading a source is always allowed. `wait` and `cancel` end a staging; after them nothing reads the sources any more.
To free memory by `untyped_storage().resize_` is to overwrite it; to drop the last reference to a tensor is not,
since a staging holds its sources until it has ended. Memory that several pairs read is free when all of them are.

The bytes of the arena are read only by `wait`, after all of them have arrived.

A staging that ended well leaves a table: what lies where in the arena, and its digests. The next may be told to copy
only the chunks whose digests differ from it. The table holds as long as the arena is the same and nobody but its stager
writes to those places: bytes that were changed behind its back are taken for what they were. It is gone as soon as a
staging starts, and comes back when that has ended well, so after a failure, a cancel or an interrupt all is copied.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from functools import cached_property

import torch

from dtruntime_torch import _C
from dtruntime_torch.checkpoint.locks import held
from dtruntime_torch.checkpoint.staging.device import device_of
from dtruntime_torch.checkpoint.staging.device_order import enqueue
from dtruntime_torch.checkpoint.staging.device_work import DeviceWork
from dtruntime_torch.checkpoint.staging.sources import FindDevice, Pair, Sources, check_numbers, sort_sources
from dtruntime_torch.errors import BarrierTimeout, InvalidArgument, SaveFailed


class Stager:
    """Stages into one arena, one staging at a time.

    Args:
        arena: where to. Copies from a device run beside this thread only if it is pinned.
        chunk_bytes: bytes of a chunk, at least 1; chunks are counted from the start of each source.
        threads: that copy and digest; None means `torch.get_num_threads()`, asked at each start.
        find_device: gives the device from which a tensor is copied asynchronously, or None.

    Raises:
        InvalidArgument: `chunk_bytes` or `threads` is less than 1.

    Example:
        >>> weight, arena = torch.arange(6, dtype=torch.uint8), _C.Arena(64)
        >>> stager = Stager(arena, chunk_bytes=4)
        >>> staging = stager.start([(weight, 8)])
        >>> staging.before_overwrite([0])
        >>> _ = weight.zero_()
        >>> len(staging.wait()), bytes(memoryview(arena)[8:14]).hex()
        (32, '000102030405')
        >>> weight[:4] = torch.arange(4)
        >>> staging = stager.start([(weight, 8)], only_changed=True)
        >>> len(staging.wait()), staging.nbytes_copied, staging.chunks_skipped
        (32, 2, 1)
    """

    def __init__(
        self,
        arena: _C.Arena,
        chunk_bytes: int,
        threads: int | None = None,
        find_device: FindDevice = device_of,
    ) -> None:
        if chunk_bytes < 1 or (threads is not None and threads < 1):
            raise InvalidArgument(f"chunk_bytes is {chunk_bytes} and threads {threads}; both are at least 1")
        self.arena = arena
        self.chunk_bytes = chunk_bytes
        self._threads = threads
        self._find_device = find_device
        self._running: Staging | None = None

    @property
    def last(self) -> Staging | None:
        """The staging that was started last, if that went well."""
        return self._running

    def start(
        self,
        pairs: Sequence[Pair],
        only_changed: bool = False,
        names: Sequence[str] = (),
        late: Iterable[int] = (),
    ) -> Staging:
        """Starts to copy each source to its place. See above for when it may be overwritten.

        Args:
            pairs: source and offset of its first byte in the arena. The places are the staging's own until it has
                ended; a source does not lie in the arena. A source that is not contiguous arrives in row-major
                order; in host memory its offset must be a multiple of its element size.
            only_changed: leaves chunks alone that the arena holds already: of sources that are read in the
                background, at the places and of the lengths of the staging before this. Where nothing is known of
                the arena, all is copied.
            names: of the pairs, for messages; if none are given, they are numbered.
            late: positions of the pairs that are overwritten later than the others. On a device these come last, and
                `before_overwrite` of the others does not wait for them. What is in host memory is read in the background
                only from `release` on.

        Raises:
            InvalidArgument: the staging before this one has not ended, or a pair cannot be copied; it is named; or
                there is no such pair as one in `late`. Nothing was touched.
            SaveFailed: a device refused a copy. Nothing is in flight.
        """
        if self._running is not None and not self._running.ended:
            raise InvalidArgument("the arena is in use: wait for the staging that goes on, or cancel it")
        sources = sort_sources(pairs, self.arena.nbytes, self._find_device, names)
        coming_late = frozenset(check_numbers(late, len(pairs)))
        last = self._running
        known = last.holds(self.arena, sources) if only_changed and last is not None else None
        # From here on nobody knows what the arena holds, until this staging has ended well.
        self._running = None
        threads = self._threads or torch.get_num_threads()
        job = _C.CopyJob(
            self.arena,
            [sources.tensors[number].data_ptr() for number in sources.native],
            [sources.lengths[number] for number in sources.native],
            [sources.offsets[number] for number in sources.native],
            self.chunk_bytes,
            threads,
            None if known is None else sources.of_some(sources.native, known, self.chunk_bytes),
            hold=bool(coming_late),
        )
        try:
            self._running = Staging(self.arena, sources, job, self.chunk_bytes, threads)
            self._running._enqueue(known, coming_late)
        except BaseException:
            job.cancel()
            if self._running is not None:
                self._running.cancel()
            raise
        return self._running


class Staging:
    """One staging under way, made by `Stager.start`. Its methods may be called from any thread, from several at once.

    If neither it nor its stager is referred to any more, it is cancelled.

    Attributes:
        nbytes: bytes of all sources together.
        ended: `wait` has returned or raised `SaveFailed`, or `cancel` has returned. Nothing reads the sources any
            more, and the arena may be used again.
    """

    _process = 0  # of one whose making was interrupted: nothing of it is in flight

    def __init__(
        self, arena: _C.Arena, sources: Sources, job: _C.CopyJob, chunk_bytes: int, threads: int
    ) -> None:
        self.nbytes = sum(sources.lengths)
        self.ended = False
        self._process = os.getpid()
        self._arena = arena
        self._resizes = arena.resizes
        self._sources = sources
        self._job = job
        self._chunk_bytes = chunk_bytes
        self._threads = threads
        # While there is a view the arena keeps its memory. torch.frombuffer itself does not hold one.
        self._image: torch.Tensor | None = None
        self._on_device: list[DeviceWork] = []
        self._ending = threading.RLock()
        self._digests: bytes | None = None
        self._failure: SaveFailed | None = None

    def before_overwrite(self, indices: Iterable[int] | None = None, timeout: float | None = None) -> None:
        """Returns when sources may be overwritten; see the top of this module.

        For those in host memory that is when they have been copied: the calling thread helps. For those on a
        device it is at once: the current stream of that device, in the calling thread, will wait before it does
        what it is given from now on. Work on other streams must wait for that stream, or ask again there. While
        that stream is captured into a CUDA graph, the thread waits, if there is anything left to wait for.

        A staging that has ended, or is being given up, no longer minds.

        Args:
            indices: which of the pairs, by their position; None means all.
            timeout: seconds to wait for the host's; None waits as long as it takes.

        Raises:
            InvalidArgument: there is no such pair.
            BarrierTimeout: not all that lie in host memory are copied yet.
            SaveFailed: a device failed. Its copies are lost; its sources may be overwritten.
        """
        asked = None if indices is None else check_numbers(indices, len(self._sources.lengths))
        if self.ended:
            return
        for work in self._on_device:
            if asked is None or not set(asked).isdisjoint(work.numbers):
                work.hold_current()
        numbers = None if asked is None else [self._job_numbers[n] for n in asked if n in self._job_numbers]
        try:
            copied = self._job.wait(numbers, timeout)
        except RuntimeError as error:
            if self._failure is None:
                raise SaveFailed(f"the staging was given up: {error}") from error
            return
        if not copied:
            which = "the sources" if asked is None else self._sources.name(asked)
            raise BarrierTimeout(f"{which} may not be overwritten yet: {self._progress(timeout)}")

    def release(self) -> None:
        """Lets the background begin, if there is something that comes late."""
        self._job.release()

    def wait(self, timeout: float | None = None, help: bool = True) -> bytes:
        """Waits, and helps, until every byte is in the arena; then digests what arrived.

        Args:
            timeout: seconds; None waits as long as it takes.
            help: False leaves what lies in host memory to the threads of the background, if there are any: for who
                is in no hurry, and would take a CPU from training.

        Returns:
            The XXH3-128 digests of all chunks of all pairs, in the order of the pairs, 16 bytes each.

        Raises:
            BarrierTimeout: it still goes on, and may be waited for again.
            SaveFailed: a device failed, or what arrived from it is not what it was; or the staging was cancelled. It
                has ended.
        """
        self._end(timeout, help)
        if self._digests is None:
            raise SaveFailed(str(self._failure)) from self._failure
        return self._digests

    def cancel(self, timeout: float | None = None) -> None:
        """Ends it: no thread and no copy touches the arena or the sources after this returned.

        What a device was given cannot be taken back, and is waited for. Does nothing if the staging has ended.

        Args:
            timeout: seconds; None waits as long as it takes.

        Raises:
            BarrierTimeout: a device still copies.
        """
        if self.ended:
            return
        if self._failure is None:
            self._failure = SaveFailed("the staging was cancelled before all bytes were in the arena")
        self._job.cancel()
        self._end(timeout)

    def done(self) -> bool:
        """Whether every byte is in the arena, so that `wait` has only to digest.

        Raises:
            SaveFailed: a device failed.
        """
        if self.ended:
            return self._digests is not None
        return self._failure is None and self._job.done and all(work.done() for work in self._on_device)

    @property
    def nbytes_done(self) -> int:
        """Bytes that are in the arena; those from one device count once all of them are there.

        Raises:
            SaveFailed: a device failed.
        """
        at_once = sum(self._sources.lengths[number] for number in self._sources.by_torch)
        return at_once + self._job.nbytes_done + sum(work.nbytes for work in self._on_device if work.done())

    @property
    def nbytes_copied(self) -> int:
        """Bytes that were copied; the others were in the arena already. Final once `wait` has returned."""
        at_once = sum(self._sources.lengths[number] for number in self._sources.by_torch)
        return at_once + self._job.nbytes_copied + sum(work.nbytes_copied for work in self._on_device)

    @property
    def chunks_skipped(self) -> int:
        """Chunks that were not copied, since the arena held them. Final once `wait` has returned."""
        return self._job.chunks_skipped + sum(work.chunks_skipped for work in self._on_device)

    def holds(self, arena: _C.Arena, sources: Sources) -> bytes | None:
        """Says what an arena holds at the places of some sources, if it is this staging that knows.

        Returns:
            The digests that `wait` returned; None if it did not, or the arena or the places are others.
        """
        same_memory = arena is self._arena and arena.resizes == self._resizes
        same_places = (sources.offsets, sources.lengths) == (self._sources.offsets, self._sources.lengths)
        return self._digests if self.ended and same_memory and same_places else None

    def __del__(self) -> None:
        # In a forked child nothing is in flight, and a thread that is not there may seem to hold the lock.
        if self._process == os.getpid() and not self.ended:
            self.cancel()

    def _enqueue(self, known: bytes | None, late: Collection[int]) -> None:
        sources = self._sources
        if not sources.by_torch and not sources.on_device:
            return
        self._image = image = torch.frombuffer(memoryview(self._arena), dtype=torch.uint8)
        # One by one: what is in flight is known here also if the next is refused.
        for work in enqueue(self._arena, image, sources, known, self._chunk_bytes, late):
            self._on_device.append(work)
        for number in sources.by_torch:
            source, offset = sources.tensors[number], sources.offsets[number]
            place = image[offset : offset + sources.lengths[number]].view(source.dtype)
            place.view(source.shape).copy_(source)

    def _end(self, timeout: float | None, help: bool = True) -> None:
        deadline = None if timeout is None else time.monotonic() + timeout
        with held(self._ending, timeout) as taken:
            if not taken or (not self.ended and not self._settled(deadline, help)):
                raise BarrierTimeout(self._progress(timeout))

    def _settled(self, deadline: float | None, help: bool) -> bool:
        """Whether nothing is in flight any more, before the deadline; the staging has ended then, well or not."""
        try:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            settled = self._job.wait(timeout=left, help=help)
        except RuntimeError as error:
            # It was told to stop, perhaps by another thread just now: this returns when it has.
            self._job.cancel()
            settled = True
            self._failure = self._failure or SaveFailed(f"the staging was given up: {error}")
        for work in self._on_device:
            try:
                settled = work.wait(deadline) and settled
            except SaveFailed as failure:
                self._failure = failure
        if settled:
            if self._failure is None:
                try:
                    self._digests = self._digest()
                except SaveFailed as failure:
                    self._failure = failure
            self._image = None
            self._sources = replace(self._sources, tensors=())
            self.ended = True
        return settled

    def _digest(self) -> bytes:
        sources, chunk_bytes = self._sources, self._chunk_bytes
        native = self._job.digests()
        if len(sources.native) == len(sources.lengths):
            return native
        by_torch = _C.digest_ranges(
            self._arena,
            [sources.offsets[number] for number in sources.by_torch],
            [sources.lengths[number] for number in sources.by_torch],
            chunk_bytes,
            self._threads,
        )
        parts = [(sources.native, native), (sources.by_torch, by_torch)]
        for work in self._on_device:
            parts.append((work.numbers, work.digests(self._arena, self._threads)))
        return sources.in_order(parts, chunk_bytes)

    @cached_property
    def _job_numbers(self) -> dict[int, int]:
        """Number of a pair -> number of the copy that the job makes for it."""
        return {pair: number for number, pair in enumerate(self._sources.native)}

    def _progress(self, timeout: float | None) -> str:
        return f"after {timeout:g} s {self.nbytes_done} of {self.nbytes} bytes are staged; wait longer, or cancel"
