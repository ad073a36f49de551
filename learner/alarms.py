"""The guards that saw their fault in one batch, what is done about it, and the limits they hold an update to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from configs.errors import RunError
from configs.schema import GuardAction

PREFIX = "guard/"


@dataclass(frozen=True)
class Limits:
    """Largest norm of an update's gradient, smallest mean entropy of its tokens (nats)."""

    grad_norm: float = math.inf
    entropy: float = 0.0


NO_LIMITS = Limits()


class Alarms:
    """The guards that fired over one batch. skip: whether one of them wants no optimizer step on it."""

    def __init__(self, actions: Mapping[str, GuardAction]) -> None:
        self._actions = actions
        self.skip = False
        self.metrics: dict[str, float] = {}

    def raised(self, guard: str, fault: str) -> None:
        """A guard saw its fault, told in `fault`: RunError if it stops the run."""
        if self._actions[guard] == "stop":
            raise RunError(f"{fault} The run stopped by training.guards.{guard}=stop.")
        self.metrics[PREFIX + guard] = 1.0
        self.skip |= self._actions[guard] == "skip"

    def highest_norm(self, limits: Limits) -> float:
        """The largest norm of a gradient that may still be stepped with; none may if the batch is skipped."""
        if self.skip:
            return -math.inf
        return math.inf if self._actions["grad_norm"] == "warn" else limits.grad_norm
