"""Sampling ahead: order, the bound on staleness, places, pauses, failures; a scripted flight and random timing."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from actors.stream import SampleStream, StreamOptions, oldest_version
from actors.waiting import Deadline
from configs.errors import RunError
from data.records import Completion, Group, Problem, Prompt
from data.sampler import PromptSampler

BATCH = 4


class Flight:
    """Finishes its prompts in random order, some of them late; their tokens have the versions of that time."""

    def __init__(self, seed: int, late: float = 0.2) -> None:
        self.version = 0
        self.most = self.submitted = 0
        self._random, self._late = random.Random(seed), late
        self._began: dict[Prompt, int] = {}

    @property
    def under_way(self) -> int:
        return len(self._began)

    def submit(self, prompts: list[Prompt]) -> None:
        self._began |= dict.fromkeys(prompts, self.version)
        self.submitted += len(prompts)
        self.most = max(self.most, self.under_way)

    def wait(self, deadline: Deadline, seconds: float | None = None) -> list[Group]:
        time.sleep(0.0005)
        ready = [prompt for prompt in self._began if self._random.random() > self._late]
        return [self._group(prompt, self._began.pop(prompt)) for prompt in ready]

    def _group(self, prompt: Prompt, began: int) -> Group:
        versions = np.array([began, self.version], dtype=np.int32)
        logprobs = np.zeros(2, dtype=np.float32)
        return Group(prompt, (Completion(0, 0, versions, logprobs, versions, "", "stop"),))


def sampler(cursor: int = 0) -> PromptSampler:
    return PromptSampler([Prompt(0, Problem(str(i), "", ""), (1,)) for i in range(7)], seed=0, cursor=cursor)


def stream(flight: Flight, staleness: int, last: int | None = None, seconds: float = 20.0) -> SampleStream:
    return SampleStream(flight, sampler(), [0], StreamOptions(staleness, BATCH, last, seconds))  # type: ignore[arg-type]


def train(
    flight: Flight, samples: SampleStream, steps: int, discard: int = 0, begun: int = 0
) -> tuple[list[int], list[int], int]:
    """So many steps of a learner; (visits in the order of training, staleness of each group, groups dropped)."""
    visits, staleness, dropped = [], [], 0
    for step in range(begun, begun + steps):
        sampled = samples.take(BATCH)
        if discard:
            samples.discard(discard)
            sampled += samples.take(discard)
        visits += [group.prompt.visit for group in sampled.groups]
        staleness += [flight.version - oldest_version(group) for group in sampled.groups]
        dropped += sampled.dropped
        time.sleep(0.002)  # the update, while the stream goes on
        flight.version = step + 1
        samples.pushed(flight.version)
    return visits, staleness, dropped


@pytest.mark.parametrize("staleness", [1, 2, 4])
@pytest.mark.parametrize("seed", range(3))
def test_groups_come_in_order_each_once_and_never_staler_than_allowed(staleness: int, seed: int) -> None:
    flight = Flight(seed, late=0.9)
    samples = stream(flight, staleness)
    visits, behind, dropped = train(flight, samples, 40)
    samples.close()
    assert visits == list(range(40 * BATCH)) and dropped == 0
    assert max(behind) <= staleness
    assert np.mean(behind) > 0, "it did sample ahead"
    assert flight.most <= (1 + staleness) * BATCH


def test_places_given_free_too_early_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: a place is free when its group is taken, before the weights it leads to are pushed."""
    take = SampleStream.take

    def hasty(self: SampleStream, count: int) -> object:
        sampled = take(self, count)
        self.discard(count)
        return sampled

    monkeypatch.setattr(SampleStream, "take", hasty)
    flight = Flight(0, late=0.0)
    samples = stream(flight, 1)
    _, behind, dropped = train(flight, samples, 40)
    samples.close()
    assert dropped or max(behind) > 1


