"""Sample and verify: prompts in, groups with verdicts out, in visit order or as they finish."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import ray
from ray.actor import ActorHandle

from actors.crew import OPTION
from actors.rollout_pool import RolloutPool
from actors.rollout_worker import SampleRequest
from actors.verifier_pool import VerifierPool
from actors.waiting import ActorLost, Deadline, late, wait_for
from configs.errors import RunError
from data.records import Group, Prompt
from data.sampler import PromptSampler

READY_SECONDS = 60.0  # to fetch an answer that is there


@dataclass(frozen=True)
class Sampled:
    """Groups in visit order; seconds until the last was sampled, and from then until the last verdict.

    dropped: groups that were too old to be handed out.
    """

    groups: list[Group]
    sample_seconds: float
    verify_seconds: float
    dropped: int = 0

    def __add__(self, later: Sampled) -> Sampled:
        return Sampled(
            self.groups + later.groups,
            self.sample_seconds + later.sample_seconds,
            self.verify_seconds + later.verify_seconds,
            self.dropped + later.dropped,
        )


def sample_and_verify(
    rollouts: RolloutPool,
    verifiers: VerifierPool,
    prompts: list[Prompt],
    request: SampleRequest,
    deadline_seconds: float,
) -> Sampled:
    """Sample a group for every prompt; each goes to a verifier at once, while others still generate.

    Whoever finishes first, the groups come back in the order of their visits. RunError if they are
    not all there after `deadline_seconds`.
    """
    started = time.monotonic()
    deadline = Deadline(deadline_seconds)
    flight = Flight(rollouts, verifiers, request)
    flight.submit(prompts)
    done: list[Group] = []
    while flight.under_way:
        done += flight.wait(deadline)
    done.sort(key=lambda group: group.prompt.visit)
    last_sampled = flight.last_sampled or started
    return Sampled(done, last_sampled - started, time.monotonic() - last_sampled)


class OnDemand:
    """Samples when it is asked to, with the weights the workers then have: on-policy. See `SampleStream`."""

    def __init__(
        self,
        rollouts: RolloutPool,
        verifiers: VerifierPool,
        request: SampleRequest,
        sampler: PromptSampler,
        deadline_seconds: float,
    ) -> None:
        self._rollouts, self._verifiers, self._request = rollouts, verifiers, request
        self._sampler, self._seconds = sampler, deadline_seconds

    @property
    def cursor(self) -> int:
        return self._sampler.cursor

    def take(self, count: int) -> Sampled:
        prompts = self._sampler.take(count)
        return sample_and_verify(self._rollouts, self._verifiers, prompts, self._request, self._seconds)

    def discard(self, count: int) -> None:
        """Nothing waits for a place."""

    def pushed(self, version: int) -> None:
        """What is sampled next is sampled with the new weights anyway."""

    @contextmanager
    def paused(self) -> Iterator[None]:
        yield

    def balance(self) -> tuple[int, int]:
        """Prompts handed out, and how many of them are in flight: between two steps none."""
        return self._sampler.cursor, 0

    def ahead(self) -> tuple[tuple[int, ...], list[Group]]:
        """Nothing is sampled ahead."""
        return (), []

    def close(self) -> None:
        """Nothing is under way."""


def stream_verified(
    rollouts: RolloutPool,
    verifiers: VerifierPool,
    prompts: Sequence[Prompt],
    request: SampleRequest,
    deadline_seconds: float,
    under_way: int,
) -> Iterator[list[Group]]:
    """The verified groups of any number of prompts, as they finish, at most `under_way` asked for at a time.

    Yields an empty list where nothing finished for a few seconds, so that whoever reads can stop. RunError
    if no group at all finishes within `deadline_seconds`.
    """
    flight = Flight(rollouts, verifiers, request)
    deadline, submitted = Deadline(deadline_seconds), 0
    while submitted < len(prompts) or flight.under_way:
        more = prompts[submitted : submitted + under_way - flight.under_way]
        if more:
            flight.submit(list(more))
            submitted += len(more)
        done = flight.wait(deadline)
        if done:
            deadline = Deadline(deadline_seconds)
        yield done


class Flight:
    """Prompts between their submission and their verdicts. What a lost worker or verifier had is given to others."""

    def __init__(self, rollouts: RolloutPool, verifiers: VerifierPool, request: SampleRequest) -> None:
        self._rollouts, self._verifiers, self._request = rollouts, verifiers, request
        self._takes: dict[ray.ObjectRef, ActorHandle] = {}
        self._scores: dict[ray.ObjectRef, tuple[ActorHandle, Group]] = {}
        self.under_way = 0
        self.last_sampled: float | None = None

    def submit(self, prompts: list[Prompt]) -> None:
        """Hand prompts to the workers, and ask every worker that owes some for what it finishes."""
        self.under_way += len(prompts)
        self._send(prompts)

    def wait(self, deadline: Deadline, seconds: float | None = None) -> list[Group]:
        """Wait for the next news, at most `seconds`; the groups that have their verdicts with it, if any."""
        done: list[Group] = []
        for reference in self._next(deadline, seconds):
            if reference in self._takes:
                self._taken(reference)
            else:
                done += self._scored(reference)
        return done

    def _send(self, prompts: list[Prompt]) -> None:
        self._rollouts.submit(prompts, self._request)
        self._takes |= self._rollouts.take(besides=self._takes.values())

    def _taken(self, reference: ray.ObjectRef) -> None:
        """Groups that were sampled go to the verifiers; a lost worker's prompts go to others, with the same seeds."""
        worker = self._takes.pop(reference)
        try:
            (groups,) = wait_for([reference], READY_SECONDS, "A rollout worker (take)", OPTION)
        except ActorLost as error:
            self._send(self._rollouts.replaced(worker, error))
            return
        for group in self._rollouts.delivered(worker, groups):
            self._score(group)
        self.last_sampled = time.monotonic()
        if self._rollouts.owes(worker):
            self._takes[self._rollouts.take_from(worker)] = worker

    def _score(self, group: Group) -> None:
        reference, verifier = self._verifiers.score(group)
        self._scores[reference] = (verifier, group)

    def _scored(self, reference: ray.ObjectRef) -> list[Group]:
        verifier, group = self._scores.pop(reference)
        try:
            (answer,) = wait_for([reference], READY_SECONDS, "A verifier (score)", OPTION)
        except ActorLost as error:
            self._verifiers.replaced(verifier, error)
            self._score(group)
            return []
        self._verifiers.scored(verifier)
        self.under_way -= 1
        return [answer]

    def _next(self, deadline: Deadline, seconds: float | None) -> list[ray.ObjectRef]:
        timeout = deadline.left if seconds is None else min(seconds, deadline.left)
        ready, _ = ray.wait([*self._takes, *self._scores], num_returns=1, timeout=timeout)
        if not deadline.left or not (ready or seconds):
            who = "A rollout worker (sampling)" if self._takes else "A verifier (scoring)"
            raise RunError(late(who, deadline.seconds, OPTION))
        return ready
