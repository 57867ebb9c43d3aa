"""How often something is tried again, and after which pauses: the one policy of the package, as a value, and its use."""

from __future__ import annotations

import asyncio
import errno
import math
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from dtruntime_torch.counts import check_count, check_number
from dtruntime_torch.errors import InvalidArgument, StorageError, UnsuitableStorage

R = TypeVar("R")

# Of these somebody has to change rights, mounts, names or files before it can work.
_LASTING = frozenset(
    {
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.ENAMETOOLONG,
        errno.ELOOP,
    }
)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Exponential pauses between a bounded number of tries.

    Attributes:
        attempts: tries altogether, the first among them.
        initial: seconds before the second try.
        max: seconds that no pause exceeds.
        factor: by how much each pause is longer than the one before.
        jitter: the share of a pause that is left to chance, from 0 to 1, so that many who failed together do not come
            back together.
        deadline: seconds from the first try after which no further one begins; None for no such limit.

    Raises:
        InvalidArgument: a value is out of range.

    Example:
        >>> list(RetryPolicy(attempts=5, initial=1.0, max=4.0, jitter=0.0).delays())
        [1.0, 2.0, 4.0, 4.0]
    """

    attempts: int = 3
    initial: float = 1.0
    max: float = 30.0
    factor: float = 2.0
    jitter: float = 0.2
    deadline: float | None = None

    def __post_init__(self) -> None:
        check_count("attempts", self.attempts)
        for what in ("initial", "max", "factor", "jitter"):
            check_number(what, getattr(self, what))
        if not 0 <= self.initial <= self.max < math.inf:
            raise InvalidArgument(
                f"initial is {self.initial} and max {self.max}; both are seconds, and initial is not the longer"
            )
        if not 1 <= self.factor < math.inf:
            raise InvalidArgument(
                f"factor is {self.factor}; pauses do not become shorter, so it is at least 1"
            )
        if not 0 <= self.jitter <= 1:
            raise InvalidArgument(f"jitter is {self.jitter}; it is a share, from 0 to 1")
        if self.deadline is not None and not check_number("deadline", self.deadline) >= 0:
            raise InvalidArgument(f"deadline is {self.deadline}; it is a number of seconds, or None")

    def delays(
        self, clock: Callable[[], float] = time.monotonic, draw: Callable[[], float] = random.random
    ) -> Iterator[float]:
        """Gives the pause before each further try; it ends when there is to be none.

        Args:
            clock: seconds that only rise; the deadline counts from the first call of `next`.
            draw: a number from 0 to 1 by chance.
        """
        began = clock()
        pause = self.initial
        for _ in range(self.attempts - 1):
            delay = pause * (1 - self.jitter * draw())
            if self.deadline is not None and clock() + delay - began > self.deadline:
                return
            yield delay
            pause = min(pause * self.factor, self.max)


class Tries:
    """One thing that is tried as a policy says: after each failure it tells the pause, and at the end what was done.

    Args:
        policy: how often, and after which pauses.
        clock: seconds that only rise.

    Example:
        >>> tries = Tries(RetryPolicy(attempts=2, initial=1.0, jitter=0.0), clock=lambda: 7.0)
        >>> tries.next_pause(), tries.next_pause(), str(tries)
        (1.0, None, 'tried 2 times in 0.0 s')
    """

    def __init__(self, policy: RetryPolicy, clock: Callable[[], float] = time.monotonic) -> None:
        self._delays = policy.delays(clock)
        self._clock = clock
        self._began = clock()
        self._made = 0

    def __str__(self) -> str:
        times = "once" if self._made == 1 else f"{self._made} times"
        return f"tried {times} in {self._clock() - self._began:.1f} s"

    def tell(self, message: str) -> str:
        """Adds to what the last try ended with how many there were, if there were several."""
        return f"{message} ({self})" if self._made > 1 else message

    def next_pause(self) -> float | None:
        """Notes that a try has failed; returns the seconds before the next one, or None if there is to be none."""
        self._made += 1
        return next(self._delays, None)


def is_lasting(error: BaseException) -> bool:
    """Whether the system will refuse the same until somebody changes something there."""
    return isinstance(error, UnsuitableStorage) or (isinstance(error, OSError) and error.errno in _LASTING)


def may_pass(error: BaseException) -> bool:
    """Whether what the system refused may be granted the next time, as on a disk that was full."""
    return isinstance(error, OSError) and not is_lasting(error)


async def retrying(
    policy: RetryPolicy,
    work: Callable[[], Awaitable[R]],
    passes: Callable[[Exception], bool] = may_pass,
    sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
) -> R:
    """Does something, again after each failure that may be over the next time.

    Args:
        policy: how often, and after which pauses.
        work: called for each try.
        passes: whether a failure is worth another try.
        sleep: waits so many seconds.

    Raises:
        StorageError: there is to be no further try; says how many there were, and has the last one's errno.
        Exception: what does not pass, as it is; and of a policy of one try all.
    """
    tries = Tries(policy)
    while True:
        try:
            return await work()
        except Exception as error:
            if not passes(error) or policy.attempts == 1:
                raise
            pause = tries.next_pause()
            if pause is None:
                last = StorageError(tries.tell(str(error) or type(error).__name__))
                last.errno = getattr(error, "errno", None)
                raise last from error
        await sleep(pause)
