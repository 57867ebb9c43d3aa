"""Ours and a peer in turns, each in processes of its own; one run gives several figures, and all their cases share it."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from benchmarks.ranks import Ranks
from benchmarks.saving_rank import Figures, Setting

# Those whose processes are there: of the pair that is measured, so that no other takes memory or time.
_alive: dict[Setting, Ranks] = {}


class Turns:
    """Two settings whose runs stand beside each other.

    Args:
        ours: one of them.
        peer: the other.
    """

    def __init__(self, ours: Setting, peer: Setting) -> None:
        self.settings = {"ours": ours, "peer": peer}
        self._runs: dict[tuple[object, ...], list[Figures]] = {}

    def figure(
        self, who: str, name: str, what: str, *arguments: int, plus: float = 0.0
    ) -> Callable[[], float]:
        """Gives one figure of one run after another, and makes the runs that no other figure has asked for yet.

        Args:
            who: "ours" or "peer".
            name: of the figure.
            what: the order that gives it, a method of `SavingRank`.
            arguments: of the order.
            plus: what is added to the figure.
        """
        runs = self._runs.setdefault((who, name == "memory", what, *arguments), [])
        numbers = itertools.count()

        def told() -> float:
            number = next(numbers)
            while len(runs) <= number:
                runs.append(self._run(who, what, arguments, watched=name == "memory"))
            return runs[number][name] + plus

        return told

    def _run(self, who: str, what: str, arguments: tuple[int, ...], watched: bool) -> Figures:
        ranks = self._ranks(self.settings[who])
        ranks.do("tidy")
        return ranks.do(what, *arguments, watched=watched)

    def _ranks(self, setting: Setting) -> Ranks:
        if setting not in _alive:
            end_all(but=list(self.settings.values()))
            _alive[setting] = Ranks(setting)
        return _alive[setting]


def end_all(but: list[Setting] | None = None) -> None:
    """Ends the processes of all settings, or of all but some."""
    for setting in [one for one in _alive if one not in (but or [])]:
        _alive.pop(setting).end()
