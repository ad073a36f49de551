"""Simulated processors: threads that share cores, and servers that do one thing after another on them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from typing import Any

from simpy import Environment, Event

Pace = Callable[[int], float]

CLOSE = 1e-9  # seconds of work that are none, where sums of floats should have come to zero


def alone(busy: int) -> float:
    """The pace of threads that have a device each."""
    return 1.0


def sharing(cores: int, beside: float) -> Pace:
    """The pace of each of `busy` threads on so many cores; `beside` is what others that are busy leave it of 1."""
    return lambda busy: (1.0 if busy == 1 else beside) * min(1.0, cores / busy)


class Work(Event):
    """Seconds of one thread; succeeds once they are worked off."""

    def __init__(self, environment: Environment, seconds: float) -> None:
        super().__init__(environment)
        self.seconds = seconds
        self.done = 0.0


class Cores:
    """Works off what is started on it, everything at the same time and at the same pace."""

    def __init__(self, environment: Environment, pace: Pace = alone) -> None:
        self._environment, self._pace = environment, pace
        self._busy: list[Work] = []
        self._settled_at = environment.now
        self._turn = 0

    def start(self, seconds: float) -> Work:
        self._settle()
        work = Work(self._environment, seconds)
        self._busy.append(work)
        self._plan()
        return work

    def done(self, work: Work) -> float:
        """Seconds of it that are worked off by now."""
        self._settle()
        return work.done

    def shorten(self, work: Work, seconds: float) -> None:
        """It shall take so many seconds in all, no fewer than are worked off."""
        self._settle()
        work.seconds = seconds
        self._plan()

    def _settle(self) -> None:
        """Credit what has been worked off since the last call."""
        elapsed, self._settled_at = self._environment.now - self._settled_at, self._environment.now
        if elapsed and self._busy:
            worked = elapsed * self._pace(len(self._busy))
            for work in self._busy:
                work.done += worked

    def _plan(self) -> None:
        """End what is worked off, and come back when the next is."""
        for work in [work for work in self._busy if work.seconds - work.done <= CLOSE]:
            self._busy.remove(work)
            work.succeed()
        self._turn += 1  # an earlier plan's alarm is none any more
        if self._busy:
            left = min(work.seconds - work.done for work in self._busy)
            turn = self._turn
            alarm = self._environment.timeout(left / self._pace(len(self._busy)))
            alarm.callbacks.append(lambda _: self._alarm(turn))

    def _alarm(self, turn: int) -> None:
        if turn == self._turn:
            self._settle()
            self._plan()


class Server:
    """One thread that does what it is asked in the order of asking. `load`: what it still has to do."""

    def __init__(self, environment: Environment, cores: Cores) -> None:
        self._environment, self._cores = environment, cores
        self._asked: deque[tuple[float, Event]] = deque()
        self.load = 0
        self.busy_seconds = 0.0

    def do(self, seconds: float) -> Event:
        """Succeeds when it is done."""
        done = self._environment.event()
        self._asked.append((seconds, done))
        self.load += 1
        if self.load == 1:
            self._environment.process(self._work())
        return done

    def _work(self) -> Generator[Event, Any, None]:
        while self._asked:
            seconds, done = self._asked.popleft()
            began = self._environment.now
            yield self._cores.start(seconds)
            self.busy_seconds += self._environment.now - began
            self.load -= 1
            done.succeed()
