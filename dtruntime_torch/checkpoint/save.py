"""The first half of a save, in the caller's thread; `publish` is the second.

Flatten the state, agree on its structure with the other ranks (only when it changed), open the attempt (here only
for the first save, which may be refused), begin to stage. When `Saver.start` returns, only what an optimizer or the user
has to ask for first may still be read.
"""

from __future__ import annotations

import logging
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress

from dtruntime_torch import _C
from dtruntime_torch.checkpoint.arguments import check_metadata, check_step
from dtruntime_torch.checkpoint.cleaning.prune_plan import PruneReport
from dtruntime_torch.checkpoint.flatten import FlatState
from dtruntime_torch.checkpoint.info import CheckpointInfo
from dtruntime_torch.checkpoint.locks import held
from dtruntime_torch.checkpoint.objects import Json
from dtruntime_torch.checkpoint.saving.failures import forget_frames, tear_in
from dtruntime_torch.checkpoint.saving.handle import SaveHandle, SaveMetrics
from dtruntime_torch.checkpoint.saving.health import Health
from dtruntime_torch.checkpoint.saving.layout import Layout
from dtruntime_torch.checkpoint.saving.lineage import Lineage
from dtruntime_torch.checkpoint.saving.policies import SavePolicies
from dtruntime_torch.checkpoint.saving.publish import Publisher
from dtruntime_torch.checkpoint.saving.snapshot import Snapshot
from dtruntime_torch.checkpoint.saving.structures import Structure, Structures
from dtruntime_torch.checkpoint.staging.capture import Capture, Patience
from dtruntime_torch.checkpoint.staging.lateness import Lateness
from dtruntime_torch.checkpoint.staging.stager import Stager
from dtruntime_torch.checkpoint.staging.staging import begin, make_room
from dtruntime_torch.errors import (
    BarrierTimeout,
    CommitConflict,
    InvalidArgument,
    SaveSkipped,
    UnsupportedType,
)
from dtruntime_torch.membership import Membership
from dtruntime_torch.storage import StorageBackend

logger = logging.getLogger(__name__)


