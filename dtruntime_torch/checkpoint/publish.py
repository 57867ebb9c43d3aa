"""The second half of a save: a staged snapshot becomes a durable part, and all parts one commit.

It runs in the background, on every rank. Open the attempt, write the part, arrive; the leader decides and
commits; everybody learns how it ended. Arriving is irrevocable: from there on only the leader's word counts.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone

import torch

from dtruntime_torch import errors
from dtruntime_torch._version import __version__
from dtruntime_torch.checkpoint import commit, shard_file
from dtruntime_torch.checkpoint.cleaning import Cleaner
from dtruntime_torch.checkpoint.handle import SaveMetrics
from dtruntime_torch.checkpoint.info import CheckpointInfo
from dtruntime_torch.checkpoint.layout import Layout
from dtruntime_torch.checkpoint.lineage import Lineage
from dtruntime_torch.checkpoint.manifest import Manifest, PartRef
from dtruntime_torch.checkpoint.names import Attempt, CommitKey
from dtruntime_torch.checkpoint.objects import Json
from dtruntime_torch.checkpoint.prune_plan import PruneReport
from dtruntime_torch.checkpoint.retention import KEEP_ALL, RetentionPolicy
from dtruntime_torch.checkpoint.specs import SavePlan
from dtruntime_torch.errors import (
    BarrierTimeout,
    CommitConflict,
    CommitUnknown,
    InvalidArgument,
    SaveFailed,
    StoreUnreachable,
)
from dtruntime_torch.membership import Membership
from dtruntime_torch.storage import StorageBackend, run_sync

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A state as it was when the save was called.

    Attributes:
        key: the save's prefix in the Store.
        step: the training step.
        plan: what this rank writes.
        layout: where it lies in `image`.
        image: the data file, ready to be written; unchanged until the save has ended.
        digests: of its chunks, in the order of the layout.
        chunk_bytes: bytes of a chunk.
        values: fqn -> encoded object, for the objects of the plan.
        metadata: the user's.
        metrics: to be filled in.
        attempt: where it goes, if that was opened before it was taken.
    """

    key: str
    step: int
    plan: SavePlan
    layout: Layout
    image: memoryview
    digests: bytes
    chunk_bytes: int
    values: Mapping[str, Json]
    metadata: Json
    metrics: SaveMetrics
    attempt: Attempt | None


