"""Two ways to do the same work, and which of them is faster: a figure for each, their ratio, and what it should be."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

Way = TypeVar("Way")


@dataclass(frozen=True, slots=True)
class Comparison:
    """One metric.

    Attributes:
        metric: its name, `what/how`.
        unit: of `ours` and `peer`.
        ours: the figure of the median run.
        peer: that of the peer.
        peer_name: what the peer is.
        ratio: above 1 where ours is better: the median of the ratios of neighbouring runs.
        spread: the quartiles of these ratios.
        goal: the ratio to reach, or None if it is only reported.
        repetitions: how often each was run.
    """

    metric: str
    unit: str
    ours: float
    peer: float
    peer_name: str
    ratio: float
    spread: tuple[float, float]
    goal: float | None
    repetitions: int

    @property
    def reached(self) -> bool | None:
        """Whether the goal is reached, or None where there is none."""
        return None if self.goal is None else self.ratio >= self.goal

    def as_json(self) -> dict[str, object]:
        """What is written to files."""
        return {**asdict(self), "spread": list(self.spread)}


def in_turns(
    ways: Mapping[str, Way], take: Callable[[Way], float], repetitions: int
) -> dict[str, list[float]]:
    """Times several ways to do something, one after another, after one run of each that is not counted.

    Args:
        ways: by name.
        take: gives the seconds of one run.
        repetitions: how often each is counted.

    Returns:
        The seconds of each run, by name: neighbours in time stand at the same place.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repetition in range(1 + repetitions):
        for name, way in ways.items():
            taken = take(way)
            if repetition:
                seconds[name].append(taken)
    return seconds


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """The median of each."""
    return {name: statistics.median(runs) for name, runs in seconds.items()}


def compare(
    metric: str,
    ours: Sequence[float],
    peer: Sequence[float],
    *,
    peer_name: str,
    unit: str,
    figure: Callable[[float], float],
    goal: float | None = None,
) -> Comparison:
    """Sums up runs that were made in turns.

    Args:
        metric: see `Comparison`, as for the other names.
        ours: seconds of each run.
        peer: seconds of the run beside it, as many.
        peer_name: what the peer is.
        unit: of what `figure` gives.
        figure: turns seconds into what is reported.
        goal: the ratio to reach.

    Example:
        >>> done = compare("sum", [1.0, 2.0], [2.0, 5.0], peer_name="a loop", unit="s", figure=float, goal=2.0)
        >>> done.ours, done.peer, done.ratio, done.reached
        (1.5, 3.5, 2.25, True)
    """
    ratios = [theirs / mine for mine, theirs in zip(ours, peer, strict=True)]
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    return Comparison(
        metric=metric,
        unit=unit,
        ours=_rounded(figure(statistics.median(ours))),
        peer=_rounded(figure(statistics.median(peer))),
        peer_name=peer_name,
        ratio=round(statistics.median(ratios), 3),
        spread=(round(quartiles[0], 3), round(quartiles[2], 3)),
        goal=goal,
        repetitions=len(ratios),
    )


def gigabytes_per_second(nbytes: int) -> Callable[[float], float]:
    """Turns the seconds that `nbytes` took into GB/s, of 1e9 bytes."""
    return lambda seconds: nbytes / seconds / 1e9


def _rounded(value: float) -> float:
    """Four digits that count: no clock here is better than that."""
    return float(f"{value:.4g}")
