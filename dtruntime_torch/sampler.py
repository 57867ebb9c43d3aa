"""A `DistributedSampler` that resumes in the middle of an epoch, on any number of ranks.

The order of an epoch is a keyed permutation that is computed index by index: nothing is stored, the first index
costs as much as the last, and the order depends on (seed, epoch) alone. Where an epoch stands is one number, the
samples consumed by all ranks together, so any world size can go on from it. The cost against a stored
permutation is a few nanoseconds for each index.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypedDict, TypeVar, cast

from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler

from dtruntime_torch import _C
from dtruntime_torch.errors import InvalidArgument

PERMUTATION_VERSION = 0
BLOCK = 4096
UINT64 = 1 << 64
Batch = TypeVar("Batch")


class SamplerState(TypedDict):
    """What a sampler stores: where an epoch stands, and what the order depends on.

    Attributes:
        version: the version of the permutation.
        epoch: the epoch that `consumed` is about.
        consumed: samples of that epoch consumed by all ranks together; more than `n` once padding was.
        seed: the sampler's seed.
        n: samples in the dataset.
        shuffle: whether the order is permuted.
    """

    version: int
    epoch: int
    consumed: int
    seed: int
    n: int
    shuffle: bool


class _Batching(NamedTuple):
    """How a loader cuts this rank's samples into batches."""

    batch_size: int
    drop_last: bool