class Publisher:
    """Makes the snapshots of one manager checkpoints.

    Args:
        backend: where to.
        name: under which name.
        members: the ranks that save together.
        lineage: read for the generation and the parent, advanced by every save that ends.
        policy: which checkpoints stay.
    """

    def __init__(
        self,
        backend: StorageBackend,
        name: str,
        members: Membership,
        lineage: Lineage,
        policy: RetentionPolicy = KEEP_ALL,
    ) -> None:
        self._backend = backend
        self._name = name
        self._members = members
        self._lineage = lineage
        self._cleaner = Cleaner(backend, name, policy)
        self._tries: Counter[CommitKey] = Counter()
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
        attempt = Attempt(**json.loads(barrier.announce(f"{key}/attempt", lambda: self._name_attempt(step))))
        self._lineage.generation = attempt.generation
        return attempt

    def decline(self, key: str, error: BaseException) -> None:
        """Tells the other ranks that this one takes no part in a save, so that none waits for it in vain.

        Args:
            key: the save's prefix in the Store.
            error: why. Where this rank has arrived already, that stands.
        """
        rank, barrier = self._members.rank, self._members.barrier
        message = errors.to_record(error)["message"]
        # On what other ranks say, the barrier puts who they are.
        refusal = SaveFailed(message if rank else f"rank 0 takes no part in this save: {message}")
        try:
            barrier.decline(f"{key}/groups", refusal)
            if rank == 0:
                barrier.decline(f"{key}/attempt", refusal)
                barrier.decline(f"{key}/commit", refusal)
            else:
                barrier.decline(f"{key}/commit", _failed_arrival(error))
        except StoreUnreachable as unheard:
            # What went wrong first is what the caller has to know.
            logger.warning("the other ranks could not be told that this one failed: %s", unheard)

    def publish(self, snapshot: Snapshot) -> CheckpointInfo:
        """Writes this rank's part and waits for the commit.

        Raises:
            SaveFailed: a rank could not write its part; the files are deleted.
            BarrierTimeout: ranks did not arrive, or the leader's answer did not.
            CommitConflict: another job committed in this place, or replaced this one.
            CommitUnknown: storage never said whether the commit took effect; nothing is deleted.
        """
        self._clean_up()
        try:
            attempt = snapshot.attempt or self.open(snapshot.key, snapshot.step)
            arrival, failure = self._write(snapshot, attempt)
        except BaseException as error:
            self.decline(snapshot.key, error)
            raise
        began = time.perf_counter()
        try:
            answer = self._members.barrier.meet(
                f"{snapshot.key}/commit", arrival, lambda values: self._decide(snapshot, attempt, values)
            )
        except BarrierTimeout as error:
            if error.decided:
                self._give_back(attempt)
            raise
        except SaveFailed:
            # The leader declined, so there will be no commit.
            self._give_back(attempt)
            raise
        except Exception:
            # Nobody knows whether the leader came to the commit: this step is not tried again.
            self._lineage.last_step = snapshot.step
            raise
        snapshot.metrics.commit_seconds = time.perf_counter() - began
        return self._conclude(attempt, json.loads(answer), failure)

    def prune(self, dry_run: bool) -> PruneReport:
        """Deletes what the policy does not keep, and what older generations left; while nothing is being saved."""
        return run_sync(self._cleaner.prune(self._lineage.generation, dry_run))

    def _name_attempt(self, step: int) -> bytes:
        """Claims a generation if there is none yet, and a folder that no other attempt has; on the leader."""
        lineage, name = self._lineage, self._name
        if lineage.generation is None:
            lineage.generation = run_sync(
                commit.claim_generation(
                    self._backend, name, self._members.run_id, lineage.seen, lineage.loaded, step
                )
            )
        else:
            run_sync(commit.check_not_replaced(self._backend, name, lineage.generation))
        key = CommitKey(lineage.generation, step)
        self._tries[key] += 1
        return json.dumps(asdict(Attempt(*key, self._tries[key]))).encode()

    def _write(self, snapshot: Snapshot, attempt: Attempt) -> tuple[bytes, Exception | None]:
        """Makes this rank's part durable; returns what to say on arrival, and why it failed if it did."""
        began = time.perf_counter()
        try:
            if attempt.step != snapshot.step:
                raise InvalidArgument(f"it saves step {snapshot.step} while rank 0 saves step {attempt.step}")
            part = run_sync(
                shard_file.write_shard(
                    self._backend,
                    self._name,
                    attempt,
                    snapshot.plan,
                    snapshot.layout,
                    snapshot.image,
                    snapshot.digests,
                    snapshot.chunk_bytes,
                    snapshot.values,
                )
            )
        except Exception as error:
            return _failed_arrival(error), error
        snapshot.metrics.writing_seconds = time.perf_counter() - began
        snapshot.metrics.written_bytes = snapshot.layout.length
        nbytes = sum(slot.nbytes for slot in snapshot.layout.slots)
        return json.dumps({"part": asdict(part), "nbytes": nbytes}).encode(), None

    def _decide(self, snapshot: Snapshot, attempt: Attempt, values: Sequence[bytes]) -> bytes:
        """Commits if every rank made its part durable; on the leader, once all have arrived."""
        arrivals = [json.loads(value) for value in values]
        failures = [
            f"rank {rank}: {arrival['error']['message']}"
            for rank, arrival in enumerate(arrivals)
            if "error" in arrival
        ]
        if failures:
            return _outcome("aborted", f"the save of step {attempt.step} was given up: {'; '.join(failures)}")
        manifest = Manifest(
            name=self._name,
            generation=attempt.generation,
            step=attempt.step,
            attempt=attempt.path,
            run_id=self._members.run_id,
            parent=self._lineage.parent,
            world_size=self._members.world_size,
            full=True,
            uses=(attempt.path,),
            requires=(),
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            versions={"dtruntime_torch": __version__, "torch": str(torch.__version__)},
            metadata=snapshot.metadata,
            nbytes=sum(arrival["nbytes"] for arrival in arrivals),
            written=sum(arrival["part"]["data_length"] for arrival in arrivals),
            parts=tuple(PartRef(**arrival["part"]) for arrival in arrivals),
        )
        # Altogether less than the others wait for the answer.
        share = self._share
        patience = commit.Patience(seconds=min(60.0, share), call_seconds=min(30.0, share))
        outcome = run_sync(commit.commit(self._backend, manifest, patience))
        if outcome.kind == "committed":
            run_sync(self._cleaner.after_commit(attempt.key, outcome.answered, share))
        elif outcome.kind != "unknown":
            self._give_up(attempt)
        return _outcome(outcome.kind, outcome.message, CheckpointInfo.of(manifest, outcome.manifest_sha256))

    def _conclude(
        self, attempt: Attempt, answer: dict[str, Json], failure: Exception | None
    ) -> CheckpointInfo:
        kind, message = answer["kind"], str(answer["message"])
        if kind == "aborted":
            self._give_back(attempt)
            raise SaveFailed(message) from failure
        self._lineage.last_step = attempt.step
        if kind == "lost":
            raise CommitConflict(message)
        if kind == "unknown":
            raise CommitUnknown(message)
        info = CheckpointInfo(**answer["info"])  # type: ignore[arg-type]
        self._lineage.parent = info.key
        return info

    def _give_up(self, attempt: Attempt) -> None:
        """Deletes, on the leader, what can never be committed, unless a delta names it."""
        self._cleaner.gave_up(attempt)
        self._clean_up()

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
        if self._members.rank == 0 and self._lineage.generation is not None:
            run_sync(self._cleaner.before_save(self._lineage.generation, self._share))

    @property
    def _share(self) -> float:
        """Seconds for one of the things for which the others wait."""
        return self._members.barrier.timeout / 4


def _failed_arrival(error: BaseException) -> bytes:
    return json.dumps({"error": errors.to_record(error)}).encode()


def _outcome(kind: str, message: str, info: CheckpointInfo | None = None) -> bytes:
    return json.dumps(
        {"kind": kind, "message": message, "info": None if info is None else asdict(info)}
    ).encode()