class Saver:
    """Saves the states of one manager, one at a time.

    Args:
        backend: where to.
        name: under which name.
        members: the ranks that save together.
        lineage: where this manager stands.
        policies: what the user chose.

    Attributes:
        health: how the saves have gone.
        lateness: what they may read late.
    """

    def __init__(
        self,
        backend: StorageBackend,
        name: str,
        members: Membership,
        lineage: Lineage,
        policies: SavePolicies,
    ) -> None:
        self.health = Health()
        self.lateness = Lateness(policies.consistency)
        self._policies = policies
        self._members = members
        self._lineage = lineage
        self._publisher = Publisher(backend, name, members, lineage, policies)
        self._stager = Stager(_C.Arena(0), policies.chunk_bytes)
        self._structures = Structures(members)
        self._sequence = 0
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="dtruntime-save")
        self._handle: SaveHandle | None = None
        self._capture: Capture | None = None
        self._lock = threading.RLock()
        self._inside: int | None = None  # the thread that is in prepare, start or close
        self._background: int | None = None  # the thread that publishes

    def prepare(self, state: object) -> None:
        """Agrees on the structure of `state` and makes room for it, so that the first save finds it done."""
        with self.alone():
            key = self._next_key()
            with self._declining(key):
                self.wait()
                self._agree(key, state)

    def start(self, state: object, step: object, metadata: object, at_once: bool = False) -> SaveHandle:
        """Takes the snapshot and lets the rest go on in the background.

        Args:
            state: the user's.
            step: the user's.
            metadata: the user's.
            at_once: nothing is read late, for the caller waits anyway.
        """
        began, metrics = time.perf_counter(), SaveMetrics()
        with self.alone():
            key = self._next_key()
            try:
                with self._declining(key):
                    handle = self._start(key, state, step, metadata, metrics, at_once)
            except SaveSkipped as reason:
                handle = SaveHandle.failed(check_step(step), metrics, reason)
            metrics.call_seconds = time.perf_counter() - began
            return handle

    def _start(
        self, key: str, state: object, step: object, metadata: object, metrics: SaveMetrics, at_once: bool
    ) -> SaveHandle:
        number, notes = check_step(step), check_metadata(metadata)
        if self._policies.on_busy == "skip" and not at_once:
            self._skip_if_busy(key, number)
        began = time.perf_counter()
        self.wait()
        metrics.wait_seconds = time.perf_counter() - began
        self._tell_of_failure()
        with self._abandoning():
            with self._counting(refusals=(InvalidArgument, UnsupportedType, SaveSkipped)):
                snapshot = self._take(key, state, number, notes, metrics, at_once)
            future = self._executor.submit(self._publish, snapshot)
        self._handle = SaveHandle(number, metrics, future, _staged_query(snapshot.capture))
        return self._handle

    def _skip_if_busy(self, key: str, step: int) -> None:
        busy = self._handle
        if busy is not None and not busy.done():
            rank = self._members.rank
            reason = SaveSkipped(f"step {step} is not saved: rank {rank} was still saving step {busy.step}")
            self._publisher.skip(key, reason)
            raise reason

    def before_update(self) -> None:
        """Returns when everything may be changed that a save still reads."""
        if (capture := self._capture) is not None:
            capture.before_update()

    def prune(self, dry_run: bool) -> PruneReport:
        """Deletes what is not to stay, once the save that is under way has ended."""
        with self.alone():
            self.wait()
            return self._publisher.prune(dry_run)

    def wait(self) -> None:
        """Waits for the save that is under way, whatever becomes of it.

        Raises:
            BarrierTimeout: it still goes on after the manager's time-out.
        """
        # The only thread takes its work in turn, so what is queued now is done when all before it is.
        done = self._executor.submit(int)
        timeout = self._members.barrier.timeout
        if wait([done], timeout).not_done:
            done.cancel()
            raise BarrierTimeout(
                f"the save before this one still goes on after {timeout:g} s: its storage does not answer, or is "
                f"slower than the manager's timeout allows"
            )

    def close(self) -> None:
        """Waits for the save that is under way and gives the memory back.

        Raises:
            DTRuntimeError: the last save failed and nobody was told yet.
        """
        with self.alone():
            self.wait()
            self._executor.shutdown()
            self._stager = Stager(_C.Arena(0), self._policies.chunk_bytes)
            handle, self._handle, self._capture = self._handle, None, None
            failure = handle.unseen_failure() if handle is not None else None
            if failure is not None:
                raise failure

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keeps other threads out; refuses a signal handler that interrupted this thread in here, and callbacks."""
        if self._background == threading.get_ident():
            raise InvalidArgument(
                "a done callback runs in the thread that saves, which cannot wait for itself: use this manager elsewhere"
            )
        if self._inside == threading.get_ident():
            raise InvalidArgument(
                "this manager is at work in this very thread, which a signal handler has interrupted: let the "
                "handler note that a save is wanted, and save in the training loop"
            )
        timeout = self._members.barrier.timeout
        with held(self._lock, timeout) as taken:
            if not taken:
                raise BarrierTimeout(f"another thread is still using this manager after {timeout:g} s")
            self._inside = threading.get_ident()
            try:
                yield
            finally:
                self._inside = None

    def _next_key(self) -> str:
        self._sequence += 1
        return f"save/{self._sequence}"

    @contextmanager
    def _declining(self, key: str) -> Iterator[None]:
        """Tells the other ranks if this one takes no part, so that none waits for it in vain."""
        try:
            yield
        except SaveSkipped:
            raise  # who skips has told the others
        except BaseException as error:
            self._structures.known = None
            self._publisher.decline(key, error, aside=True)
            raise

    @contextmanager
    def _abandoning(self) -> Iterator[None]:
        """Gives up the staging that was begun, if it comes to nothing."""
        self._capture = None
        try:
            yield
        except BaseException:
            if self._capture is not None:
                self._capture.cancel(self._members.barrier.timeout)
            raise

    def _take(
        self, key: str, state: object, step: int, metadata: Json, metrics: SaveMetrics, at_once: bool
    ) -> Snapshot:
        self._lineage.check_step(step)
        flat, structure = self._agree(key, state)
        attempt = self._publisher.open(key, step) if self._lineage.generation is None else None
        layout, members = structure.layout, structure.learnt.members
        base = self._lineage.base_of(members)
        delta = base is not None and not base.full_next
        immediate = at_once or self.lateness.is_immediate()
        capture = self._begin_capture(flat, layout, metrics, delta, immediate)
        return Snapshot(
            key=key,
            step=step,
            members=members,
            plan=structure.plan,
            layout=layout,
            image=memoryview(self._stager.arena)[: layout.length],
            capture=capture,
            chunk_bytes=self._policies.chunk_bytes,
            values={spec.fqn: flat.values[spec.fqn] for spec in structure.plan.objects},
            metadata=metadata,
            metrics=metrics,
            attempt=attempt,
            base=base,
            delta=delta,
        )

    def _begin_capture(
        self, flat: FlatState, layout: Layout, metrics: SaveMetrics, delta: bool, immediate: bool
    ) -> Capture:
        lateness = None if immediate else self.lateness
        patience = Patience(self._policies.door_timeout, self._policies.paranoid)
        # Noted before it is waited for: what fails from here on gives it up.
        self._capture = capture = begin(
            self._stager, layout, flat.tensors, lateness, patience, metrics, only_changed=delta
        )
        timeout = self._members.barrier.timeout
        if immediate:
            capture.wait(timeout, help=True)
        else:
            capture.take_early(timeout)
        return capture

    def _agree(self, key: str, state: object) -> tuple[FlatState, Structure]:
        before = self._structures.known
        flat, structure = self._structures.agree(key, state)
        if structure is not before:
            room = make_room(self._stager.arena, structure.layout.length)
            self._stager = Stager(room, self._policies.chunk_bytes)
        return flat, structure

    def _publish(self, snapshot: Snapshot) -> CheckpointInfo:
        self._background = threading.get_ident()
        try:
            with self._counting(refusals=(SaveSkipped,)):
                info = self._publisher.publish(snapshot)
            self.health.note_good()
            return info
        except SaveSkipped as reason:
            logger.info("%s", reason)
            raise
        except BaseException as error:
            if not isinstance(error, BarrierTimeout) or error.decided:
                # The ranks may have come to differ in structure: the next save asks all of them again.
                self._structures.known = None
            if (torn := tear_in(error)) is not None:
                self.lateness.give_up(str(torn))
            logger.error("a save failed: %s", error)
            forget_frames(error)
            raise
        finally:
            self._end_capture(snapshot.capture)
            # A backend that never came back may still read it.
            with suppress(BufferError):
                snapshot.image.release()

    def _end_capture(self, capture: Capture) -> None:
        try:
            capture.cancel(self._members.barrier.timeout)
        except BarrierTimeout as error:
            logger.error("staging memory cannot be used again yet: %s", error)

    @contextmanager
    def _counting(self, refusals: tuple[type[Exception], ...] = ()) -> Iterator[None]:
        try:
            yield
        except refusals:
            raise
        except BaseException:
            self.health.note_failure()
            raise

    def _tell_of_failure(self) -> None:
        failure = self._handle.unseen_failure() if self._handle is not None else None
        if isinstance(failure, CommitConflict):
            # It will not get better: this job was replaced, and what it goes on to do would be lost.
            raise failure
        if failure is not None and self._handle is not None and self._policies.on_failure == "raise":
            self._handle.mark_seen()
            raise failure
        if failure is not None:
            warnings.warn(f"the save before this one failed: {failure}", RuntimeWarning, stacklevel=5)


def _staged_query(capture: Capture) -> Callable[[], bool]:
    """Asks a capture whether all is staged, and keeps neither it nor the arena."""
    kept = weakref.ref(capture)

    def is_staged() -> bool:
        there = kept()
        return there is None or there.staged

    return is_staged
