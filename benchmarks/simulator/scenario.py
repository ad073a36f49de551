"""What a simulated run consists of, and what came out of it."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

from benchmarks.simulator.lengths import Lengths


@dataclass(frozen=True)
class Scenario:
    """What runs; the words are the options'. cores: CPU cores that all threads share; None: a device for each.

    endless: no run ends after these steps, so sampling ahead does not run dry towards the last of them.
    """

    lengths: Lengths
    prompts_per_batch: int
    completions_per_prompt: int
    max_running: int = 256
    max_staleness: int = 0
    workers: int = 1
    ranks: int = 1
    verifiers: int = 1
    prompt_tokens: float = 0.0
    cores: int | None = None
    steps: int = 12
    seed: int = 0
    endless: bool = False


@dataclass(frozen=True)
class Step:
    """A step's seconds by phase, its visits in the order of training, and how stale each one's oldest token was."""

    wait: float
    update: float
    sync: float
    seconds: float
    visits: tuple[int, ...]
    staleness: tuple[int, ...]
    tokens: int


@dataclass(frozen=True)
class Outcome:
    """All steps, and the share of the time in which each side was busy (of several, on average)."""

    steps: tuple[Step, ...]
    busy: dict[str, float]

    def steady(self, skip: int) -> tuple[Step, ...]:
        return self.steps[skip:]

    def step_seconds(self, skip: int) -> float:
        """Mean seconds of a step after the first `skip`."""
        return fmean(step.seconds for step in self.steady(skip))
