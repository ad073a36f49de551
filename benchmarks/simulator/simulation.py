"""A run's seconds by discrete events: who samples, verifies, learns and pushes when, given the seconds of each alone.

The rules are the code's: actors/stream.py admits prompts, actors/rollout_pool.py spreads them, a worker decodes
all it runs step by step, cluster/loop.py takes groups in the order of their visits, learns and pushes.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from random import Random
from statistics import fmean
from typing import Any

from simpy import AllOf, Environment, Event

from benchmarks.simulator.cores import Cores, Server, sharing
from benchmarks.simulator.rates import Rates
from benchmarks.simulator.scenario import Outcome, Scenario, Step
from benchmarks.simulator.worker import Group, Worker


@dataclass(eq=False)
class Stream:
    """Which prompts are held, as `SampleStream` and, on-policy, `OnDemand` hold them."""

    scenario: Scenario
    admitted: int = 0
    cursor: int = 0
    held: int = 0
    taken: int = 0
    asked: bool = False
    finished: dict[int, Group] = field(default_factory=dict)

    def room(self) -> int:
        """Prompts that may be admitted now; on-policy only while a batch is asked for."""
        scenario = self.scenario
        if not (scenario.max_staleness or self.asked):
            return 0
        room = (1 + scenario.max_staleness) * scenario.prompts_per_batch - self.held
        if not scenario.endless:
            room = min(room, scenario.steps * scenario.prompts_per_batch - self.admitted)
        return max(0, room)

    def admit(self) -> int:
        """The visit of the next prompt, which is held from now on."""
        self.held += 1
        self.admitted += 1
        return self.admitted - 1

    def next(self) -> Group | None:
        """The group whose turn it is, if it has its verdicts."""
        group = self.finished.pop(self.cursor, None)
        if group is not None:
            self.cursor += 1
            self.taken += 1
        return group

    def pushed(self) -> None:
        """What was taken gives its places free."""
        self.held -= self.taken
        self.taken = 0


class Simulation:
    """One run. `run` plays it."""

    def __init__(self, scenario: Scenario, rates: Rates) -> None:
        self.scenario, self.rates = scenario, rates
        self.environment = environment = Environment()
        shared = Cores(environment, sharing(scenario.cores, rates.beside)) if scenario.cores else None

        def cores() -> Cores:
            return shared or Cores(environment)

        self.driver = Server(environment, cores())
        self.verifiers = [Server(environment, cores()) for _ in range(scenario.verifiers)]
        self.workers = [Worker(environment, cores(), rates, scenario, self._sampled) for _ in range(scenario.workers)]
        self.ranks = [cores() for _ in range(scenario.ranks if shared else 1)]  # with a device each they are alike
        self.stream = Stream(scenario)
        self.version = 0
        self.learning_seconds = 0.0
        self._news = environment.event()
        self._steps: list[Step] = []

    def run(self) -> Outcome:
        self.environment.run(self.environment.process(self._train()))
        seconds = self.environment.now or 1.0
        busy = {
            "workers": fmean(worker.busy_seconds for worker in self.workers) / seconds,
            "ranks": self.learning_seconds / seconds,
            "verifiers": fmean(verifier.busy_seconds for verifier in self.verifiers) / seconds,
            "driver": self.driver.busy_seconds / seconds,
        }
        return Outcome(tuple(self._steps), busy)

    # -- sampling ---------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Every free place to the worker that owes least."""
        scenario = self.scenario
        for _ in range(self.stream.room()):
            visit = self.stream.admit()
            lengths = scenario.lengths.draw(Random(f"{scenario.seed} {visit}"), scenario.completions_per_prompt)
            min(self.workers, key=lambda worker: worker.owed).submit(Group(visit, lengths, len(lengths)))

    def _sampled(self, group: Group) -> None:
        self.environment.process(self._verify(group))

    def _verify(self, group: Group) -> Generator[Event, Any, None]:
        rates = self.rates
        hand = rates.hand + rates.hand_actor * len(self.workers) + rates.hand_token * sum(group.lengths)
        yield self.driver.do(hand)
        verifier = min(self.verifiers, key=lambda each: each.load)
        yield verifier.do(rates.verify_group + rates.verify * len(group.lengths))
        self.stream.finished[group.visit] = group
        self._news.succeed()
        self._news = self.environment.event()

    # -- the loop ---------------------------------------------------------------------------------

    def _train(self) -> Generator[Event, Any, None]:
        now = self.environment
        for _ in range(self.scenario.steps):
            began = now.now
            groups = yield from self._take()
            waited = now.now
            tokens = sum(sum(group.lengths) for group in groups)
            completions = len(groups) * self.scenario.completions_per_prompt
            rates = self.rates
            yield self.driver.do(rates.step + rates.record * completions + rates.record_token * tokens)
            recorded = now.now
            staleness = tuple(self.version - (group.version or 0) for group in groups)
            yield from self._learn(self._update_seconds(tokens, completions))
            learnt = now.now
            yield from self._push()
            visits = tuple(group.visit for group in groups)
            seconds = (waited - began, learnt - recorded, now.now - learnt, now.now - began)
            self._steps.append(Step(*seconds, visits, staleness, tokens))

    def _take(self) -> Generator[Event, Any, list[Group]]:
        groups: list[Group] = []
        self.stream.asked = True
        self._admit()
        while len(groups) < self.scenario.prompts_per_batch:
            group = self.stream.next()
            if group is None:
                yield self._news
            else:
                groups.append(group)
                self._admit()  # nothing, as what was taken keeps its place until the push
        self.stream.asked = False
        return groups

    def _update_seconds(self, tokens: int, completions: int) -> float:
        rates, ranks = self.rates, self.scenario.ranks
        whole = tokens + completions * self.scenario.prompt_tokens
        exchange = rates.exchange * 2 * (ranks - 1) / ranks
        probe = rates.probe if self.scenario.max_staleness else 0.0
        cut = rates.share * completions + rates.share_square * completions**2
        return rates.update + cut + rates.token * whole / ranks + exchange + probe

    def _learn(self, seconds: float) -> Generator[Event, Any, None]:
        began = self.environment.now
        yield AllOf(self.environment, [rank.start(seconds) for rank in self.ranks])
        self.learning_seconds += self.environment.now - began

    def _push(self) -> Generator[Event, Any, None]:
        """No worker decodes from the first one's stop to the last one's new weights."""
        yield AllOf(self.environment, [worker.stop() for worker in self.workers])
        yield self.ranks[0].start(self.rates.push + self.rates.push_worker * (len(self.workers) - 1))
        self.version += 1
        for worker in self.workers:
            worker.go_on(self.version)
        self.stream.pushed()
        self._admit()


def simulate(scenario: Scenario, rates: Rates) -> Outcome:
    """Play the run."""
    return Simulation(scenario, rates).run()
