"""The verifiers as one: a group goes to the one with the fewest waiting, and a lost one is replaced."""

from __future__ import annotations

from collections import Counter

import ray
from ray.actor import ActorHandle

from actors.crew import Crew
from actors.waiting import ActorLost, ask
from data.records import Group


class VerifierPool:
    """Verifiers, and how many groups each has before it."""

    def __init__(self, crew: Crew) -> None:
        self.crew = crew
        self._load: Counter[ActorHandle] = Counter()

    @property
    def verifiers(self) -> list[ActorHandle]:
        return self.crew.actors

    def score(self, group: Group) -> tuple[ray.ObjectRef, ActorHandle]:
        """Send a group to be scored; returns the reference and which verifier has it."""
        verifier = min(self.verifiers, key=lambda verifier: self._load[verifier])
        self._load[verifier] += 1
        return ask(verifier.score, group), verifier

    def scored(self, verifier: ActorHandle) -> None:
        self._load[verifier] -= 1

    def replaced(self, lost: ActorHandle, why: ActorLost) -> None:
        """Put another in the place of a verifier, if nobody has yet; its groups are to be scored again."""
        self.crew.replace([lost], str(why))
        self._load.pop(lost, None)
