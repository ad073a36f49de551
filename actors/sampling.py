"""Sample and verify: prompts in, groups with verdicts out, in visit order."""

from __future__ import annotations

import time
from dataclasses import dataclass

import ray

from actors.rollout_pool import RolloutPool
from actors.rollout_worker import SampleRequest
from actors.verifier_pool import VerifierPool
from actors.waiting import Deadline, late, wait_for
from configs.errors import RunError
from data.records import Group, Prompt

OPTION = "rollout.deadline_seconds"


@dataclass(frozen=True)
class Sampled:
    """Groups in visit order; seconds until the last was sampled, and from then until the last verdict."""

    groups: list[Group]
    sample_seconds: float
    verify_seconds: float

    def __add__(self, later: Sampled) -> Sampled:
        return Sampled(
            self.groups + later.groups,
            self.sample_seconds + later.sample_seconds,
            self.verify_seconds + later.verify_seconds,
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
    rollouts.submit(prompts, request)
    takes = rollouts.take()
    scores: dict[ray.ObjectRef, int] = {}
    done: list[Group] = []
    last_sampled = started
    while takes or scores:
        for reference in _next([*takes, *scores], deadline, bool(takes)):
            (answer,) = wait_for([reference], deadline.left, "A rollout worker or verifier", OPTION)
            if reference in scores:
                verifiers.scored(scores.pop(reference))
                done.append(answer)
                continue
            worker = takes.pop(reference)
            scores.update(verifiers.score(group) for group in answer)
            last_sampled = time.monotonic()
            if rollouts.delivered(worker, len(answer)):
                takes[rollouts.take_from(worker)] = worker
    done.sort(key=lambda group: group.prompt.visit)
    return Sampled(done, last_sampled - started, time.monotonic() - last_sampled)


def _next(references: list[ray.ObjectRef], deadline: Deadline, sampling: bool) -> list[ray.ObjectRef]:
    ready, _ = ray.wait(references, num_returns=1, timeout=deadline.left)
    if not ready or not deadline.left:
        who = "A rollout worker (sampling)" if sampling else "A verifier (scoring)"
        raise RunError(late(who, deadline.seconds, OPTION))
    return ready
