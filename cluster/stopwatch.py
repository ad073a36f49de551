"""Seconds spent in the parts of one piece of work."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Stopwatch:
    """`seconds` by part. A part within another counts for itself only. For one thread."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: dict[str, float] = {}
        self._now = now
        self._within = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start, outer, self._within = self._now(), self._within, 0.0
        try:
            yield
        finally:
            whole = self._now() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + whole - self._within
            self._within = outer + whole
