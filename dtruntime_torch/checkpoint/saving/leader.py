"""What the leader of a save does alone: it names the attempts, decides, commits, and cleans up behind all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial

import torch

from dtruntime_torch._version import __version__
from dtruntime_torch.checkpoint import catalog, commit
from dtruntime_torch.checkpoint.cleaning.cleaner import Cleaner
from dtruntime_torch.checkpoint.cleaning.prune_plan import PruneReport
from dtruntime_torch.checkpoint.info import CheckpointInfo
from dtruntime_torch.checkpoint.manifest import Manifest
from dtruntime_torch.checkpoint.names import Attempt, CommitKey
from dtruntime_torch.checkpoint.objects import Json
from dtruntime_torch.checkpoint.saving.delta import Base
from dtruntime_torch.checkpoint.saving.lineage import Lineage
from dtruntime_torch.checkpoint.saving.messages import Answer, Arrival
from dtruntime_torch.checkpoint.saving.policies import SavePolicies
from dtruntime_torch.errors import CommitConflict
from dtruntime_torch.membership import Membership
from dtruntime_torch.retry import Tries, retrying
from dtruntime_torch.storage import StorageBackend, run_sync
from dtruntime_torch.storage.sync import in_time


class Leader:
    """Of the ranks that save together rank 0 acts as this; the others only make one.

    Args:
        backend: where to.
        name: under which name.
        members: the ranks that save together.
        lineage: read for the generation and the parent; a generation that is claimed is noted there.
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
        self._cleaner = Cleaner(backend, name, policies.retention)
        self._delta = policies.delta
        self._tries: Counter[CommitKey] = Counter()
        # Seconds for one of the things for which the others wait: one call that hangs leaves time for the rest. If several
        # hang, or all calls of one commit where this is less than a minute, the others may give up first.
        self._share = members.barrier.timeout / 4
        self._patience = commit.Patience(seconds=min(60.0, self._share), call_seconds=min(30.0, self._share))
        retry = policies.retry
        longest = self._share if retry.deadline is None else min(self._share, retry.deadline)
        self._retry = replace(retry, deadline=longest)

    def clean_up(self) -> None:
        """Finishes deletes that are left over, and once sweeps what older generations left."""
        if self._lineage.generation is not None:
            run_sync(self._cleaner.before_save(self._lineage.generation, self._share))

    def prune(self, dry_run: bool) -> PruneReport:
        """Deletes what the policy does not keep, and what older generations left; while nothing is being saved."""
        return run_sync(self._cleaner.prune(self._lineage.generation, dry_run))

    def name_attempt(self, step: int) -> Attempt:
        """Claims a generation if there is none yet, and a folder that no other attempt has.

        Raises:
            CommitConflict: the line is not the newest, or somebody else has replaced this job.
            StorageError: the storage failed, as often as the policy lets it.
        """
        return run_sync(retrying(self._retry, partial(self._name_in_time, step)))

    async def _name_in_time(self, step: int) -> Attempt:
        # Room for a claim that is asked for during a share and answered late; a single try ends before the others give up.
        return await in_time(self._name_attempt(step), 2 * self._share, f"step {step} could not be begun")

    async def _name_attempt(self, step: int) -> Attempt:
        backend, lineage, name = self._backend, self._lineage, self._name
        if lineage.generation is None:
            run_id, seen, loaded = self._members.run_id, lineage.seen, lineage.loaded
            lineage.generation = await commit.claim_generation(
                backend, name, run_id, seen, loaded, step, self._patience
            )
        else:
            await commit.check_not_replaced(backend, name, lineage.generation)
        key = CommitKey(lineage.generation, step)
        # Steps that are decided are not saved again in this generation.
        undecided = (tried for tried in self._tries if tried > CommitKey(key.generation, lineage.last_step))
        self._tries = Counter({tried: self._tries[tried] for tried in undecided})
        # Not into what another run left where this one writes: stock readers take all that lies in a folder.
        last = max(self._tries[key], await catalog.last_try(backend, name, key))
        self._tries[key] = last + 1
        return Attempt(*key, self._tries[key])

    def decide(
        self,
        attempt: Attempt,
        delta: bool,
        metadata: Json,
        arrivals: Sequence[Arrival],
        tries: Tries,
    ) -> Answer:
        """Commits if every rank made its part durable. Called once for each try, when all have arrived.

        Args:
            attempt: where the parts are.
            delta: they were to be deltas.
            metadata: the user's.
            arrivals: in the order of ranks.
            tries: this one and those before it.
        """
        failures = [f"rank {rank}: {one.error}" for rank, one in enumerate(arrivals) if one.error]
        if failures:
            passing = all(one.passing for one in arrivals if one.error)
            message = f"the save of step {attempt.step} was given up: {'; '.join(failures)}"
            if not passing:
                return Answer("aborted", message, delete=True)
            return self._after_abort(attempt, delta, message, tries)
        if len({one.base for one in arrivals}) > 1:
            return self._again(attempt, "the ranks do not know the same last checkpoint", delete=True)
        base = self._lineage.base if arrivals[0].base is not None else None
        manifest = self._manifest(attempt, metadata, arrivals, base)
        parent = None if base is None else base.commit
        outcome = run_sync(commit.commit(self._backend, manifest, self._patience, parent))
        if outcome.kind == "committed":
            run_sync(self._cleaner.after_commit(attempt.key, outcome.answered, self._share))
        elif outcome.kind != "unknown":
            self._give_up(attempt)
        if outcome.kind == "aborted":
            return self._after_abort(attempt, delta, outcome.message, tries)
        if outcome.kind == "stale":
            return self._again(attempt, outcome.message, delete=False)
        info = CheckpointInfo.of(manifest, outcome.manifest_sha256)
        return Answer(outcome.kind, outcome.message, info, self._is_full_next(manifest, arrivals))

    def _manifest(
        self, attempt: Attempt, metadata: Json, arrivals: Sequence[Arrival], base: Base | None
    ) -> Manifest:
        parts = tuple(one.part for one in arrivals if one.part is not None)
        used = {path for one in arrivals for path in one.uses} - {attempt.path}
        return Manifest(
            name=self._name,
            generation=attempt.generation,
            step=attempt.step,
            attempt=attempt.path,
            run_id=self._members.run_id,
            parent=self._lineage.parent,
            world_size=self._members.world_size,
            full=base is None,
            uses=(attempt.path, *sorted(used)),
            requires=(),
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            versions={"dtruntime_torch": __version__, "torch": str(torch.__version__)},
            metadata=metadata,
            nbytes=sum(one.nbytes for one in arrivals),
            written=sum(part.data_length for part in parts),
            parts=parts,
        )

    def _is_full_next(self, manifest: Manifest, arrivals: Sequence[Arrival]) -> bool:
        changed = sum(one.changed_bytes for one in arrivals)
        files = max(one.files for one in arrivals)
        used = sum(one.used for one in arrivals)
        deltas = self._lineage.deltas_with(manifest.full)
        return self._delta is None or self._delta.asks_for_full(changed, manifest.nbytes, files, used, deltas)

    def _after_abort(self, attempt: Attempt, delta: bool, message: str, tries: Tries) -> Answer:
        """Another try if the policy allows one. It writes no more than this one: the disk may be full."""
        delay = tries.next_pause()
        if delay is None:
            return Answer("aborted", tries.tell(message), delete=True)
        return self._again(attempt, message, delete=True, full=not delta, delay=delay)

    def _again(
        self, attempt: Attempt, message: str, delete: bool, full: bool = True, delay: float = 0.0
    ) -> Answer:
        try:
            following = self.name_attempt(attempt.step)
        except CommitConflict as error:
            return Answer("lost", str(error), delete=delete)
        except Exception as error:
            return Answer("aborted", f"{message}; nor could it be tried again: {error}", delete=delete)
        return Answer("again", message, delete=delete, attempt=following, full=full, delay=delay)

    def _give_up(self, attempt: Attempt) -> None:
        """Deletes what can never be committed, unless a delta names it."""
        self._cleaner.gave_up(attempt)
        self.clean_up()
