"""What a stage is made of: parts, each run in a process of its own, and the rows that they give its table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, TypeVar

from actors.engine import Device

Value = TypeVar("Value")


class Bounds(TypedDict):
    """A goal: at least, at most, between the two, or none."""

    least: float | None
    most: float | None


@dataclass(frozen=True)
class Setting:
    """Where a part runs, and how large. tiny: toy sizes, at which the same code runs on a CPU in a test.

    models: the folder in which models that were made are kept for the next part.
    """

    device: Device
    tiny: bool
    models: Path

    def size(self, real: Value, tiny: Value) -> Value:
        """One of the two."""
        return tiny if self.tiny else real

    def goal(self, least: float | None = None, most: float | None = None) -> Bounds:
        """A goal that was set for one H100: none on a CPU, and none at toy sizes."""
        real = self.device == "cuda" and not self.tiny
        return Bounds(least=least if real else None, most=most if real else None)


@dataclass(frozen=True)
class Row:
    """A line of a stage's table: a figure in `unit`, beside its goal if it has one; or words in a figure's place."""

    what: str
    value: float | str
    unit: str = ""
    least: float | None = None
    most: float | None = None

    @property
    def measured(self) -> str:
        return self.value if isinstance(self.value, str) else f"{self.value:.4g} {self.unit}".strip()

    @property
    def goal(self) -> str:
        if self.least is not None and self.most is not None:
            return f"{self.least:g} to {self.most:g}"
        if self.least is not None:
            return f"at least {self.least:g}"
        return "" if self.most is None else f"at most {self.most:g}"

    @property
    def judgement(self) -> str:
        """`met`, `missed`, or nothing where there is no goal; what is no number meets none."""
        if not self.goal:
            return ""
        if isinstance(self.value, str):
            return "not measured"
        above = self.least is None or self.value >= self.least
        below = self.most is None or self.value <= self.most
        return "met" if above and below else "missed"


@dataclass(frozen=True)
class Part:
    """Something a stage measures. run: gives its rows, one by one if it is long. seconds: after so many it is ended."""

    name: str
    run: Callable[[Setting], Iterable[Row]]
    seconds: float


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = ["| what | measured | goal | |", "|---|---|---|---|"]
    cells = ((row.what, row.measured, row.goal, row.judgement) for row in rows)
    return "\n".join([*lines, *(f"| {' | '.join(cell.replace('|', '/') for cell in each)} |" for each in cells)])
