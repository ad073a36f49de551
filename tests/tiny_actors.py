"""Actors that stand where the real ones do, for tests of who is replaced when."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import ray
from ray.actor import ActorHandle

from actors.rollout_worker import SampleRequest
from data.records import Completion, Group, Prompt

NOTHING = np.zeros(1, np.int32)
COMPLETION = Completion(0, 0, NOTHING, NOTHING.astype(np.float32), NOTHING, "<answer>7</answer>", "stop")


class Tiny:
    """Stands where a rollout worker or a verifier does; `deadly` visits kill it, once if a folder remembers them."""

    def __init__(self, deadly: tuple[int, ...] = (), once: Path | None = None) -> None:
        self._deadly, self._once = deadly, once
        self._prompts: list[Prompt] = []

    def ready(self) -> int:
        return os.getpid()

    def heartbeat(self) -> None:
        """Nothing."""

    def submit(self, prompts: list[Prompt], request: SampleRequest) -> None:
        self._prompts += prompts

    def take(self, seconds: float) -> list[Group]:
        time.sleep(0.01)
        return [Group(self._alive(self._prompts.pop(0)), (COMPLETION,))] if self._prompts else []

    def score(self, group: Group) -> Group:
        self._alive(group.prompt)
        return group

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def _alive(self, prompt: Prompt) -> Prompt:
        mark = self._once and self._once / str(prompt.visit)
        if prompt.visit in self._deadly and not (mark and mark.exists()):
            if mark:
                mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return prompt


class Collective:
    """A rank that waits for another, and fails in its own way when that one dies."""

    def heartbeat(self) -> None:
        """Nothing."""

    def update(self, other: list[ActorHandle]) -> None:
        try:
            ray.get(other[0].sleep.remote(60), timeout=60) if other else time.sleep(60)
        except ray.exceptions.RayActorError:
            raise RuntimeError("connection closed by peer") from None
