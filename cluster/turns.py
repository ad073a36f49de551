"""Who has the GPU when both sides share it: the one that does not work gives its memory to the other.

On a CPU, and with GPUs of their own, nobody has to step aside.
"""

from __future__ import annotations

from typing import Any, Protocol


class Sampling(Protocol):
    """What turns need of the rollout workers."""

    def sleep(self) -> None: ...

    def wake_up(self, what: Any) -> None: ...


class Learning(Protocol):
    """What turns need of the learner ranks."""

    def call(self, method: str) -> Any: ...


class Turns:
    """`learning`, then `pushing` if there is something to push, then `sampling`. shared: whether GPUs are."""

    def __init__(self, rollouts: Sampling, learner: Learning, shared: bool) -> None:
        self._rollouts, self._learner, self._shared = rollouts, learner, shared
        self._asleep: list[str] = []
        self._optimizer_here = True

    def learning(self) -> None:
        """Rollout workers sleep, weights and cache; the optimizer is back on the GPU."""
        if self._shared:
            self._rollouts.sleep()
            self._asleep = ["weights", "kv_cache"]
            self._learner.call("wake")
            self._optimizer_here = True

    def pushing(self) -> None:
        """The optimizer has left; the rollout workers' weights are on the GPU, to be replaced, their cache not yet."""
        if self._shared and self._optimizer_here:
            self._learner.call("sleep")
            self._optimizer_here = False
        self._wake("weights")

    def sampling(self) -> None:
        """Rollout workers are wholly awake."""
        self.pushing()
        self._wake("kv_cache")

    def _wake(self, what: str) -> None:
        if what in self._asleep:
            self._rollouts.wake_up(what)
            self._asleep.remove(what)
