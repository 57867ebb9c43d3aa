"""How ranks meet on a Store: all arrive, the leader (rank 0) acts, all learn how it went and depart.

No collective is involved, so it works beside the training, in a background thread. What it gives is certainty:
arriving is irrevocable, and the leader alone decides, once, whether it acts. A rank that knows the decision knows
whether the act took place, and an error tells when it does not. The price: a leader that dies leaves the others
without an answer until their time is up.

Keys of a meeting: `<key>/arrived/<rank>`, `/begun`, `/void`, `/decision`, `/answer`, `/departed/<rank>`. The leader deletes
them only when all have departed, so that who is late finds the decision, however late.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch.distributed.distributed_c10d import Store

from dtruntime_torch.errors import BarrierTimeout, DTRuntimeError, InvalidArgument, StoreUnreachable
from dtruntime_torch.store import StoreClient, decode, encode_error, encode_value, parse_json

GRACE_SECONDS = 10.0
POLL_SECONDS = 0.25

_ACT, _GIVE_UP = b"+", b"-"
_SET = b"="
_ADVICE = "look at the logs of these ranks, and raise the time-out if they are only slow"

Interrupt = Callable[[], "DTRuntimeError | None"]

logger = logging.getLogger(__name__)


class Barrier:
    """Meetings of the ranks 0 to `world_size - 1`.

    Not for two threads at once: the calls of one would queue behind the waits of the other. A key serves for one
    meeting or one announcement, ever.

    Args:
        store: shared by these ranks, and prefixed so that nobody else uses it. A clone of it is used.
        rank: this rank.
        world_size: the number of ranks.
        timeout: seconds that a rank waits for others to arrive. Where the leader has arrived, it waits as long
            once more for its decision, and once more for the act to end.

    Example:
        >>> from torch.distributed import HashStore
        >>> barrier = Barrier(HashStore(), rank=0, world_size=1, timeout=60.0)
        >>> barrier.meet("save/1", b"part 0", lambda values: b" and ".join(values) + b" committed")
        b'part 0 committed'
    """

    def __init__(self, store: Store, rank: int, world_size: int, timeout: float) -> None:
        if not 0 <= rank < world_size:
            raise InvalidArgument(f"rank is {rank}; of {world_size} ranks it is from 0 to {world_size - 1}")
        self.rank = rank
        self.world_size = world_size
        self.timeout = timeout
        self._followers = range(1, world_size)
        self._store = store
        self._client = StoreClient(store)
        self._undeleted: list[str] = []

    def announce(self, key: str, make: Callable[[], bytes]) -> bytes:
        """The leader runs `make` and tells all ranks what it returned, without waiting for them.

        Args:
            key: the same on all ranks, used once.
            make: called on the leader only.

        Raises:
            BarrierTimeout: the leader said nothing in time.
            StoreUnreachable: the process that keeps the Store has ended.
            DTRuntimeError: what `make` raised, on all ranks.
        """
        if self.rank == 0:
            self._delete_finished()
            return self._publish(key, make)
        try:
            return self._read_answer(key, self.timeout)
        finally:
            self._depart(key)

    def meet(
        self,
        key: str,
        value: bytes,
        act: Callable[[Sequence[bytes]], bytes],
        interrupt: Interrupt | None = None,
    ) -> bytes:
        """All arrive; then the leader acts on what they brought and tells them what came of it.

        Args:
            key: the same on all ranks, used once.
            value: what this rank brings, at most 64 MiB.
            act: called on the leader only, with the values in the order of ranks.
            interrupt: asked again and again while this rank waits for others; an error that it returns ends the
                wait, and on the leader the meeting.

        Returns:
            What `act` returned, on all ranks.

        Raises:
            BarrierTimeout: ranks did not arrive in time; its `decided` tells whether the leader said so.
            StoreUnreachable: the process that keeps the Store has ended; whether the leader acted is unknown.
            DTRuntimeError: what `act` raised, or why a rank declined, on all ranks.
        """
        self._arrive(key, encode_value(value))
        return self._lead(key, act, interrupt) if self.rank == 0 else self._follow(key, interrupt)

    def decline(self, key: str, reason: BaseException | bytes) -> None:
        """Arrives without waiting, so that no other rank waits for this one in vain.

        Args:
            key: of a meeting, or on the leader also of an announcement, that this rank takes no part in. If it has
                arrived there already, then that stands.
            reason: an error ends the meeting with this error on all who take part. Bytes are this rank's value; on
                the leader, who alone could act on them, they end the meeting all the same.
        """
        if isinstance(reason, bytes):
            stored, error = encode_value(reason), encode_error(DTRuntimeError("rank 0 takes no part"))
        else:
            stored = error = encode_error(reason)
        self._arrive(key, stored)
        if self.rank == 0:
            self._delete_finished()
            self._undeleted.append(key)
            self._client.create(f"{key}/answer", error)
            self._client.create(f"{key}/decision", _ACT)
        self._depart(key)

    def void(self, key: str, reason: DTRuntimeError) -> None:
        """Says, irrevocably, that a meeting that this rank declines will not come about; see `voided`."""
        self._client.create(f"{key}/void", encode_error(reason))
        self.decline(key, reason)

    def voided(self, key: str) -> DTRuntimeError | None:
        """Why a meeting will not come about, if a rank said so and not all have departed."""
        if not self._client.exist([f"{key}/void"]):
            return None
        reason = decode(self._client.read(f"{key}/void"))
        return reason if isinstance(reason, DTRuntimeError) else None

    def beside(self) -> Barrier:
        """Another of the same ranks, for another thread."""
        return Barrier(self._store, self.rank, self.world_size, self.timeout)

    def begin(self, key: str) -> None:
        """Says that this rank is on its way to a meeting, without arriving there."""
        self._client.create(f"{key}/begun", _SET)

    def has_begun(self, key: str) -> bool:
        """Whether any rank is on its way there or has arrived, as long as not all have departed."""
        return self._client.exist([f"{key}/begun"])

    def arrivals(self, key: str) -> dict[int, bytes | DTRuntimeError]:
        """What the ranks that have arrived brought: a value, or why they declined."""
        places = {rank: f"{key}/arrived/{rank}" for rank in range(self.world_size)}
        return {
            rank: decode(self._client.read(place), before=f"rank {rank} takes no part: ")
            for rank, place in places.items()
            if self._client.exist([place])
        }

    def _arrive(self, key: str, stored: bytes) -> None:
        self._client.create(f"{key}/arrived/{self.rank}", stored)
        self._client.create(f"{key}/begun", _SET)

    def _lead(self, key: str, act: Callable[[Sequence[bytes]], bytes], interrupt: Interrupt | None) -> bytes:
        self._delete_finished()
        expected = [f"{key}/arrived/{rank}" for rank in self._followers]
        all_here, interruption = self._wait(key, expected, self.timeout, interrupt)
        here = self._followers if all_here else self.arrivals(key)
        missing = [rank for rank in self._followers if rank not in here]

        def act_on_arrivals() -> bytes:
            if interruption is not None:
                raise interruption
            return act(self._values(key))

        gives_up = bool(missing) and interruption is None
        self._decide(key, _GIVE_UP + json.dumps(missing).encode() if gives_up else _ACT)
        try:
            if gives_up:
                raise self._gave_up(key, missing)
            return self._publish(key, act_on_arrivals)
        finally:
            self._see_off(key, [rank for rank in here if rank != 0])

    def _values(self, key: str) -> list[bytes]:
        values = []
        for arrival in self.arrivals(key).values():
            if isinstance(arrival, DTRuntimeError):
                raise arrival
            values.append(arrival)
        return values

    def _follow(self, key: str, interrupt: Interrupt | None) -> bytes:
        try:
            decision = self._await_decision(key, interrupt)
            if decision != _ACT:
                raise self._gave_up(key, _read_ranks(decision))
            return self._read_answer(key, self.timeout + GRACE_SECONDS)
        finally:
            self._depart(key)

    def _await_decision(self, key: str, interrupt: Interrupt | None) -> bytes:
        expected = [f"{key}/decision"]
        decided, interruption = self._wait(key, expected, self.timeout, interrupt)
        if not decided and interruption is None and self._client.exist([f"{key}/arrived/0"]):
            # The leader's time began when it arrived, which was later than this rank.
            decided, interruption = self._wait(key, expected, self.timeout + GRACE_SECONDS, interrupt)
        if interruption is not None:
            raise interruption
        if decided:
            return self._client.read(expected[0])
        missing = sorted(set(range(self.world_size)).difference(self.arrivals(key))) or [0]
        raise BarrierTimeout(
            f"{_name(missing)} did not come to {key!r} within {self.timeout:g} s, and rank 0 has not said that it "
            f"gave up; {_ADVICE}",
            missing,
        )

    def _wait(
        self, key: str, expected: list[str], seconds: float, interrupt: Interrupt | None
    ) -> tuple[bool, DTRuntimeError | None]:
        """Returns whether all that is expected is there, and what interrupted the wait for it."""
        if interrupt is None:
            return self._client.wait(expected, seconds), None
        # A Store waits for all of several keys, never for the first of them; so they are looked at in turn.
        deadline = time.monotonic() + seconds
        pause = 0.001
        while not self._client.exist(expected):
            error = interrupt()
            # What it saw may have come after the decision, from a rank that read that sooner.
            if error is not None and not self._client.exist([f"{key}/decision"]):
                return False, error
            if time.monotonic() >= deadline:
                return False, None
            time.sleep(pause)
            pause = min(2 * pause, POLL_SECONDS)
        return True, None

    def _decide(self, key: str, decision: bytes) -> None:
        if self._client.create(f"{key}/decision", decision) != decision:
            raise InvalidArgument(f"there was a meeting {key!r} already; a key serves once")
        self._undeleted.append(key)

    def _gave_up(self, key: str, missing: Sequence[int]) -> BarrierTimeout:
        message = (
            f"{_name(missing)} did not come to {key!r} within {self.timeout:g} s; rank 0 gave up; {_ADVICE}"
        )
        return BarrierTimeout(message, missing, decided=True)

    def _publish(self, key: str, make: Callable[[], bytes]) -> bytes:
        try:
            answer = make()
            stored = encode_value(answer)
        except BaseException as error:
            self._answer(key, encode_error(error))
            raise
        self._answer(key, stored)
        return answer

    def _answer(self, key: str, stored: bytes) -> None:
        self._undeleted.append(key)
        with self._what_is_known_stays_known(key):
            self._client.create(f"{key}/answer", stored)

    def _read_answer(self, key: str, seconds: float) -> bytes:
        if not self._client.wait([f"{key}/answer"], seconds):
            message = f"rank 0 did not say within {seconds:g} s how {key!r} went; {_ADVICE}"
            raise BarrierTimeout(message, missing=[0])
        answer = decode(self._client.read(f"{key}/answer"))
        if isinstance(answer, DTRuntimeError):
            raise answer
        return answer

    def _depart(self, key: str) -> None:
        with self._what_is_known_stays_known(key):
            self._client.create(f"{key}/departed/{self.rank}", _SET)

    def _see_off(self, key: str, ranks: Iterable[int]) -> None:
        """Waits a little until the others know the answer: this process may be the one that keeps the Store."""
        expected = {f"{key}/departed/{rank}": rank for rank in ranks}
        with self._what_is_known_stays_known(key):
            if not self._client.wait(list(expected), GRACE_SECONDS):
                late = [rank for place, rank in expected.items() if not self._client.exist([place])]
                logger.warning("%s did not fetch the answer of %s in %g s", _name(late), key, GRACE_SECONDS)
            self._delete_finished()

    def _delete_finished(self) -> None:
        """Deletes the keys of what all have departed from, announcements among it."""
        remaining = []
        for key in dict.fromkeys(self._undeleted):
            if self._client.exist([f"{key}/departed/{rank}" for rank in self._followers]):
                self._client.delete(f"{key}/{name}" for name in ("begun", "decision", "answer", "void"))
                for rank in range(self.world_size):
                    self._client.delete((f"{key}/arrived/{rank}", f"{key}/departed/{rank}"))
            else:
                remaining.append(key)
        self._undeleted = remaining

    @contextmanager
    def _what_is_known_stays_known(self, key: str) -> Iterator[None]:
        """For what comes after the answer: that it cannot be passed on does not change it."""
        try:
            yield
        except StoreUnreachable as error:
            logger.warning("rank %d is done with %s, but could not say so: %s", self.rank, key, error)


@contextmanager
def declining(barrier: Barrier, key: str) -> Iterator[None]:
    """Tells the other ranks if this one is interrupted on its way to a meeting, so that none waits for it in vain."""
    try:
        yield
    except BaseException as error:
        barrier.decline(key, error)
        raise


def _name(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {list(ranks)}"


def _read_ranks(decision: bytes) -> list[int]:
    ranks = parse_json(decision[1:])
    return [rank for rank in ranks if type(rank) is int] if isinstance(ranks, list) else []
