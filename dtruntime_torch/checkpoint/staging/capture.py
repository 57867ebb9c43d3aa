"""A state on its way into the arena, of which some may still be read when the call that asked for it has returned.

Two kinds of tensors may be late: those that optimizers own, for whose steps the door asks here first, and those that
the user has deferred, who asks by `before_update`. All else is taken before.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import torch

from dtruntime_torch.checkpoint.door import DOOR, SMALL_BYTES, OwnedMemory
from dtruntime_torch.checkpoint.saving.handle import SaveMetrics
from dtruntime_torch.checkpoint.specs import digest_length
from dtruntime_torch.checkpoint.staging.device import in_one_piece
from dtruntime_torch.checkpoint.staging.stager import Staging
from dtruntime_torch.checkpoint.staging.watch import Watch
from dtruntime_torch.errors import BarrierTimeout, SaveFailed, TornSnapshot

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Late:
    """What may be read late, by the numbers of the pairs of a staging.

    Attributes:
        owned: address of a storage -> what optimizers own there.
        deferred: address of a storage -> what the user has deferred there, and no optimizer owns as far as is known.
    """

    owned: Mapping[int, Sequence[int]] = field(default_factory=dict)
    deferred: Mapping[int, Sequence[int]] = field(default_factory=dict)

    @property
    def numbers(self) -> list[int]:
        """All of it, ascending."""
        each = (*self.owned.values(), *self.deferred.values())
        return sorted(number for numbers in each for number in numbers)


def choose_late(tensors: Sequence[torch.Tensor], owned: OwnedMemory, deferred: OwnedMemory) -> Late:
    """Tells which tensors may be read late.

    Args:
        tensors: plain ones, on any device, of any stride.
        owned: what optimizers own that come by the door.
        deferred: what the user changes by himself, having asked.

    Example:
        >>> weight, average = torch.zeros(2, 4096), torch.zeros(2, 4096)
        >>> deferred = OwnedMemory()
        >>> deferred.add(average)
        >>> choose_late([weight, average], OwnedMemory(), deferred).numbers
        [1]
    """
    by_optimizers: dict[int, list[int]] = {}
    by_user: dict[int, list[int]] = {}
    for number, tensor in enumerate(tensors):
        if tensor.nbytes < SMALL_BYTES or not in_one_piece(tensor):
            continue
        # What is both changes in both ways, and no step may be let through because the user asks, too.
        if (storage := owned.storage_around(tensor)) is not None:
            by_optimizers.setdefault(storage, []).append(number)
        elif (storage := deferred.storage_around(tensor)) is not None:
            by_user.setdefault(storage, []).append(number)
    return Late(by_optimizers, by_user)


@dataclass(frozen=True, slots=True)
class Patience:
    """How the saves of a manager treat what is late.

    Attributes:
        seconds: that a step waits; then the save is given up, and the step goes on.
        paranoid: digests what is late in host memory before the call returns, and compares.
    """

    seconds: float = 60.0
    paranoid: bool = False


class Capture:
    """Is asked before late memory is changed, and says in the end whether what arrived is what was there.

    Args:
        staging: under way.
        tensors: its sources, in the order of its pairs.
        names: of the pairs.
        late: which of them may be read late.
        patience: how that is treated.
        chunk_bytes: bytes of a chunk.
        metrics: told how long steps waited here, and what the staging cost.
    """

    def __init__(
        self,
        staging: Staging,
        tensors: Sequence[torch.Tensor],
        names: Sequence[str],
        late: Late,
        patience: Patience,
        chunk_bytes: int,
        metrics: SaveMetrics,
    ) -> None:
        self._began = time.perf_counter()
        self._staging = staging
        self._names = names
        # Who is not paranoid does not compare.
        compared = tensors if patience.paranoid else ()
        self._lengths = [digest_length(tensor.nbytes, chunk_bytes) for tensor in compared]
        self._late = late
        self._numbers = late.numbers
        self._patience = patience.seconds
        self._metrics = metrics
        self._given_up = ""
        self._failure: Exception | None = None
        self._digests: bytes | None = None
        self._cancelled = False
        on_host = {number: tensors[number] for number in self._numbers if tensors[number].is_cpu}
        self._watch = Watch(on_host, chunk_bytes, patience.paranoid)

    def stand_at_the_door(self) -> None:
        """From now on it is asked before steps, if anything is late."""
        if self._numbers:
            DOOR.hold(self)

    @property
    def staged(self) -> bool:
        """Whether nothing is read any more, nor looked at for a change."""
        return self._cancelled or self._digests is not None

    def take_early(self, timeout: float | None) -> None:
        """Returns when what is not late may be changed, by this thread and what its current streams are given next.

        Only then are threads let at the rest: until the caller goes on they would only take the CPU from it.

        Raises:
            BarrierTimeout: that is not so yet.
            SaveFailed: a device failed.
        """
        late = set(self._numbers)
        self._staging.before_overwrite([n for n in range(len(self._names)) if n not in late], timeout)
        self._staging.release()

    @property
    def reads_others(self) -> bool:
        """As `door.Reader` says."""
        return bool(self._late.deferred)

    def before_step(self, storages: Collection[int] | None) -> None:
        """As `door.Reader` says. If it takes too long or fails, the save is given up, and training goes on."""
        kinds = (self._late.owned,) if storages is None else (self._late.owned, self._late.deferred)
        numbers: list[int] = []
        for kind in kinds:
            for storage in kind if storages is None else kind.keys() & storages:
                numbers += kind[storage]
        self._ask(numbers, "the step of an optimizer")

    def before_update(self) -> None:
        """Returns when everything that is late may be changed, as `before_step`."""
        self._ask(self._numbers, "before_update")

    def wait(self, timeout: float | None, help: bool = False) -> bytes:
        """Waits until all is in the arena; from then on no step is asked for.

        Args:
            timeout: seconds; None waits as long as it takes.
            help: copies in this thread, too, which takes the CPU from whoever trains.

        Returns:
            The XXH3-128 digests of all chunks, in the order of the pairs, 16 bytes each.

        Raises:
            BarrierTimeout: it takes too long. It was cancelled.
            SaveFailed: a device failed, or the save was given up.
            TornSnapshot: something was changed before it was read; it is named.

            The same once more, when it is asked again.
        """
        if self._failure is not None:
            raise self._failure
        if self._digests is None:
            try:
                digests = self._staging.wait(timeout, help)
                self._check(digests)
            except Exception as error:
                self._failure = self._reason(error)
                self._give_up()
                raise self._failure from error.__cause__
            DOOR.let_go(self)
            self._tell()
            self._digests = digests
        return self._digests

    def cancel(self, timeout: float | None = None) -> None:
        """As `Staging.cancel`."""
        DOOR.let_go(self)
        self._watch.forget()
        self._staging.cancel(timeout)
        self._cancelled = True

    def _ask(self, numbers: Sequence[int], who: str) -> None:
        if not numbers:
            return
        began = time.perf_counter()
        try:
            self._staging.before_overwrite(numbers, self._patience)
        except BarrierTimeout as error:
            self._open_for(f"{who} waited {self._patience:g} s for this save, which is given up: {error}")
        except Exception as error:
            self._open_for(f"{who} could not wait for this save, which is given up: {error}")
        finally:
            self._metrics.door_seconds += time.perf_counter() - began
        self._watch.let_go(numbers)

    def _open_for(self, reason: str) -> None:
        """Whatever keeps a step from waiting, it goes on, and what it changes is not saved."""
        self._given_up = self._given_up or reason
        logger.error("%s", reason)
        self._give_up()

    def _give_up(self) -> None:
        try:
            self.cancel(self._patience)
        except BarrierTimeout as error:
            # What a device still copies into the arena nobody will commit: the staging is cancelled all the same.
            logger.error("a device does not end what it copies: %s", error)

    def _reason(self, error: Exception) -> Exception:
        return SaveFailed(self._given_up) if self._given_up else error

    def _check(self, digests: bytes) -> None:
        self._watch.let_go(self._numbers)
        if self._given_up:
            raise SaveFailed(self._given_up)
        if self._watch.moved:
            raise self._tear(self._watch.moved, "torch counts a change of it, or it gave its memory back")
        starts = accumulate(self._lengths, initial=0)
        arrived = {number: digests[a:b] for number, (a, b) in enumerate(pairwise(starts))}
        if differing := self._watch.differ(arrived):
            raise self._tear(differing, "its digests before and after differ")

    def _tear(self, numbers: Sequence[int], how: str) -> TornSnapshot:
        named = ", ".join(self._names[number] for number in numbers[:3])
        more = f" and {len(numbers) - 3} more" if len(numbers) > 3 else ""
        return TornSnapshot(
            f"{named}{more} changed while a save read it, and by no step of an optimizer ({how}), so this save is given "
            f"up: save with consistency='immediate', or call manager.before_update() before you change it yourself"
        )

    def _tell(self) -> None:
        self._metrics.staging_seconds = time.perf_counter() - self._began
        self._metrics.staged_bytes = self._staging.nbytes_copied
        self._metrics.skipped_chunks = self._staging.chunks_skipped
