"""Checkpoints in a training loop: what to save, when, and how to go on exactly where it stopped."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import TypeVar

import torch
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from dtruntime_torch.checkpoint.flatten import PerRank, Stateful
from dtruntime_torch.checkpoint.objects import Json
from dtruntime_torch.checkpoint.saving.handle import SaveHandle, SaveMetrics
from dtruntime_torch.counts import check_count
from dtruntime_torch.errors import CheckpointNotFound, InvalidArgument
from dtruntime_torch.manager import CheckpointManager
from dtruntime_torch.rng import RngState
from dtruntime_torch.sampler import ElasticDistributedSampler

Batch = TypeVar("Batch")


class CheckpointHook:
    """Saves everything that a training loop needs to go on bit for bit, every few steps.

    Saved are model, optimizer, scheduler, sampler, whatever is in `extra`, and on each rank the state of the random
    number generators of Python, NumPy, torch and every device.

    Args:
        manager: saves and loads; the hook does not close it.
        model: as it is trained, wrapped or not.
        optimizer: one, or several.
        scheduler: of the learning rate; it belongs to the step, so step it before `hook.step()`.
        sampler: whose position is saved; `track` counts it.
        every_n_steps: optimizer steps from save to save.
        extra: name -> value, or anything with `state_dict` (GradScaler, EMA); belongs to the step like the scheduler.
        seed: for the generators of a rank that the checkpoint does not know.
        metadata: called at each save, on every rank; what it returns is kept with the checkpoint as by
            `CheckpointManager.save`, for `KeepBest` among others: `metadata=lambda: {"loss": loss.item()}`.

    Attributes:
        current_step: optimizer steps done, those before a restore included.
        last_save: the save that was begun last, or None.

    Example:
        hook = CheckpointHook(manager, model=model, optimizer=optimizer, sampler=sampler, every_n_steps=100)
        step = hook.restore()
        for batch in hook.track(loader):
            ...
            optimizer.step()
            hook.step()
    """

    def __init__(
        self,
        manager: CheckpointManager,
        *,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        scheduler: LRScheduler | Stateful | None = None,
        sampler: ElasticDistributedSampler | None = None,
        every_n_steps: int = 100,
        extra: Mapping[str, object] | None = None,
        seed: int = 0,
        metadata: Callable[[], Json] | None = None,
    ) -> None:
        check_count("every_n_steps", every_n_steps)
        if not (metadata is None or callable(metadata)):
            raise InvalidArgument(f"metadata is {metadata!r}; give a function, which is called at each save")
        self.manager = manager
        self.sampler = sampler
        self.every_n_steps = every_n_steps
        self.current_step = 0
        self.last_save: SaveHandle | None = None
        self._ended = SaveMetrics()
        self._under_way: list[SaveHandle] = []  # several while saves are skipped
        self._seed = seed
        self._metadata = metadata
        self._rng = RngState()
        self._rng_to_put_back: dict[str, object] | None = None
        self._state = _collect(model, optimizer, scheduler, sampler, extra or {})
        self._state["rng"] = PerRank(self._rng)
        optimizers = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else optimizer
        manager.guard(*(one for one in optimizers if isinstance(one, torch.optim.Optimizer)))

    @property
    def call_seconds(self) -> float:
        """How long the calls of saves have taken so far."""
        return self._ended.call_seconds + sum(save.metrics.call_seconds for save in self._under_way)

    @property
    def door_seconds(self) -> float:
        """How long steps of optimizers have waited so far for what saves had still to copy."""
        return self._ended.door_seconds + sum(save.metrics.door_seconds for save in self._under_way)

    @property
    def stall_seconds(self) -> float:
        """How long saving has kept the loop waiting so far: the calls, and steps of optimizers after them."""
        return self.call_seconds + self.door_seconds

    def restore(self, *, all_or_nothing: bool = False) -> int:
        """Loads the newest sound checkpoint, if there is one.

        A rank that the checkpoint does not know (the world grew) seeds its generators from seed, step and rank.

        Args:
            all_or_nothing: as for `CheckpointManager.load`: touch nothing before every byte was checked.

        Returns:
            The number of steps done; 0 when there is nothing yet.
        """
        self._rng.loaded = None
        try:
            info = self.manager.load(self._state, all_or_nothing=all_or_nothing)
        except CheckpointNotFound:
            self.current_step = 0
            return 0
        self.current_step = info.step
        if self._rng.loaded is None:
            self._rng.seed(_derive_seed(self._seed, info.step, self.manager.rank))
            self._rng_to_put_back = self._rng.state_dict()
        else:
            self._rng_to_put_back = self._rng.loaded
        return self.current_step

    def track(self, loader: DataLoader[Batch] | Iterable[Batch]) -> Generator[Batch, None, None]:
        """Iterates over the loader and counts, in the sampler, each batch that it hands out.

        Making a DataLoader's iterator draws from torch's generator. After a restore in the middle of an epoch the
        generators are put back once more behind that, so that the run goes on as if it had not been interrupted.

        Raises:
            InvalidArgument: the loader does not draw from the hook's sampler.
        """
        if self.sampler is not None and self.sampler.state_dict()["consumed"] == 0:
            # The run that was saved had not made this epoch's iterator yet, so making it belongs to what follows.
            self._put_rng_back()
        batches = iter(loader) if self.sampler is None else self.sampler.track(loader)
        self._put_rng_back()
        yield from batches

    def _put_rng_back(self) -> None:
        if self._rng_to_put_back is not None:
            self._rng.load_state_dict(self._rng_to_put_back)
            self._rng_to_put_back = None

    def step(self) -> None:
        """Notes that an optimizer step is done, with all that belongs to it, and saves when it is time.

        It is the last line of the loop's body: random numbers that are drawn behind it are not drawn again by a run
        that goes on from there.
        """
        self.current_step += 1
        if self.current_step % self.every_n_steps == 0:
            self.save()

    def save(self) -> SaveHandle:
        """Saves now, in the background."""
        metadata = None if self._metadata is None else self._metadata()
        handle = self.manager.save_async(self._state, self.current_step, metadata)
        self._count_ended()
        self._under_way.append(handle)
        self.last_save = handle
        return handle

    def _count_ended(self) -> None:
        # No step waits any more for one that is done, so its figures are final.
        ended = [save for save in self._under_way if save.done()]
        self._under_way = [save for save in self._under_way if save not in ended]
        self._ended.call_seconds += sum(save.metrics.call_seconds for save in ended)
        self._ended.door_seconds += sum(save.metrics.door_seconds for save in ended)


def _collect(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    scheduler: LRScheduler | Stateful | None,
    sampler: ElasticDistributedSampler | None,
    extra: Mapping[str, object],
) -> dict[str, object]:
    state: dict[str, object] = {"model": model}
    if isinstance(optimizer, torch.optim.Optimizer):
        state["optimizer"] = optimizer
    else:
        state.update({f"optimizer{i}": one for i, one in enumerate(optimizer)})
    if scheduler is not None:
        state["scheduler"] = scheduler
    if sampler is not None:
        state["sampler"] = sampler
    taken = sorted({*state, "rng"} & set(extra))
    if taken:
        raise InvalidArgument(f"extra uses the names {taken}, which are the hook's own; choose others")
    return {**state, **extra}


def _derive_seed(seed: int, step: int, rank: int) -> int:
    digest = hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