def test_what_is_too_old_is_dropped_counted_and_replaced() -> None:
    flight = Flight(0, late=0.0)
    samples = stream(flight, 1)
    first = samples.take(BATCH)
    for version in (1, 2):  # two pushes while one batch waits: those of its tokens are two behind
        flight.version = version
        samples.pushed(version)
    second = samples.take(BATCH)
    samples.close()
    assert [group.prompt.visit for group in first.groups] == [0, 1, 2, 3]
    assert second.dropped == 4 and [group.prompt.visit for group in second.groups] == [8, 9, 10, 11]
    assert samples.cursor == 12


def test_groups_that_are_replaced_give_their_places_at_once() -> None:
    """Else a batch that is refilled more often than there are places would wait for ever."""
    flight = Flight(1)
    samples = stream(flight, 1)
    visits, _, _ = train(flight, samples, 10, discard=BATCH)
    samples.close()
    assert visits == list(range(10 * 2 * BATCH))


def test_nothing_is_sampled_beyond_the_last_visit() -> None:
    flight = Flight(2)
    samples = stream(flight, 4, last=5 * BATCH)
    train(flight, samples, 5)
    time.sleep(0.05)
    samples.close()
    assert flight.submitted == 5 * BATCH


def test_in_a_pause_nothing_is_under_way_and_what_has_finished_is_kept() -> None:
    flight = Flight(3, late=0.9)
    samples = stream(flight, 2)
    samples.take(BATCH)
    with samples.paused():
        before = flight.submitted
        time.sleep(0.05)
        assert flight.under_way == 0 and flight.submitted == before
    assert [group.prompt.visit for group in samples.take(BATCH).groups] == [4, 5, 6, 7]
    samples.close()


def test_what_the_stream_dies_of_reaches_whoever_takes() -> None:
    class Failing(Flight):
        def wait(self, deadline: Deadline, seconds: float | None = None) -> list[Group]:
            raise RunError("A rollout worker has died.")

    samples = stream(Failing(0), 1)
    for ask in (lambda: samples.take(1), lambda: samples.paused().__enter__()):
        with pytest.raises(RunError, match="has died"):
            ask()
    samples.close()


def waits(call: Callable[[], object]) -> float:
    started = time.monotonic()
    with pytest.raises(RunError, match=r"did not answer within 0\.3 s.*cluster\.deadline_seconds"):
        call()
    return time.monotonic() - started


def test_a_flight_that_never_lands_misses_the_deadline() -> None:
    samples = stream(Flight(0, late=1.0), 1, seconds=0.3)
    assert waits(lambda: samples.take(1)) < 2
    assert waits(lambda: samples.paused().__enter__()) < 2
    samples.close()


def test_closing_ends_the_thread() -> None:
    samples = stream(Flight(0), 1)
    samples.take(1)
    samples.close()
    assert "sample stream" not in {thread.name for thread in threading.enumerate()}
    stream(Flight(0), 1).close()  # one that never began


def test_what_had_finished_before_an_interruption_is_not_sampled_again() -> None:
    first = Flight(5, late=0.5)
    samples = stream(first, 2)
    train(first, samples, 3)
    while len(samples.ahead()[1]) < BATCH:
        time.sleep(0.001)
    samples.close()
    (pushed, buffered), cursor = samples.ahead(), samples.cursor
    assert pushed == (1, 2, 3) and all(group.prompt.visit >= cursor for group in buffered)

    second = Flight(6)
    second.version = first.version
    again = SampleStream(second, sampler(cursor), pushed, StreamOptions(2, BATCH, 9 * BATCH, 20.0), buffered)  # type: ignore[arg-type]
    visits, staleness, dropped = train(second, again, 6, begun=3)
    assert visits == list(range(3 * BATCH, 9 * BATCH)) and not dropped and max(staleness) <= 2
    assert second.submitted == 6 * BATCH - len(buffered)
    assert again.balance() == (9 * BATCH, 0)
    again.close()
