"""ProRL's resets of the reference policy: when one is due, and where the models it became lie."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from configs.schema import Learner


class ReferenceResets:
    """Whether a reset is due after a step. `rewards` (mean rewards since the last reset) is all its state."""

    def __init__(self, learner: Learner, rewards: Iterable[float] = ()) -> None:
        self._kind = learner.reference_reset
        self._window = learner.reference_reset_steps
        self.rewards = list(rewards)

    def due(self, reward: float) -> bool:
        """Take in a step's mean reward; True makes the count start anew.

        interval: every `reference_reset_steps` steps. plateau: once the mean of so many steps is no
        better than that of as many before.
        """
        if self._kind == "never":
            return False
        self.rewards = [*self.rewards, reward][-2 * self._window :]
        if self._kind == "interval":
            due = len(self.rewards) == self._window
        else:
            before, latest = self.rewards[: -self._window], self.rewards[-self._window :]
            due = len(before) == self._window and sum(latest) <= sum(before)
        if due:
            self.rewards = []
        return due


class References:
    """The run's reference policies: the initial model, later the folders `references/step_NNNNNN`."""

    def __init__(self, folder: Path, initial: Path, current: str | None = None) -> None:
        self._folder = folder
        self._initial = initial
        self.current = current

    @property
    def path(self) -> Path:
        """Folder of the model that is the reference now."""
        return self._initial if self.current is None else self._folder / self.current

    def begin(self, step: int) -> Path:
        """The empty folder for the reference of a reset after `step`."""
        self.current = f"step_{step:06d}"
        if self.path.exists():  # of a run that was rewound
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True)
        return self.path

    def keep(self, names: Iterable[str | None]) -> None:
        """Delete all but the current reference and those named."""
        wanted = {self.current, *names}
        for path in self._folder.glob("step_*"):
            if path.name not in wanted:
                shutil.rmtree(path)
