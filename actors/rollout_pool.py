"""The rollout workers as one: prompts go to the least loaded, control calls go to all, and a lost one is replaced."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import ray
from ray.actor import ActorHandle

from actors.crew import OPTION, Crew
from actors.rollout_worker import SampleRequest
from actors.waiting import ActorLost, ask, wait_for
from data.records import Group, Prompt

TAKE_SECONDS = 5.0
Seconds = dict[str, float]


@dataclass(frozen=True)
class Probes:
    """One short completion of each worker, under way: what was asked, of whom."""

    prompt: Prompt
    request: SampleRequest
    asked: dict[ActorHandle, ray.ObjectRef]


@dataclass(frozen=True)
class WorkerCalls:
    """The workers as a weight sender, in another process, calls them."""

    workers: list[ActorHandle]
    deadline_seconds: float

    def weight_transfer(self, call: str, arguments: dict[str, Any] | list[dict[str, Any]]) -> list[dict[str, float]]:
        """Run a weight-transfer call on every worker and wait for all answers. A list has arguments for each.

        ActorLost if one cannot answer any more: the update is then half done everywhere.
        """
        each = arguments if isinstance(arguments, list) else [arguments] * len(self.workers)
        asked = [ask(w.weight_transfer, call, own) for w, own in zip(self.workers, each, strict=True)]
        return wait_for(asked, self.deadline_seconds, f"A rollout worker ({call})", OPTION)


class RolloutPool:
    """Rollout workers, and the prompts each still owes.

    renew: gives workers that were replaced the current weights, and all others with them; seconds of its parts.
    """

    def __init__(self, crew: Crew) -> None:
        self.crew = crew
        self.renew: Callable[[], Seconds] = dict
        self._owed: dict[ActorHandle, dict[int, Prompt]] = {worker: {} for worker in crew.actors}

    @property
    def workers(self) -> list[ActorHandle]:
        return self.crew.actors

    def calls(self) -> WorkerCalls:
        return WorkerCalls(list(self.workers), self.crew.deadline_seconds)

    # -- sampling ---------------------------------------------------------------------------------

    def submit(self, prompts: Sequence[Prompt], request: SampleRequest) -> None:
        """Hand every prompt to the worker that owes least."""
        while prompts:
            asked = {w: ask(w.submit, share, request) for w, share in self._shared_out(prompts).items()}
            lost = {worker: error for worker, error in self._answers(asked, "submit") if isinstance(error, ActorLost)}
            prompts = [prompt for worker, error in lost.items() for prompt in self.replaced(worker, error)]

    def take(self, besides: Collection[ActorHandle] = ()) -> dict[ray.ObjectRef, ActorHandle]:
        """One pending `take` of every worker that owes prompts, but for those `besides`: reference -> worker."""
        return {self.take_from(w): w for w in self.workers if self.owes(w) and w not in besides}

    def take_from(self, worker: ActorHandle) -> ray.ObjectRef:
        return ask(worker.take, TAKE_SECONDS)

    def delivered(self, worker: ActorHandle, groups: list[Group]) -> list[Group]:
        """Note that a worker has delivered groups; those that it owed."""
        owed = self._owed.get(worker, {})
        return [group for group in groups if owed.pop(group.prompt.visit, None) is not None]

    def owes(self, worker: ActorHandle) -> bool:
        return bool(self._owed.get(worker))

    def _shared_out(self, prompts: Sequence[Prompt]) -> dict[ActorHandle, list[Prompt]]:
        shares: dict[ActorHandle, list[Prompt]] = {}
        with self.crew.lock:
            for prompt in prompts:
                worker = min(self.workers, key=lambda worker: len(self._owed[worker]))
                shares.setdefault(worker, []).append(prompt)
                self._owed[worker][prompt.visit] = prompt
        return shares

    # -- lost and replaced ------------------------------------------------------------------------

    def replaced(self, lost: ActorHandle, why: ActorLost) -> list[Prompt]:
        """Put another in the place of a worker, if nobody has yet; the prompts that are to be sent out again."""
        self._replace([lost], why)
        return list(self._owed.pop(lost, {}).values())

    def push(self, send: Callable[[], Seconds]) -> Seconds:
        """Have new weights sent to all; if that breaks off, all workers are replaced and get them then."""
        with self.crew.lock:
            try:
                return send()
            except ActorLost as error:
                return self._replace(list(self.workers), error)

    def _replace(self, lost: list[ActorHandle], why: ActorLost) -> Seconds:
        with self.crew.lock:
            while self.crew.replace(lost, str(why)):
                for worker in self.workers:
                    self._owed.setdefault(worker, {})
                try:
                    return self.renew()
                except ActorLost as error:  # a push that broke off leaves half of the weights everywhere
                    lost, why = list(self.workers), error
        return {}

    # -- control ----------------------------------------------------------------------------------

    def begin_probe(self, prompt: Prompt, request: SampleRequest) -> Probes:
        """Every worker samples one completion of this prompt with the weights it has now; `probed` waits for them."""
        return Probes(prompt, request, {worker: ask(worker.probe, prompt, request) for worker in self.workers})

    def probed(self, probes: Probes) -> list[Group]:
        """What they sampled; workers replaced meanwhile are asked too."""
        while True:
            answers = dict(self._answers(probes.asked, "probe"))
            for worker, answer in answers.items():
                if isinstance(answer, ActorLost):
                    self._replace([worker], answer)
            if all(worker in answers for worker in self.workers):
                return [answers[worker] for worker in self.workers]
            probes = self.begin_probe(probes.prompt, probes.request)

    def sleep(self) -> None:
        """Have every worker free its GPU for the learner; on a CPU nothing."""
        self._all(lambda worker: ask(worker.sleep), "sleep")

    def wake_up(self, what: Literal["weights", "kv_cache"]) -> None:
        """Weights before a weight update, the cache before sampling."""
        self._all(lambda worker: ask(worker.wake_up, what), "wake up")

    def _all(self, call: Callable[[ActorHandle], ray.ObjectRef], what: str) -> None:
        """Every worker does it, also those that come in the place of one that was lost doing it."""
        done: set[ActorHandle] = set()
        while missing := [worker for worker in self.workers if worker not in done]:
            for worker, answer in self._answers({worker: call(worker) for worker in missing}, what):
                if isinstance(answer, ActorLost):
                    self._replace([worker], answer)
            done.update(missing)

    def _answers(self, asked: dict[ActorHandle, ray.ObjectRef], what: str) -> list[tuple[ActorHandle, Any]]:
        """Each worker with its answer, or with the ActorLost that is in its place."""
        return [(worker, self._answer(reference, what)) for worker, reference in asked.items()]

    def _answer(self, reference: ray.ObjectRef, what: str) -> Any:
        try:
            return wait_for([reference], self.crew.deadline_seconds, f"A rollout worker ({what})", OPTION)[0]
        except ActorLost as error:
            return error
