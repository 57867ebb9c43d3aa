"""How often something is tried again, and after which pauses: the one policy of the package, as a value."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dtruntime_torch.counts import check_count, check_number
from dtruntime_torch.errors import InvalidArgument


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
