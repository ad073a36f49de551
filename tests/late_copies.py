"""A checkpoint that is copied as late as a learner rank lets it be."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from learner.rank import LearnerRank

LATE_SECONDS = 60.0


class LateCopies:
    """Saves of one rank that copy nothing before somebody waits for it, or `now`."""

    def __init__(self, rank: LearnerRank) -> None:
        self._rank = rank
        self._go = threading.Event()
        self._right_wait, self._right_start = rank._copied.wait, rank._writer.start
        rank._copied.wait = self._wait  # type: ignore[method-assign]

    def act(self, name: str, argument: Any, act: Callable[[str, Any], Any]) -> Any:
        """Runs one action: a late save, which is copied once the next action waits for it, or is over; or `act`."""
        if name == "late save":
            return self.begin_save(Path(argument))
        try:
            return act(name, argument)
        finally:
            self.now()

    def begin_save(self, folder: Path) -> None:
        self.now()
        self._go = threading.Event()
        with patch.object(self._rank._writer, "start", self._start):
            self._rank.begin_save(folder)

    def now(self) -> None:
        self._go.set()
        self._right_wait()

    def _wait(self, timeout: float | None = None) -> bool:
        self._go.set()
        return self._right_wait(timeout)

    def _start(self, write: Callable[[], Any]) -> None:
        go = self._go

        def late() -> Any:
            try:
                assert go.wait(LATE_SECONDS), "nobody has waited for the copies"
                return write()
            finally:
                self._rank._copied.set()

        self._right_start(late)