class ElasticDistributedSampler(DistributedSampler[int]):
    """Gives each rank its share of a dataset, in an order that no kill and no resize changes.

    Position `p` of epoch `e` is the same sample on every machine and every world size. Rank `r` of `W` takes the
    positions `start + r`, `start + r + W`, ..., where `start` is what the epoch has consumed so far. So with the
    same global batch, global step `k` sees the same samples on any number of ranks. What remains of an epoch is
    made divisible by the world size as stock does it: padded with the epoch's first samples, or cut off.

    Where nothing calls `track`, `set_epoch` or `load_state_dict` it does what `DistributedSampler` does, in
    another order; with `shuffle=False` in the same.

    Args:
        dataset: anything with a length.
        num_replicas: the number of ranks; default: the world size.
        rank: this rank; default: of the default process group.
        shuffle: False gives the samples in the dataset's order.
        seed: an integer of 64 bits, the same on all ranks.
        drop_last: cut off the tail that does not divide by the number of ranks, instead of padding it.

    Raises:
        InvalidArgument: the dataset is empty, the rank is not below `num_replicas`, the seed has over 64 bits, or
            the ranks are left to the process group and there is none.

    Example:
        >>> sampler = ElasticDistributedSampler(range(6), num_replicas=2, rank=1, shuffle=False)
        >>> sampler.load_state_dict(sampler.state_dict() | {"consumed": 2})
        >>> list(sampler), sampler.remaining, len(sampler)
        ([3, 5], 2, 3)
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        num_replicas: int | None = None,
        rank: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        try:
            self._n = len(cast(Sequence[object], dataset))
        except TypeError as error:
            raise InvalidArgument(
                f"the dataset has no length, so its samples have no order: {error}"
            ) from error
        if self._n == 0:
            raise InvalidArgument("the dataset has no samples; give the sampler one that has")
        seed = _whole("seed", seed, -UINT64 // 2)
        try:
            super().__init__(dataset, num_replicas, rank, shuffle, seed, drop_last)
        except ValueError as error:
            if num_replicas is not None and rank is not None:
                raise InvalidArgument(f"{error}; num_replicas is {num_replicas}") from error
            raise InvalidArgument(
                f"{error}: initialise torch.distributed, or give num_replicas and rank"
            ) from error
        self._consumed = 0
        # Whether this process handed out the epoch's last batch: only then does another pass start over.
        self._finished = False
        self._warned = False
        # Changes whenever the position is set from outside, so that a `track` under way notices.
        self._turn = 0

    @property
    def remaining(self) -> int:
        """Samples of this epoch that this rank still gets; `len()` is the whole epoch's."""
        return self._rest(self._consumed)

    def __iter__(self) -> Iterator[int]:
        if self._finished:
            self._warn_of_another_pass()
            return self._indices(self.epoch, 0)
        return self._indices(self.epoch, self._consumed)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch, at its start; the position is kept if it is the epoch already.

        Args:
            epoch: counted from 0; the same on all ranks.

        Raises:
            InvalidArgument: it is negative, over 64 bits or no integer; nothing was changed.
        """
        epoch = _whole("epoch", epoch, 0)
        if epoch != self.epoch:
            self._move(epoch, 0)

    def state_dict(self) -> SamplerState:
        """Returns what `load_state_dict` takes, on any rank of any world size; the same on all ranks."""
        return SamplerState(
            version=PERMUTATION_VERSION,
            epoch=self.epoch,
            consumed=self._consumed,
            seed=self.seed,
            n=self._n,
            shuffle=bool(self.shuffle),
        )

    def check_state_dict(self, state: Mapping[str, object]) -> None:
        """Refuses what `load_state_dict` would refuse, and changes nothing.

        Args:
            state: as for `load_state_dict`.

        Raises:
            InvalidArgument: as `load_state_dict` raises it.
        """
        _checked_position(state, self.state_dict())

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Goes to where `state` stood. Costs the same at any position.

        After a state of an epoch's very end the next pass yields nothing; then `set_epoch` names the next epoch.

        Args:
            state: what `state_dict` returned, under any world size.

        Raises:
            InvalidArgument: it is no such state, or one of another dataset length, seed, order or permutation
                version; nothing was changed.
        """
        epoch, consumed = _checked_position(state, self.state_dict())
        self._move(epoch, consumed)

    def track(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """Yields the loader's batches, and counts each when it is handed out, before the loop's body.

        What a worker has prefetched is not counted, so `state_dict()` in the body stands right behind the batch
        that the body works on. The loader's iterator is made by the call, not by the first `next`. A pass that
        was left early goes on behind its last batch at the next call; one that ended starts over, as stock does,
        with a warning, unless `set_epoch` came between.

        Args:
            loader: a loader that draws from this sampler: given as `sampler`, or inside torch's `BatchSampler`.

        Returns:
            A generator over `loader`'s batches.

        Raises:
            InvalidArgument: the loader draws from elsewhere or out of order; or, while iterating, the
                position was set in the loop's body, or another `track` of this sampler has begun.
        """
        batching = self._batching(loader)
        if self._finished:
            self._warn_of_another_pass()
            self._move(self.epoch, 0)
        self._turn += 1
        return self._counted(iter(loader), batching, self._turn)

    def _counted(self, batches: Iterator[Batch], batching: _Batching, turn: int) -> Iterator[Batch]:
        least = batching.batch_size if batching.drop_last else 1
        left = self.remaining
        nothing_left = left < least
        for batch in batches:
            if self._turn != turn:
                raise InvalidArgument(
                    "the sampler was moved while `track` handed out batches; call set_epoch and load_state_dict "
                    "between two passes, and use one `track` at a time"
                )
            served = min(batching.batch_size, left)
            left -= served
            self._consumed += served * self.num_replicas
            self._finished = left < least
            yield batch
        if nothing_left and self._turn == turn:
            # The pass that a state of the epoch's very end stands for is over: the next one starts over.
            self._finished = True

    def _batching(self, loader: Iterable[object]) -> _Batching:
        """Returns how `loader` makes batches of this sampler's indices; refuses it if it does not draw from it."""
        if not isinstance(loader, DataLoader):
            raise InvalidArgument(
                f"track takes the DataLoader itself, not {type(loader).__name__}; wrap what it returns"
            )
        if loader.num_workers > 0 and not getattr(loader, "in_order", True):
            raise InvalidArgument("the loader has in_order=False, so that no position says what was consumed")
        source = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
        batching = _Batching(1, False)
        if type(source) is BatchSampler:
            batching, source = _Batching(source.batch_size, source.drop_last), source.sampler
        if source is not self:
            another = "another " if isinstance(source, type(self)) else "a "
            raise InvalidArgument(
                f"this loader draws from {another}{type(source).__name__}, not from this sampler, so its batches "
                "say nothing about what was consumed; track the loader that was made with sampler=this one"
            )
        return batching

    def _move(self, epoch: int, consumed: int) -> None:
        self.epoch = epoch
        self._consumed = consumed
        self._finished = False
        self._turn += 1

    def _warn_of_another_pass(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"epoch {self.epoch} was consumed and is served again in the same order; "
                "call sampler.set_epoch(epoch) before each epoch",
                stacklevel=3,
            )

    def _rest(self, start: int) -> int:
        """Returns this rank's share of the positions from `start` on, by stock's rule for a whole epoch."""
        rest = max(self._n - start, 0)
        return rest // self.num_replicas if self.drop_last else -(-rest // self.num_replicas)

    def _indices(self, epoch: int, start: int) -> Iterator[int]:
        first, stride = start + self.rank, self.num_replicas
        count = self._rest(start)
        if count == 0:
            return
        # Fewer samples are padded than there are ranks, so only this rank's last position can lie beyond the epoch.
        last = first + (count - 1) * stride
        inside = count if last < self._n else count - 1
        for done in range(0, inside, BLOCK):
            yield from self._order(epoch, first + done * stride, min(BLOCK, inside - done))
        if inside < count:
            yield from self._order(epoch, last % self._n, 1)

    def _order(self, epoch: int, first: int, count: int) -> Sequence[int]:
        """Returns the samples at `count` positions from `first` on, as far apart as there are ranks."""
        stride = self.num_replicas
        if not self.shuffle:
            return range(first, first + count * stride, stride)
        return _C.permute(self._n, (self.seed % UINT64, epoch), first, stride, count, PERMUTATION_VERSION)


_MEANING = {
    "n": "dataset's length",
    "seed": "seed",
    "shuffle": "shuffle",
    "version": "permutation's version",
}


def _whole(name: str, value: object, low: int) -> int:
    """Returns `value` as an int in [low, 2**64)."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise InvalidArgument(f"{name} must be an integer, not {type(value).__name__}")
    if not low <= number < UINT64:
        raise InvalidArgument(f"{name} must lie in [{low}, 2**64), not {number}")
    return number


def _checked_position(state: object, mine: SamplerState) -> tuple[int, int]:
    """Returns the epoch and the consumed samples of `state`, once it is known to fit a sampler in state `mine`."""
    if not isinstance(state, Mapping) or set(state) != set(mine):
        found = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
        raise InvalidArgument(f"a sampler's state has exactly {sorted(mine)}, not {found}")
    for name, value in mine.items():
        theirs = state[name]
        if type(theirs) is not type(value):
            raise InvalidArgument(
                f"{name!r} of a sampler's state must be {type(value).__name__}, not {type(theirs).__name__}"
            )
        if name not in ("epoch", "consumed") and theirs != value:
            raise InvalidArgument(
                f"the state is of a sampler whose {_MEANING[name]} is {theirs}, and this one's is {value}: its position "
                "means nothing here; make the sampler as it was made for that state, or restore without it"
            )
    return _whole("epoch", state["epoch"], 0), _whole("consumed", state["consumed"], 0)
