"""What is deleted when: leftovers before a save, what retention does not keep after one, and by hand.

Nothing is begun before all that lies there was read and understood.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine

from dtruntime_torch.checkpoint import catalog
from dtruntime_torch.checkpoint.cleaning.look import Manifests
from dtruntime_torch.checkpoint.cleaning.prune_plan import Plan, PruneReport, make_plan, metadata_of, report
from dtruntime_torch.checkpoint.cleaning.removal_kinds import Drop, GivenUp, Prune, Sweep
from dtruntime_torch.checkpoint.cleaning.removals import Pending, Removals, explain
from dtruntime_torch.checkpoint.cleaning.retention import KEEP_ALL, RetentionPolicy
from dtruntime_torch.checkpoint.cleaning.stock import Stock, take_stock
from dtruntime_torch.checkpoint.manifest import Commit
from dtruntime_torch.checkpoint.names import Attempt, CommitKey
from dtruntime_torch.errors import CheckpointNotFound
from dtruntime_torch.storage.backend import StorageBackend

logger = logging.getLogger(__name__)


class Cleaner:
    """Deletes what no longer counts under one name. Of the ranks that save together one has it.

    Args:
        backend: where the checkpoints lie.
        name: under which they are.
        policy: which of them stay.
        clock: seconds that only rise.
        sleep: waits so many seconds.
    """

    def __init__(
        self,
        backend: StorageBackend,
        name: str,
        policy: RetentionPolicy = KEEP_ALL,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        self._backend = backend
        self._name = name
        self._policy = policy
        self._manifests = Manifests(backend, name)
        self._removals = Removals(backend, name, self._manifests, clock, sleep)
        self._voids: set[CommitKey] = set()
        self._answered: set[CommitKey] = set()
        self._swept: int | None = None
        self._told: set[str] = set()
        self._told_of_metric = False

    async def before_save(self, generation: int, seconds: float | None = None) -> None:
        """Finishes what is left over, and sweeps older generations once; so a full disk heals itself.

        Never raises: what fails is logged, once for each cause, and tried again before the next save.

        Args:
            generation: that is about to save.
            seconds: after these the rest is left for later.
        """
        await self._quietly(self._sweep, generation, seconds)

    def gave_up(self, attempt: Attempt) -> None:
        """Notes an attempt of this incarnation that will never be committed, to be cleaned up before the next save.

        Args:
            attempt: one that lost its commit, or whose parent has gone.
        """
        self._removals.note(GivenUp(self._name, attempt))

    async def after_commit(self, key: CommitKey, answered: bool, seconds: float | None = None) -> None:
        """Takes away what retention does not keep, now that there is one more.

        Never raises: what fails is logged, once for each cause, and tried again after the next commit.

        Args:
            key: of the commit that this incarnation has just made.
            answered: no create of it can take effect any more.
            seconds: after these the rest is left for later.
        """
        if answered and self._policy.keep_last_n is not None:
            self._answered.add(key)
        await self._quietly(self._retain, key.generation, seconds)

    async def prune(self, generation: int | None = None, dry_run: bool = False) -> PruneReport:
        """Takes away what retention does not keep, and sweeps what older generations left; waits where it must.

        Args:
            generation: of the incarnation that does it; None for none, which acts as the newest there is.
            dry_run: only tell.

        Raises:
            StorageError: the storage failed; nothing was done.
        """
        stock = await self._take_stock()
        if stock.blocked:
            return report(dry_run, stock, (), (), stock.blocked)
        if generation is None:
            claimed = await catalog.generations(self._backend, self._name)
            generation = max([*claimed, *(key.generation for key in stock.commits)], default=0)
        plan = self._plan(stock, generation)
        if dry_run:
            cleared_attempts = {commit.attempt for commit in plan.commits} | {a.path for a in plan.dead}
            keys = [commit.key for commit in plan.commits]
            return report(True, stock, keys, plan.victims, (), cleared_attempts)
        return await self._do(self._begin(plan, stock, generation), stock)

    async def drop(self, attempt: Attempt) -> PruneReport:
        """Gives up one attempt for good, committed or not, whether or not it can be read.

        What it had used of others that are gone is left to a later sweep where its manifest cannot be read.

        Args:
            attempt: of any generation. If it is still being saved, that save fails.

        Raises:
            CheckpointNotFound: there is no such attempt.
            StorageError: the storage failed; nothing was done.
        """
        stock = await self._take_stock()
        keys = await catalog.commit_keys(self._backend, self._name)
        if attempt.path not in stock.nbytes and attempt.key not in keys:
            raise CheckpointNotFound(f"there is no attempt {attempt.path} of {self._name} here")
        noted = stock.manifests.get(attempt.path)
        uses = frozenset({attempt.path}) if noted is None else noted.uses
        return await self._do([self._removals.note(Drop(self._name, attempt, uses))], stock)

    async def _sweep(self, generation: int, faults: list[str]) -> None:
        await self._removals.work_off(faults)
        if self._swept != generation:
            stock = await self._take_stock()
            faults += stock.blocked
            if not stock.blocked:
                self._begin(make_plan(stock, KEEP_ALL, generation), stock, generation)
                self._swept = generation
                await self._removals.work_off(faults)

    async def _retain(self, generation: int, faults: list[str]) -> None:
        if self._policy.keep_last_n is not None:
            stock = await self._take_stock()
            faults += stock.blocked
            self._answered &= stock.commits.keys()
            if not stock.blocked:
                plan = self._plan(stock, generation)
                self._begin(Plan(plan.commits, (), ()), stock, generation)
        await self._removals.work_off(faults)

    async def _do(self, begun: list[Pending], stock: Stock) -> PruneReport:
        """Works off what was begun, waiting until other hosts see it, and tells what became of it."""
        faults: list[str] = []
        deleted = await self._removals.work_off(faults, wait=True)
        cleared = [pending.removal for pending in begun if pending.cleared is not None]
        commits = [removal.commit.key for removal in cleared if isinstance(removal, Prune)]
        commits += [r.attempt.key for r in cleared if isinstance(r, Drop) and r.was_committed]
        of_these = frozenset[str]().union(*(removal.victims for removal in cleared))
        cleared_attempts = {r.commit.attempt for r in cleared if isinstance(r, Prune)}
        cleared_attempts |= {r.attempt.path for r in cleared if isinstance(r, (Drop, Sweep))}
        return report(False, stock, commits, of_these & deleted, faults, cleared_attempts)

    async def _take_stock(self) -> Stock:
        return await take_stock(self._backend, self._name, self._manifests, self._voids)

    def _plan(self, stock: Stock, generation: int) -> Plan:
        """What is to go; tells the user once if a metric that decides it is nowhere."""
        missed = self._policy.missed_metric(metadata_of(stock))
        if missed is not None and not self._told_of_metric:
            self._told_of_metric = True
            logger.warning("%s: %s", self._name, missed)
        return make_plan(stock, self._policy, generation)

    def _begin(self, plan: Plan, stock: Stock, generation: int) -> list[Pending]:
        """Notes what is to go, before the first of it does. What failed before is not noted twice."""
        noted = {p.removal.commit: p for p in self._removals.pending if isinstance(p.removal, Prune)}
        prunes = [noted.get(commit) or self._prune(commit, stock, generation) for commit in plan.commits]
        return prunes + [self._removals.note(Sweep(self._name, attempt)) for attempt in plan.dead]

    def _prune(self, commit: Commit, stock: Stock, generation: int) -> Pending:
        removable = commit.generation == generation and commit.key in self._answered
        return self._removals.note(Prune(commit, stock.manifests[commit.attempt].uses, removable))

    async def _quietly(
        self,
        work: Callable[[int, list[str]], Coroutine[object, object, None]],
        generation: int,
        seconds: float | None,
    ) -> None:
        faults: list[str] = []
        try:
            await asyncio.wait_for(work(generation, faults), seconds)
        except asyncio.TimeoutError:
            faults.append("there was too little time")
        except Exception as error:
            faults.append(explain(error))
        for fault in faults:
            self._tell(
                f"not all that is left of {self._name} was deleted, the next save goes on with it: {fault}"
            )
        if not faults:
            self._told.clear()

    def _tell(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            logger.warning("%s", message)
