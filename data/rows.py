"""Rows of a dataset made into problems: questions with their gold answers, bad rows named."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from data.errors import DatasetError
from data.escaping import escaped, excerpt
from data.golds import CheckGold, GoldRule, extract_gold, gold_fault
from data.hashing import question_id, stable_hash
from data.records import Problem

if TYPE_CHECKING:
    from datasets import Dataset

TEST_SHARE = 0.3  # of a table that holds both splits

Kind = Literal["math", "code"]
Split = Literal["train", "test"]
Cell = str | int | float | bool
Filters = Mapping[str, Cell | Sequence[Cell]]


@dataclass(frozen=True)
class Reading:
    """How rows become problems: the columns, the rule that finds the gold answer, and what kind of gold it is.

    demonstration: the column with completions to imitate. setup: of code, the column with what its tests import.
    filters: only rows with this value, or one of these values, in the column. part: of a table that holds
    both splits, the one that is taken: three rows of ten, by a hash of the question, are those to test with.
    """

    question: str = "question"
    answer: str = "answer"
    demonstration: str | None = None
    setup: str | None = None
    gold: GoldRule = "auto"
    kind: Kind = "math"
    filters: Filters = field(default_factory=dict)
    part: Split | None = None


@dataclass(frozen=True)
class BadRow:
    """A row (counted from 1) that is no problem: why, and the text at fault as a message shows it."""

    row: int
    reason: str
    shown: str

    def __str__(self) -> str:
        return f"row {self.row} ({self.reason}): {self.shown}"


def read_problems(
    table: Dataset, name: str, reading: Reading, check_gold: CheckGold | None = None
) -> tuple[list[Problem], list[BadRow]]:
    """(the problems, the bad rows) of a table, each in its order, duplicates included.

    A row is bad if a cell is empty, its gold answer is not found, or check_gold refuses it by a ValueError. Raises
    DatasetError where a column or every row is missing.
    """
    require_columns(table, name, reading)
    good: list[Problem] = []
    bad: list[BadRow] = []
    for number, row in enumerate(table, start=1):
        if not _wanted(row, reading):
            continue
        made = _problem(number, row, reading)
        if isinstance(made, Problem) and check_gold is not None:
            fault = gold_fault(made.answer, check_gold)
            made = made if fault is None else BadRow(number, fault, excerpt(made.answer))
        if isinstance(made, Problem):
            good.append(made)
        else:
            bad.append(made)
    if not good and not bad:
        raise DatasetError(f"No row of the dataset {name} passes data.filters. {_values(table, reading.filters)}")
    return good, bad


def require_columns(table: Dataset, name: str, reading: Reading) -> None:
    """Raises DatasetError, naming the columns there are, if one that `reading` names is missing, or all rows are."""
    for option in ("question", "answer", "demonstration", "setup"):
        column = getattr(reading, option)
        if column is not None and column not in table.column_names:
            raise DatasetError(
                f"The dataset {name} has no column {column!r}; it has {', '.join(map(repr, table.column_names))}. "
                f"Set data.{option}_column to the right one of these."
            )
    for column in reading.filters:
        if column not in table.column_names:
            raise DatasetError(
                f"The dataset {name} has no column {column!r}, which data.filters names; it has "
                f"{', '.join(map(repr, table.column_names))}. Filter by one of these."
            )
    if len(table) == 0:
        raise DatasetError(f"The dataset {name} has no rows. Choose another data.split or data.dataset.")


def refuse(name: str, bad: Sequence[BadRow]) -> None:
    """Raises DatasetError, naming the first few, if there are bad rows."""
    if bad:
        first = "; ".join(map(str, bad[:3]))
        raise DatasetError(
            f"The dataset {name} has {len(bad)} row{'s' if len(bad) > 1 else ''} that cannot be used: {first}. Correct "
            "or remove them, say where the questions and gold answers stand (data.question_column, data.answer_column, "
            "data.gold), or leave such rows out with data.unparsable_golds=drop."
        )


def _wanted(row: Mapping[str, Any], reading: Reading) -> bool:
    """Whether a row passes the filters and is of the part that is read."""
    for column, value in reading.filters.items():
        if row[column] not in ([value] if isinstance(value, Cell) else value):
            return False
    if reading.part is None:
        return True
    identity = question_id(_text(row[reading.question]))
    return (stable_hash("test split", identity) < TEST_SHARE * 2**64) == (reading.part == "test")


def _values(table: Dataset, filters: Filters) -> str:
    """What stands in the filtered columns, as the fix of a filter that nothing passes."""
    found = {column: list(dict.fromkeys(map(repr, table[column]))) for column in filters}
    texts = [f"{column} has {escaped(', '.join(values[:8]))[:200]}" for column, values in found.items()]
    return f"{'; '.join(texts)}. Filter by such values, written as they stand there (text in quotes)."


def _problem(number: int, row: Mapping[str, Any], reading: Reading) -> Problem | BadRow:
    for column, lists in ((reading.question, False), (reading.answer, True), (reading.demonstration, False)):
        if column is not None and (fault := _no_text(row[column], lists)):
            return BadRow(number, f"its {column!r} is {fault}", excerpt(str(row[column])))
    question = _text(row[reading.question]).strip()
    answer = _text(row[reading.answer])
    shown = None if reading.demonstration is None else _text(row[reading.demonstration])
    named = {reading.question: question, reading.answer: answer, reading.demonstration: shown}
    for column, cell in named.items():
        if cell is not None and not cell.strip():
            return BadRow(number, f"its {column!r} is empty", excerpt(question or answer))
    if reading.kind == "code":
        setup = "" if reading.setup is None else _text(row[reading.setup]).strip()
        return Problem(question_id(question), with_tests(question, answer), "\n".join(filter(None, (setup, answer))))
    try:
        gold = extract_gold(answer, reading.gold)
    except ValueError as error:
        return BadRow(number, f"no gold answer is found in its {reading.answer!r}: {error}", excerpt(answer))
    return Problem(question_id(question), question, gold, shown)


def with_tests(question: str, tests: str) -> str:
    """A programming task with the tests it does not show yet: they say what the function is called."""
    return question if tests in question else f"{question}\n\nThe code has to pass these tests:\n{tests}"


def _no_text(cell: object, lists: bool) -> str | None:
    """What a cell is that can be no text, in words. lists: one of texts may stand there."""
    if isinstance(cell, dict):
        return "an object and no text"
    if isinstance(cell, list):
        return None if lists and not any(isinstance(entry, dict | list) for entry in cell) else "a list and no text"
    return "no number" if isinstance(cell, float) and not math.isfinite(cell) else None


def _text(cell: object) -> str:
    """A cell as text; a list, such as the tests of a programming task, one entry a line."""
    if isinstance(cell, list):
        return "\n".join(map(str, cell))
    return "" if cell is None else str(cell)
