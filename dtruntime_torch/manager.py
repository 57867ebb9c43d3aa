"""Checkpoints of one name in one place: options in, futures out."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable
from types import TracebackType
from typing import Any

import torch
from torch.distributed.distributed_c10d import ProcessGroup, Store

from dtruntime_torch.checkpoint import restore
from dtruntime_torch.checkpoint.arguments import LoadOptions, check_pinned, check_step
from dtruntime_torch.checkpoint.cleaning.prune_plan import PruneReport
from dtruntime_torch.checkpoint.cleaning.retention import KeepBest, RetentionPolicy
from dtruntime_torch.checkpoint.info import CheckpointInfo, LoadedCheckpoint
from dtruntime_torch.checkpoint.listing import describe_all
from dtruntime_torch.checkpoint.names import CommitKey, check_name
from dtruntime_torch.checkpoint.objects import Json
from dtruntime_torch.checkpoint.save import Saver
from dtruntime_torch.checkpoint.saving.delta import DeltaPolicy
from dtruntime_torch.checkpoint.saving.handle import SaveHandle
from dtruntime_torch.checkpoint.saving.lineage import Lineage
from dtruntime_torch.checkpoint.saving.policies import (
    Consistency,
    OnBusy,
    OnFailure,
    SavePolicies,
    choose_delta,
    choose_retry,
)
from dtruntime_torch.checkpoint.verify import VerifyReport, find_commit, verify
from dtruntime_torch.counts import check_count, check_seconds
from dtruntime_torch.errors import InvalidArgument
from dtruntime_torch.membership import join
from dtruntime_torch.retry import RetryPolicy
from dtruntime_torch.storage import StorageBackend, backend_for, run_sync

logger = logging.getLogger(__name__)


class CheckpointManager:
    """Saves and loads checkpoints, each atomic, each with a digest for every chunk.

    Under `torchrun` every rank makes one and calls its methods in the same order; making one is a collective of
    the process group, saving and loading are not.

    Args:
        storage: a local folder, or a storage backend. Nothing is made there before the first save.
        name: what the checkpoints are called, `[A-Za-z0-9._-]{1,100}` without a leading dot.
        delta: True saves only the chunks that changed since the last committed save of this manager, and everything
            now and then, as `DeltaPolicy` says; give one to choose. The first save after a load is full.
        retry: how often a save is tried that storage failed, with which pauses; a later save and `close` wait for the
            pauses too. None: a failed save is not tried again.
        chunk_bytes: bytes of a chunk, of which each has a digest.
        keep_last_n: how many of the newest checkpoints stay, at least; None keeps all. What no argument keeps is
            deleted after each save, but for files that a kept one needs.
        keep_every_n_steps: those whose step is a multiple of this stay, too.
        keep_best: those with the best values of a metric stay, too; see `KeepBest`.
        pinned_steps: these steps stay, too.
        on_failure: what becomes of a failed save that nobody asked for by `result` or `await`. "warn": the next save
            warns of it and goes on; "raise": the next save raises its error, once, and is not taken. Either way it
            is logged, counted in `failed_saves`, and raised by `close`. Let it be the same on all ranks.
        consistency: "optimizer": `save_async` returns while the parameters and states of optimizers are still copied,
            and the next step of an optimizer waits for what is missing; everything else is copied before it returns.
            "immediate": all is. That is for loops that change parameters by other means than `optimizer.step()`.
        paranoid: digests what is copied late from host memory at the call, too, for one more read: no change is saved.
        on_busy: what becomes of a `save_async` that finds the one before it under way on any rank: "wait" for that
            one, or "skip" it on all ranks, whose handles raise SaveSkipped.
        door_timeout: seconds that a step waits for what is still to be copied. Then it goes on, and that save fails.
        timeout: seconds after which a wait for other ranks is given up, with an error that names them.
        process_group: the ranks that save together; None for all, or this process alone without torch.distributed.
        store: a Store that these ranks share; None for the one that the process group was made with.

    Raises:
        InvalidArgument: an option is out of range, or `storage` is a file.

    Example:
        >>> import tempfile, torch
        >>> with CheckpointManager(tempfile.mkdtemp()) as manager:
        ...     info = manager.save({"weight": torch.ones(2, 3)}, step=1)
        >>> info.step, info.nbytes
        (1, 24)
    """

    def __init__(
        self,
        storage: str | os.PathLike[str] | StorageBackend,
        name: str = "model",
        *,
        delta: bool | DeltaPolicy = False,
        retry: RetryPolicy | None = None,
        chunk_bytes: int = 1 << 20,
        keep_last_n: int | None = 3,
        keep_every_n_steps: int | None = None,
        keep_best: KeepBest | None = None,
        pinned_steps: Iterable[int] = (),
        on_failure: OnFailure = "warn",
        consistency: Consistency = "optimizer",
        paranoid: bool = False,
        on_busy: OnBusy = "wait",
        door_timeout: float = 60.0,
        timeout: float = 600.0,
        process_group: ProcessGroup | None = None,
        store: Store | None = None,
    ) -> None:
        check_name(name)
        check_count("chunk_bytes", chunk_bytes, 4096, 1 << 30)
        check_seconds("timeout", timeout)
        policies = SavePolicies(
            chunk_bytes,
            RetentionPolicy(keep_last_n, keep_every_n_steps, keep_best, check_pinned(pinned_steps)),
            choose_delta(delta),
            choose_retry(retry),
            on_failure,
            on_busy,
            consistency,
            door_timeout,
            paranoid,
        )
        self.name = name
        self._backend = backend_for(storage)
        self._members = join(process_group, store, timeout)
        self._lineage = Lineage()
        self._saver = Saver(self._backend, name, self._members, self._lineage, policies)
        self._loads = 0
        self._closed = False
        self._process = os.getpid()

    @property
    def rank(self) -> int:
        """This process among those that save together."""
        return self._members.rank

    @property
    def world_size(self) -> int:
        """How many processes save together."""
        return self._members.world_size

    @property
    def failed_saves(self) -> int:
        """How many saves became no checkpoint. One whose arguments are refused at the call is not counted."""
        return self._saver.health.failed_saves

    @property
    def age_of_last_good(self) -> float:
        """Seconds since this manager last made or loaded a checkpoint; before the first, since it was made itself.

        Example: a job that stops rather than train on
            if manager.age_of_last_good > 3600:
                raise RuntimeError("nothing was saved for an hour")
        """
        return self._saver.health.age_of_last_good

    def prepare(self, state: object) -> None:
        """Does what depends on the state's structure only, so that the first save of `state` finds it done."""
        self._check_open()
        self._saver.prepare(state)

    def save(self, state: object, step: int, metadata: Json = None) -> CheckpointInfo:
        """Saves and waits for the commit; see `save_async`."""
        self._check_open()
        return self._saver.start(state, step, metadata, at_once=True).result()

    def save_async(self, state: object, step: int, metadata: Json = None) -> SaveHandle:
        """Saves the state as it is now; copies what may wait, writes and commits in the background.

        With `consistency="optimizer"` what optimizers own may still be read when this returns, and their next steps
        wait for that. A loop that changes it by other means chooses "immediate", or calls `before_update` first.

        Waits first for a save that is under way. A failure that nobody asked for is told as `on_failure` says; a
        CommitConflict is raised, since no later save can succeed.

        Args:
            state: `{name: module | optimizer | anything with state_dict | value}`, a plain (nested) state dict, or
                bytes. State that is meant to differ by rank is wrapped in `PerRank`; of any other one rank's is kept:
                the lowest rank's, but for what an optimizer owns, which is taken for equal.
            step: the training step; rises from save to save, and starts anew in the line that a load begins.
            metadata: JSON that the manifest keeps; its floats may be NaN or infinite.

        Returns:
            A handle with `result(timeout)`, `done()`, `staged()` and `add_done_callback`, which may also be awaited.

        Raises:
            InvalidArgument: the step does not rise, or an argument is of the wrong kind.
            UnsupportedType: the state holds something that cannot be stored, named by its key.
            CommitConflict: another job committed here since this manager loaded; nothing was written.
            BarrierTimeout: ranks did not take part, or the save before this one still goes on after `timeout`.
        """
        self._check_open()
        return self._saver.start(state, step, metadata)

    def guard(self, *optimizers: torch.optim.Optimizer) -> None:
        """Says that what these own is changed by their `step()` alone, so that it may be copied late.

        One that has stepped since this manager was made is known already; `CheckpointHook` calls this. One whose step
        calls none of torch's hooks, as that of a wrapper around another, is passed over: guard the one inside.

        Raises:
            InvalidArgument: one is no optimizer.
        """
        self._saver.lateness.trust(optimizers)

    def defer(self, tensors: Iterable[torch.Tensor]) -> None:
        """Names tensors that the loop changes by itself, having called `before_update`: these are copied late, too.

        Args:
            tensors: of any shape, for all saves to come. They are not kept alive: give the parameters themselves, not
                what a `state_dict()` made of them.

        Raises:
            InvalidArgument: one is no tensor.

        Example: a moving average of the weights
            manager.defer(average.parameters())  # once
            manager.before_update()
            average.update_parameters(model)
        """
        self._saver.lateness.defer(tensors)

    def before_update(self) -> None:
        """Returns when no save of this manager reads what this thread, or its current stream, changes next.

        It raises nothing. What takes longer than `door_timeout` is given up, as before the step of an optimizer.
        """
        self._saver.before_update()

    def load(
        self,
        state: object,
        step: int | None = None,
        *,
        keys: Collection[str] | None = None,
        strict: bool = True,
        all_or_nothing: bool = False,
    ) -> LoadedCheckpoint:
        """Fills `state` in place from the newest sound checkpoint; on all ranks the same one, or none.

        A damaged checkpoint is skipped by all ranks together, with a warning that names file, tensor and bytes.
        Saves go on from what was loaded. Any number of ranks may load what any number saved.

        Args:
            state: as for `save`; modules, optimizers and stateful objects are loaded into, tensors of a dict are
                filled, other values of a dict are replaced.
            step: load this one (of its newest generation) or fail, without falling back.
            keys: names as `model.head`; only these and what lies below them are compared and filled. Of a module
                and of a dict that may be any part. An optimizer, a scheduler and whatever else has a `state_dict`
                are loaded whole or not at all.
            strict: if False, names that only the state has are left as they are, and names that only the checkpoint
                has are left out, as by torch's `load_state_dict`. Shapes and dtypes of what both have must agree,
                and an optimizer that is loaded must have the parameters, in the groups, that it was saved with: to
                load a model with a new head, leave the optimizer out by `keys`.
            all_or_nothing: if True, nothing of the state is touched before every byte was read and its digest
                compared. That takes as much memory again, and longer. If False, tensors in host memory are filled as
                they are read; where a chunk then turns out to be damaged, an older checkpoint fills them again, and
                if none is left the error says that the state holds parts of what is damaged.

        Returns:
            What was loaded, with the `missing_keys` and `unexpected_keys` of all ranks together.

        Raises:
            CheckpointNotFound: nothing is committed, or not that step.
            CheckpointMismatch: names, shapes or dtypes differ, all of them listed.
            CorruptCheckpoint: no sound checkpoint is left, or that step is damaged.
            NewerFormat: it needs a later version of this package.
            LoadFailed: some rank could not read it, or not fill its state.
            StorageError: no rank could read it.

            Nothing was changed, unless the message says that the state holds parts of what could not be loaded.
        """
        self._check_open()
        if isinstance(state, bytes):
            raise InvalidArgument("bytes cannot be filled in place; use load_checkpoint")
        with self._saver.alone():
            self._loads += 1
            self._saver.wait()
            key = f"load/{self._loads}"
            options = LoadOptions(step, keys, strict, all_or_nothing)
            loaded = restore.load(
                self._backend, self.name, self._members, state, key, options, self._lineage.distrust
            )
            self._lineage.follow(loaded.info.key, loaded.newest)
            self._saver.health.note_good()
        return loaded.info

    def load_checkpoint(
        self, name: str | None = None, step: int | None = None, keys: Collection[str] | None = None
    ) -> dict[str, Any] | Any:
        """Reads a whole checkpoint, or a part of it, on this process alone.

        Args:
            name: of the checkpoint; None for the manager's.
            step: which one (of its newest generation), without falling back; None for the newest sound one.
            keys: names as `model.head`; only these and what lies below them are read. None for all.

        Returns:
            A fresh state dict with tensors on the host, or the bytes that were saved. Of what differs by rank it
            has this rank's. Its tensors share the memory that was read into: that is free when all of them are.
            Only the checkpoint knows which of the two. To a type checker it is a dict, so that the usual case needs
            no cast; who saved bytes writes `assert isinstance(data, bytes)`.

        Raises:
            CheckpointNotFound, CorruptCheckpoint: as for `load`.
            CheckpointMismatch: a key names nothing, or ranks saved what does not fit into one state.

        Example:
            model.load_state_dict(manager.load_checkpoint(step=1000)["model"])
        """
        name = self.name if name is None else name
        check_name(name)
        step = None if step is None else check_step(step)
        distrust = self._lineage.distrust if name == self.name else None
        loaded: Any = restore.load_fresh(self._backend, name, step, self._members.rank, keys, distrust)
        return loaded

    def latest(self) -> CheckpointInfo | None:
        """Describes the newest checkpoint whose manifest is readable, or None; its data is not read.

        As in `list`, one that is damaged or needs a later version of this package is left out.
        """
        return next(iter(reversed(self.list())), None)

    def list(self) -> list[CheckpointInfo]:
        """Describes the checkpoints whose manifests are readable, oldest first.

        One that is damaged, or that needs a later version of this package, is left out; `dtruntime ls` lists it too.
        """
        return run_sync(describe_all(self._backend, self.name))

    def prune(self, dry_run: bool = False) -> PruneReport:
        """Deletes on this process alone what is not to stay; call it on one rank.

        What `keep_last_n` and the like do not keep has gone when a save ends, so this is for what was saved with
        other arguments, and for what jobs left that died. It never deletes the newest checkpoint, and nothing at
        all while a manifest cannot be understood. On a network file system it waits until other hosts see that
        the commits are gone.

        Args:
            dry_run: delete nothing, only tell what would go.

        Returns:
            What went: `commits`, `attempts` and `nbytes`; in `blocked` why something did not that should; and in
            `in_use` which files of these and of earlier ones stay since deltas that stay use them.

        Raises:
            StorageError: the storage failed; nothing was deleted.
        """
        self._check_open()
        return self._saver.prune(dry_run)

    def verify(self, step: int | None = None) -> VerifyReport:
        """Reads every byte of a checkpoint on this process alone and checks it against its digests.

        If it is damaged, no delta goes on from it: where the next one would, that save is full, on all ranks.

        Args:
            step: which one (of its newest generation); None for the newest.

        Raises:
            CheckpointNotFound: there is no such checkpoint.
        """
        key = None if step is None else run_sync(find_commit(self._backend, self.name, check_step(step)))
        report = run_sync(verify(self._backend, self.name, key))
        if not report.ok:
            self._lineage.distrust(CommitKey(report.generation, report.step))
        return report

    def close(self) -> None:
        """Waits for the save that is under way and gives the memory back; more calls do nothing.

        Raises:
            DTRuntimeError: that save failed.
        """
        if not self._closed:
            with self._saver.alone():
                self._saver.wait()  # what is refused here, or takes too long, leaves it open
                self._closed = True
            self._saver.close()

    def __enter__(self) -> CheckpointManager:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except Exception as failure:
            if error is None:
                raise
            # The user has to see what went wrong in the body.
            logger.error("the last save failed: %s", failure)

    def _check_open(self) -> None:
        if self._closed:
            raise InvalidArgument("this manager is closed; make another one")
        if os.getpid() != self._process:
            raise InvalidArgument("this manager belongs to the process that forked this one; make another")
