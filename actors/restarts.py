"""How often what was lost may be started again: a bound, and a pause that grows."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from configs.errors import RunError

MOST_IN_A_ROW = 5
LONGEST_PAUSE_SECONDS = 30.0


class Restarts:
    """Counts restarts since the run last got further than ever before; `say` hears of each.

    What a restart makes good does not count for ever; what fails in the same place again and again ends the run.
    """

    def __init__(self, say: Callable[[str], None], most: int = MOST_IN_A_ROW, pause_seconds: float = 1.0) -> None:
        self.total = 0
        self._say, self._most, self._pause = say, most, pause_seconds
        self._in_a_row, self._furthest = 0, -1
        self._lock = threading.Lock()

    def allow(self, who: str, why: str) -> None:
        """Say that `who` was lost and wait a little: not at all the first time, then one pause, two, four, …

        RunError if it happened too often.
        """
        with self._lock:
            if self._in_a_row == self._most:
                raise RunError(
                    f"{who} was lost again, after {self._most} restarts without a step in between: {why} What kills it "
                    "does so every time: look at its log, and give it more memory or less work."
                )
            self._in_a_row += 1
            self.total += 1
            number = self._in_a_row
        self._say(f"{who} was lost and is started again ({number} of at most {self._most} in a row). {why}")
        if number > 1:
            time.sleep(min(self._pause * 2 ** (number - 2), LONGEST_PAUSE_SECONDS))

    def progress(self, step: int) -> None:
        """A step was done."""
        with self._lock:
            if step > self._furthest:
                self._furthest, self._in_a_row = step, 0
