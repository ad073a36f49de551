"""A simulated rollout worker: continuous batching, decode step by decode step, without an event for each."""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

from simpy import Environment, Event

from benchmarks.simulator.cores import Cores, Work
from benchmarks.simulator.rates import Rates
from benchmarks.simulator.scenario import Scenario


@dataclass(eq=False)
class Group:
    """A prompt's completions under way; `version` is that of the oldest token."""

    visit: int
    lengths: Sequence[int]
    left: int
    version: int | None = None


class Worker:
    """Decodes up to `max_running` completions at a time, the others wait for their turn."""

    def __init__(
        self, environment: Environment, cores: Cores, rates: Rates, scenario: Scenario, done: Callable[[Group], None]
    ) -> None:
        self._environment, self._cores, self._rates, self._scenario = environment, cores, rates, scenario
        self._done = done
        self._waiting: deque[tuple[int, Group]] = deque()
        self._running: list[tuple[int, int, Group]] = []  # the decode step it ends with, a tie-breaker, whose it is
        self._decoded = self._begun = 0
        self._context = 0.0  # tokens that those running look back on
        self._work: tuple[Work, float, float, float] | None = None  # with its seconds before, a step, a step squared
        self._stop: Event | None = None
        self._news = environment.event()
        self.version = self.owed = 0
        self.busy_seconds = 0.0
        environment.process(self._run())

    def submit(self, group: Group) -> None:
        self._waiting.extend((length, group) for length in group.lengths)
        self.owed += 1
        if len(self._running) < self._scenario.max_running:
            self._cut()
        self._wake()

    def stop(self) -> Event:
        """Decode no further; succeeds after the decode step under way."""
        self._stop = self._environment.event()
        self._cut()
        self._wake()
        return self._stop

    def go_on(self, version: int) -> None:
        """With the weights of this version."""
        self._stop, self.version = None, version
        self._wake()

    def _wake(self) -> None:
        self._news.succeed()
        self._news = self._environment.event()

    def _cut(self) -> None:
        """End the work under way with the decode step that it is in."""
        if self._work is not None:
            work, before, linear, square = self._work
            into = max(0.0, self._cores.done(work) - before)
            steps = math.ceil(_steps(into, linear, square) - 1e-6) or 1
            self._cores.shorten(work, min(work.seconds, before + steps * linear + steps * steps * square))

    def _run(self) -> Generator[Event, Any, None]:
        idle = True
        while True:
            if self._stop is not None or not (self._waiting or self._running):
                idle = not (self._waiting or self._running)
                if self._stop is not None and not self._stop.triggered:
                    self._stop.succeed()
                yield self._news
                continue
            before = self._admit() * self._rates.start + (self._rates.submit if idle else 0.0)
            idle = False
            yield from self._decode(before)
            self._finish()

    def _admit(self) -> int:
        """Begin what there is room for; how many."""
        began = 0
        while self._waiting and len(self._running) < self._scenario.max_running:
            length, group = self._waiting.popleft()
            group.version = self.version if group.version is None else min(group.version, self.version)
            self._begun += 1
            began += 1
            heapq.heappush(self._running, (self._decoded + length, self._begun, group))
        self._context += began * self._scenario.prompt_tokens
        return began

    def _decode(self, before: float) -> Generator[Event, Any, None]:
        """Until the next completion ends, or `_cut`."""
        rates, count = self._rates, len(self._running)
        linear = rates.decode + rates.running * count + rates.context * self._context
        square = rates.context * count / 2
        steps = self._running[0][0] - self._decoded
        began = self._environment.now
        work = self._cores.start(before + steps * linear + steps * steps * square)
        self._work = (work, before, linear, square)
        yield work
        self._work = None
        self.busy_seconds += self._environment.now - began
        if work.seconds < before + steps * linear + steps * steps * square:
            steps = min(steps, round(_steps(work.seconds - before, linear, square)))
        self._decoded += steps
        self._context += steps * count

    def _finish(self) -> None:
        while self._running and self._running[0][0] <= self._decoded:
            _, _, group = heapq.heappop(self._running)
            group.left -= 1
            length = group.lengths[group.left]  # whichever of the group's: their sum comes out right with its last
            self._context -= length + self._scenario.prompt_tokens
            if not group.left:
                self.owed -= 1
                self._done(group)


def _steps(seconds: float, linear: float, square: float) -> float:
    """Decode steps that fit into them: the solution of steps x linear + steps^2 x square = seconds."""
    if not square:
        return seconds / linear if linear else 0.0
    return (math.sqrt(linear * linear + 4 * square * seconds) - linear) / (2 * square)
