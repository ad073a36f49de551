"""Rewards by name, and the records they work on: a case, its judgement, its score.

A completion is judged once (accuracy.judge finds its outcome); every reward is then a plain float
function of the case and that judgement. Rewards do bounded string work only, so they may run
anywhere; whatever can hang or blow up belongs to the judgement, which runs in a killable child.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

Outcome = Literal["correct", "wrong", "unparsable", "timeout", "error"]


@dataclass(frozen=True)
class Tags:
    """Names of the tags around the reasoning and around the answer, without angle brackets."""

    reasoning: str = "think"
    answer: str = "answer"


@dataclass(frozen=True)
class Length:
    """How long a completion is: `tokens`, EOS included, of at most `limit`, the last `buffer` of them unwelcome."""

    tokens: int
    limit: int
    buffer: int


@dataclass(frozen=True)
class Case:
    """One completion's text to be scored against the gold answer of its problem.

    strict: only a tagged or boxed answer counts, never the last number of the text. length: None where
    a text was not sampled; the judgement does not look at it.
    """

    text: str
    gold: str
    tags: Tags = field(default_factory=Tags)
    strict: bool = False
    length: Length | None = None


@dataclass(frozen=True)
class Judgement:
    """How the answer compares with the gold one; `extracted` is the answer found, if any."""

    outcome: Outcome
    extracted: str | None


@dataclass(frozen=True)
class Score:
    """Unweighted rewards by name, their weighted sum, and the judgement they rest on."""

    rewards: dict[str, float]
    total: float
    outcome: Outcome
    extracted: str | None


Reward = Callable[[Case, Judgement], float]
REWARDS: dict[str, Reward] = {}


def reward(name: str) -> Callable[[Reward], Reward]:
    """Register a reward function under `name`. ValueError if the name is taken."""

    def register(function: Reward) -> Reward:
        if name in REWARDS:
            raise ValueError(f"a reward named {name!r} is registered already; choose another name")
        REWARDS[name] = function
        return function

    return register


def check_weights(weights: Mapping[str, float]) -> None:
    """ValueError, naming the nearest registered reward, if a weight's name is unknown."""
    for name in weights:
        if name not in REWARDS:
            near = difflib.get_close_matches(name, REWARDS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(sorted(REWARDS))}"
            raise ValueError(f"rewards.weights: there is no reward named {name!r}; {hint}")


def weigh(case: Case, judgement: Judgement, weights: Mapping[str, float]) -> Score:
    """Every reward named in `weights`, and their weighted sum. The order of `weights` is kept."""
    rewards = {name: float(REWARDS[name](case, judgement)) for name in weights}
    total = sum(weights[name] * value for name, value in rewards.items())
    return Score(rewards, float(total), judgement.outcome, judgement.extracted)
