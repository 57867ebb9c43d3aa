"""How the saves of a manager have gone, for those who decide whether to train on."""

from __future__ import annotations

import threading
import time


class Health:
    """Counts failed saves, and knows how long ago the last good one was; from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._failed_saves = 0
        self._last_good = time.monotonic()

    @property
    def failed_saves(self) -> int:
        """How many saves became no checkpoint."""
        return self._failed_saves

    @property
    def age_of_last_good(self) -> float:
        """Seconds since the last good one, or since this was made. The system's time may be set meanwhile."""
        return time.monotonic() - self._last_good

    def note_good(self) -> None:
        """Notes that a checkpoint was committed, or loaded."""
        self._last_good = time.monotonic()

    def note_failure(self) -> None:
        """Notes that a save failed."""
        with self._lock:
            self._failed_saves += 1
