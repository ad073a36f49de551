"""The verifiers as one: every group goes to the verifier with the least to do."""

from __future__ import annotations

import ray
from ray.actor import ActorHandle

from data.records import Group


class VerifierPool:
    """Handles of verifiers, and how many groups each has before it."""

    def __init__(self, verifiers: list[ActorHandle]) -> None:
        self.verifiers = verifiers
        self._load = [0] * len(verifiers)

    def score(self, group: Group) -> tuple[ray.ObjectRef, int]:
        """Send a group to be scored; returns the reference and which verifier has it."""
        verifier = self._load.index(min(self._load))
        self._load[verifier] += 1
        return self.verifiers[verifier].score.remote(group), verifier

    def scored(self, verifier: int) -> None:
        self._load[verifier] -= 1
