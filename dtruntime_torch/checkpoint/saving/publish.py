"""The second half of a save: a staged snapshot becomes a durable part, and all parts one commit.

It runs in the background, on every rank. Open the attempt, write the part, arrive; the leader decides and
commits; everybody learns how it ended. Arriving is irrevocable: from there on only the leader's word counts. It may
be that all go on with another try, in a folder of its own: because a delta's parent is gone, because ranks do not
know the same parent, or because storage failed and the policy allows it.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property

from dtruntime_torch import errors
from dtruntime_torch.barrier import Barrier
from dtruntime_torch.checkpoint.cleaning.prune_plan import PruneReport
from dtruntime_torch.checkpoint.info import CheckpointInfo
from dtruntime_torch.checkpoint.manifest import Commit, Part
from dtruntime_torch.checkpoint.names import Attempt
from dtruntime_torch.checkpoint.saving import shard_file
from dtruntime_torch.checkpoint.saving.delta import Base, Delta, make_delta
from dtruntime_torch.checkpoint.saving.leader import Leader
from dtruntime_torch.checkpoint.saving.lineage import Lineage
from dtruntime_torch.checkpoint.saving.messages import Answer, Arrival
from dtruntime_torch.checkpoint.saving.policies import SavePolicies
from dtruntime_torch.checkpoint.saving.snapshot import Snapshot
from dtruntime_torch.errors import (
    BarrierTimeout,
    CommitConflict,
    CommitUnknown,
    DTRuntimeError,
    InvalidArgument,
    SaveFailed,
    SaveSkipped,
    StoreUnreachable,
)
from dtruntime_torch.membership import Membership
from dtruntime_torch.retry import Tries, may_pass
from dtruntime_torch.storage import StorageBackend, run_sync

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Try:
    """What one rank wrote in one try.

    Attributes:
        attempt: where to.
        delta: it was to be a delta.
        arrival: what this rank says of it.
        part: its part.
        failure: why there is none.
    """

    attempt: Attempt
    delta: bool
    arrival: Arrival
    part: Part | None = None
    failure: Exception | None = None


class Publisher:
    """Makes the snapshots of one manager checkpoints.

    Args:
        backend: where to.
        name: under which name.
        members: the ranks that save together.
        lineage: read for the generation and the parent, advanced by every save that ends.
        policies: what the user chose.
    """

    def __init__(
        self,
        backend: StorageBackend,
        name: str,
        members: Membership,
        lineage: Lineage,
        policies: SavePolicies,
    ) -> None:
        self._backend = backend
        self._name = name
        self._members = members
        self._lineage = lineage
        self._leader = Leader(backend, name, members, lineage, policies)
        self._policies = policies
        self._leftovers: list[Attempt] = []

    def open(self, key: str, step: int) -> Attempt:
        """The leader names the attempt, and all learn it.

        Before the first save of a line of checkpoints this claims its generation.

        Args:
            key: the save's prefix in the Store.
            step: the training step.

        Raises:
            CommitConflict: the line is not the newest, or somebody else has replaced this job. On all ranks.
        """
        barrier = self._members.barrier
        # A rank that waits elsewhere for this one learns from it that it waits in vain.
        barrier.begin(f"{key}/commit")
        attempt = Attempt(
            **json.loads(barrier.announce(f"{key}/attempt", lambda: _encode(self._leader.name_attempt(step))))
        )
        self._lineage.generation = attempt.generation
        return attempt

    def decline(self, key: str, error: BaseException, aside: bool = False) -> None:
        """Tells the other ranks that this one takes no part in a save, so that none waits for it in vain.

        Args:
            key: the save's prefix in the Store.
            error: why. Where this rank has arrived already, that stands.
            aside: the background may still be at the meeting of the save before.
        """
        rank = self._members.rank
        message = errors.to_record(error)["message"]
        # On what other ranks say, the barrier puts who they are.
        refusal = SaveFailed(message if rank else f"rank 0 takes no part in this save: {message}")
        try:
            barrier = self._aside if aside else self._members.barrier
            if isinstance(error, SaveSkipped):
                # What all are told already.
                barrier.decline(f"{key}/commit", error)
                return
            barrier.decline(f"{key}/groups", refusal)
            if rank == 0:
                barrier.decline(f"{key}/attempt", refusal)
                barrier.decline(f"{key}/commit", refusal)
            else:
                barrier.decline(f"{key}/commit", Arrival.failed(error, passing=False).encode())
        except StoreUnreachable as unheard:
            # What went wrong first is what the caller has to know.
            logger.warning("the other ranks could not be told that this one failed: %s", unheard)

    def skip(self, key: str, reason: SaveSkipped) -> None:
        """Makes a save fail on all ranks at once, while this one still publishes the one before it.

        Args:
            key: the save's prefix in the Store.
            reason: what they are told.
        """
        self._aside.void(f"{key}/commit", reason)
        self._aside.decline(f"{key}/attempt", reason)

    @cached_property
    def _aside(self) -> Barrier:
        """For the training thread, while the background may wait at the other."""
        return self._members.barrier.beside()

    def prune(self, dry_run: bool) -> PruneReport:
        """As `Leader.prune`, on this process alone; while nothing is being saved."""
        return self._leader.prune(dry_run)

    def publish(self, snapshot: Snapshot) -> CheckpointInfo:
        """Writes this rank's part and waits for the commit.

        Raises:
            SaveFailed: a rank could not write its part; the files are deleted.
            BarrierTimeout: ranks did not arrive, or the leader's answer did not.
            CommitConflict: another job committed in this place, or replaced this one.
            CommitUnknown: storage never said whether the commit took effect; nothing is deleted.
        """
        with suppress(Exception):
            # Nothing else comes before it, for steps wait as long. What it fails with is told where its part is due.
            snapshot.capture.wait(self._members.barrier.timeout)
        self._clean_up()
        key, attempt, delta = snapshot.key, snapshot.attempt, snapshot.delta
        tries = Tries(self._policies.retry)
        while True:
            try:
                attempt = attempt or self.open(key, snapshot.step)
                self._check_not_skipped(key)
                tried = self._write(snapshot, attempt, delta)
            except BaseException as error:
                self.decline(key, error)
                raise
            answer = self._meet(key, snapshot, tried, tries)
            if answer.delete:
                self._give_back(attempt)
            if answer.kind != "again" or answer.attempt is None:
                return self._conclude(snapshot, tried, answer)
            logger.warning("step %d is saved once more: %s", snapshot.step, answer.message)
            # The pause that the leader chose for all ranks, in the thread that has nothing but this save to do.
            time.sleep(answer.delay)
            attempt, delta = answer.attempt, not answer.full
            key = f"{snapshot.key}/{attempt.number}"

    def _check_not_skipped(self, key: str) -> None:
        if self._policies.on_busy == "skip":
            reason = self._members.barrier.voided(f"{key}/commit")
            if reason is not None:
                raise reason

    def _write(self, snapshot: Snapshot, attempt: Attempt, delta: bool) -> Try:
        """Makes this rank's part durable."""
        began = time.perf_counter()
        try:
            digests = snapshot.capture.wait(self._members.barrier.timeout)
            part, arrival = self._write_part(snapshot, digests, attempt, delta)
        except Exception as error:
            return Try(attempt, delta, Arrival.failed(error, passing=may_pass(error)), failure=error)
        finally:
            snapshot.metrics.writing_seconds += time.perf_counter() - began
        return Try(attempt, delta, arrival, part)

    def _write_part(
        self, snapshot: Snapshot, digests: bytes, attempt: Attempt, as_delta: bool
    ) -> tuple[Part, Arrival]:
        if attempt.step != snapshot.step:
            raise InvalidArgument(f"it saves step {snapshot.step} while rank 0 saves step {attempt.step}")
        base, metrics = snapshot.base, snapshot.metrics
        changes = None if base is None else _compare(snapshot, digests, base)
        delta = changes if as_delta else None
        if snapshot.delta and delta is None:
            # Most of this was not copied just now, and was last looked at when it was.
            snapshot.check_image(digests)
        shard = run_sync(
            shard_file.write_shard(
                self._backend,
                self._name,
                attempt,
                snapshot.plan,
                snapshot.layout,
                snapshot.image,
                digests,
                snapshot.chunk_bytes,
                snapshot.values,
                delta,
            )
        )
        metrics.written_bytes = shard.ref.data_length
        metrics.changed_bytes = snapshot.nbytes if changes is None else changes.changed_bytes
        arrival = Arrival(
            part=shard.ref,
            nbytes=snapshot.nbytes,
            changed_bytes=0 if changes is None else changes.changed_bytes,
            files=len(shard.part.files),
            used=sum(file.length for file in shard.part.files),
            uses=tuple({file.path.rpartition("/")[0]: None for file in shard.part.files}),
            base=None if base is None or delta is None else base.commit.manifest_sha256,
        )
        return shard.part, arrival

    def _meet(self, key: str, snapshot: Snapshot, tried: Try, tries: Tries) -> Answer:
        """Arrives, and learns from the leader how this try went."""

        def act(values: Sequence[bytes]) -> bytes:
            arrivals = [Arrival.decode(value) for value in values]
            return self._leader.decide(
                tried.attempt, tried.delta, snapshot.metadata, arrivals, tries
            ).encode()

        def interrupt() -> DTRuntimeError | None:
            return self._members.barrier.voided(f"{key}/commit")

        # One rank that looks is enough, for it tells all.
        looks = self._policies.on_busy == "skip" and self._members.rank == 0
        began = time.perf_counter()
        try:
            answer = self._members.barrier.meet(
                f"{key}/commit", tried.arrival.encode(), act, interrupt if looks else None
            )
            return Answer.decode(answer)
        except BarrierTimeout as error:
            if error.decided:
                self._give_back(tried.attempt)
            raise
        except SaveFailed as error:
            # The leader declined, so there will be no commit.
            self._give_back(tried.attempt)
            raise error from tried.failure
        except Exception:
            # Nobody knows whether the leader came to the commit: this step is not tried again.
            self._lineage.last_step = snapshot.step
            raise
        finally:
            snapshot.metrics.commit_seconds += time.perf_counter() - began

    def _conclude(self, snapshot: Snapshot, tried: Try, answer: Answer) -> CheckpointInfo:
        if answer.kind == "aborted":
            raise SaveFailed(answer.message) from tried.failure
        lineage = self._lineage
        lineage.last_step = snapshot.step
        if answer.kind == "lost":
            raise CommitConflict(answer.message)
        if answer.kind == "unknown" or answer.info is None:
            raise CommitUnknown(answer.message)
        info = answer.info
        lineage.parent = info.key
        if self._policies.delta is not None and tried.part is not None:
            there = Commit(info.name, *info.key, tried.attempt.path, info.sha256)
            deltas = lineage.deltas_with(info.full)
            since = info.key if info.full or lineage.base is None else lineage.base.since
            lineage.base = Base(there, tried.part, snapshot.members, deltas, answer.full_next, since)
        return info

    def _give_back(self, attempt: Attempt) -> None:
        """Deletes this rank's files of an attempt that can never be committed."""
        self._leftovers.append(attempt)
        self._clean_up()

    def _clean_up(self) -> None:
        """Finishes the deletes that are left over: a full disk heals itself with the next save."""
        remaining = []
        for attempt in self._leftovers:
            try:
                run_sync(
                    shard_file.delete_shard(
                        self._backend, self._name, attempt, self._members.rank, self._members.world_size
                    )
                )
            except Exception as error:
                logger.warning("files of %s are left over, to be deleted later: %s", attempt.path, error)
                remaining.append(attempt)
        self._leftovers = remaining
        if self._members.rank == 0:
            self._leader.clean_up()


def _encode(attempt: Attempt) -> bytes:
    return json.dumps(asdict(attempt)).encode()


def _compare(snapshot: Snapshot, digests: bytes, base: Base) -> Delta:
    return make_delta(base.part, snapshot.layout, digests, len(shard_file.DELTA_HEADER))
