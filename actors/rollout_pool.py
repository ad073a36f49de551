"""The rollout workers as one: prompts go to the least loaded, control calls go to all."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

import ray
from ray.actor import ActorHandle

from actors.rollout_worker import SampleRequest
from actors.waiting import wait_for
from data.records import Group, Prompt

TAKE_SECONDS = 5.0


class RolloutPool:
    """Handles of rollout workers, and how many prompts each still owes."""

    def __init__(self, workers: list[ActorHandle], deadline_seconds: float) -> None:
        self.workers = workers
        self._deadline_seconds = deadline_seconds
        self._owed = dict.fromkeys(range(len(workers)), 0)

    def submit(self, prompts: list[Prompt], request: SampleRequest) -> None:
        """Hand every prompt to the worker that owes least."""
        shares: dict[int, list[Prompt]] = {}
        for prompt in prompts:
            worker = min(self._owed, key=lambda index: self._owed[index])
            shares.setdefault(worker, []).append(prompt)
            self._owed[worker] += 1
        self._all([self.workers[w].submit.remote(share, request) for w, share in shares.items()], "submit")

    def take(self, besides: Collection[int] = ()) -> dict[ray.ObjectRef, int]:
        """One pending `take` of every worker that owes prompts, but for those `besides`: reference -> worker."""
        return {self.take_from(worker): worker for worker, owed in self._owed.items() if owed and worker not in besides}

    def take_from(self, worker: int) -> ray.ObjectRef:
        return self.workers[worker].take.remote(TAKE_SECONDS)

    def delivered(self, worker: int, groups: int) -> bool:
        """Note that a worker has delivered groups; True while it owes more."""
        self._owed[worker] -= groups
        return self._owed[worker] > 0

    def begin_probe(self, prompt: Prompt, request: SampleRequest) -> list[ray.ObjectRef]:
        """Every worker samples one completion of this prompt with the weights it has now; `probed` waits for them."""
        return [worker.probe.remote(prompt, request) for worker in self.workers]

    def probed(self, references: list[ray.ObjectRef]) -> list[Group]:
        return self._all(references, "probe")

    def weight_transfer(self, call: str, arguments: dict[str, Any] | list[dict[str, Any]]) -> list[dict[str, float]]:
        """Run a weight-transfer call on every worker and wait for all answers. A list has arguments for each."""
        each = arguments if isinstance(arguments, list) else [arguments] * len(self.workers)
        pairs = zip(self.workers, each, strict=True)
        return self._all([worker.weight_transfer.remote(call, own) for worker, own in pairs], call)

    def sleep(self) -> None:
        """Have every worker free its GPU for the learner; on a CPU nothing."""
        self._all([worker.sleep.remote() for worker in self.workers], "sleep")

    def wake_up(self, what: Literal["weights", "kv_cache"]) -> None:
        """Weights before a weight update, the cache before sampling."""
        self._all([worker.wake_up.remote(what) for worker in self.workers], "wake up")

    def _all(self, references: list[ray.ObjectRef], what: str) -> list[Any]:
        return wait_for(references, self._deadline_seconds, f"A rollout worker ({what})", "cluster.deadline_seconds")
