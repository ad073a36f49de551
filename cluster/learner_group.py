"""The learner ranks as one: every call goes to all of them, alike and in the same order."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayTaskError

from actors.crew import OPTION
from actors.waiting import ask, wait_for
from cluster.heartbeats import HEALTH
from configs.errors import RunError
from learner.alarms import NO_LIMITS, Limits
from learner.batching import Sequence
from learner.checkpoint_writer import FileFacts
from learner.rank import with_old_logprobs

ALIVE_SECONDS = 10.0


class LearnerLost(RunError):
    """A learner rank has died, and with it what the others hold is worth nothing: all go back to a checkpoint."""


class LearnerGroup:
    """Handles of the learner ranks. RunError, naming the call, when a deadline is missed."""

    def __init__(self, ranks: list[ActorHandle], deadline_seconds: float) -> None:
        self.ranks = ranks
        self._deadline_seconds = deadline_seconds
        self._lock = threading.Lock()

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """The answers of all ranks, in the order of ranks. LearnerLost if one has died."""
        with self._lock:  # whichever thread calls, all ranks get the calls in the same order
            references = [ask(getattr(rank, method), *arguments) for rank in self.ranks]
        return self._wait(references, f"A learner rank ({method})")

    def _wait(self, references: list[ray.ObjectRef], who: str) -> list[Any]:
        try:
            return wait_for(references, self._deadline_seconds, who, OPTION, lost=LearnerLost)
        except RayTaskError:
            self.check_alive()  # the others fail, each in its own way, when one leaves them in a collective
            raise

    def check_alive(self) -> None:
        """LearnerLost if a rank has died; whether one is frozen is for its heartbeats to find."""
        references = [ask(rank.heartbeat.options(concurrency_group=HEALTH)) for rank in self.ranks]
        answered, _ = ray.wait(references, num_returns=len(references), timeout=ALIVE_SECONDS)
        wait_for(answered, ALIVE_SECONDS, "A learner rank (heartbeat)", OPTION, lost=LearnerLost)

    def update(self, sequences: list[Sequence], on_policy: bool, limits: Limits = NO_LIMITS) -> dict[str, float]:
        """One optimizer step on one update batch; its metrics."""
        return self.call("update", ray.put(sequences), on_policy, limits)[0]

    def with_old_logprobs(self, sequences: list[Sequence]) -> list[Sequence]:
        """pi_old for several updates per sampling batch: one pass without gradient, before the first."""
        answers = [pair for share in self.call("logprobs", ray.put(sequences)) for pair in share]
        return with_old_logprobs(sequences, answers)

    def sync_weights(self) -> dict[str, float]:
        """Push the weights to the rollout workers; metrics: seconds of the parts of it."""
        return {f"time/sync_{part}": seconds for part, seconds in self.call("sync_weights")[0].items()}

    def reset_reference(self, folder: Path) -> None:
        """Make the current policy the reference; its model is written to `folder`."""
        self.call("reset_reference", folder)

    def begin_save(self, folder: Path) -> None:
        """Have the state as it is now written to `folder` in the background."""
        self.call("begin_save", folder)

    def saved(self, wait: bool) -> dict[str, FileFacts] | None:
        """What the ranks have written, by path in the checkpoint's folder; None as long as one is still writing, which
        `wait` waits for. Raises what writing raised."""
        written = self.call("saved", wait)
        return None if None in written else {name: facts for each in written for name, facts in each.items()}
