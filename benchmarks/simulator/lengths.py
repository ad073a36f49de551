"""How long the completions of a group come out: drawn from recorded groups, or from a truncated log-normal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Protocol


class Lengths(Protocol):
    """`draw(chance, size)`: the tokens of each of a group's completions, at least 1 and at most `limit`."""

    @property
    def limit(self) -> int: ...

    def draw(self, chance: Random, size: int) -> list[int]: ...


@dataclass(frozen=True)
class Recorded:
    """Lengths out of recorded groups: a group's are drawn from one of them, as the completions of a prompt are alike.

    No groups: what is yet to be measured, of which only the limit is known.
    """

    groups: Sequence[Sequence[int]]
    limit: int

    def draw(self, chance: Random, size: int) -> list[int]:
        return [min(length, self.limit) for length in chance.choices(chance.choice(self.groups), k=size)]


@dataclass(frozen=True)
class LogNormal:
    """median in tokens, sigma of the logarithm (0: all alike), truncated at `limit`; completions are independent."""

    median: float
    sigma: float
    limit: int

    def draw(self, chance: Random, size: int) -> list[int]:
        drawn = [chance.lognormvariate(math.log(self.median), self.sigma) for _ in range(size)]
        return [max(1, min(self.limit, round(length))) for length in drawn]
