"""Problems from a file, the hub or the arithmetic generator, checked as they load."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from logging import CRITICAL
from pathlib import Path
from typing import TYPE_CHECKING

from data.arithmetic import generate
from data.errors import DatasetError
from data.hashing import question_id, stable_hash
from data.records import Problem

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["DatasetError", "check_golds", "load_problems", "split_held_out"]

ARITHMETIC = "arithmetic"
FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def load_problems(
    dataset: str,
    split: str = "train",
    question_column: str = "question",
    answer_column: str = "answer",
    count: int = 4096,
    seed: int = 0,
    operands: int = 2,
    digits: int = 2,
    operators: str = "+-",
    demonstration_column: str | None = None,
) -> list[Problem]:
    """The problems of a dataset, in its order, duplicates included.

    dataset: "arithmetic", a .jsonl, .json or .parquet file, or a hub name ("owner/name", or
    "owner/name:config"). split counts for the hub; count, seed, operands, digits and operators for
    "arithmetic" alone: of files and the hub every row is taken. demonstration_column: read, too, from
    a file or the hub.
    Raises DatasetError for whatever stands in the way, naming file, row and column.
    """
    if dataset == ARITHMETIC:
        return generate(count, seed, operands, digits, operators)
    path = Path(dataset).expanduser()
    if path.suffix in FORMATS or path.exists() or dataset.startswith((".", "/", "~")):
        rows = _read_file(path)
    else:
        rows = _read_hub(dataset, split)
    return _problems(rows, dataset, question_column, answer_column, demonstration_column)


def check_golds(problems: Sequence[Problem], parse_gold: Callable[[str], object]) -> None:
    """Refuses gold answers that cannot be scored, before anything is sampled.

    parse_gold says "cannot be parsed" by ValueError, None, False or an empty list.
    Raises DatasetError naming the first such row (from 1) and its gold.
    """
    for row, problem in enumerate(problems, start=1):
        reason = ""
        try:
            parsed = parse_gold(problem.answer)
        except ValueError as error:
            parsed, reason = None, f" ({error})"
        if parsed is None or parsed is False or parsed == []:
            raise DatasetError(
                f"The gold answer of row {row} of {len(problems)} cannot be parsed{reason}: {problem.answer!r}, "
                f"for the question {_short(problem.question)!r}. Correct or remove that row, or name the column "
                "with the short final answers in data.answer_column."
            )


def split_held_out(problems: Sequence[Problem], held_out: int, seed: int) -> tuple[list[Problem], list[Problem]]:
    """(training problems, `held_out` held-out problems), disjoint by id, each in the given order.

    Which questions are held out hangs on (seed, id) alone. Of a question that stands there twice
    either all copies are trained on, or one is held out and the others are left out.
    Raises DatasetError if no training problem would remain.
    """
    first = {problem.id: problem for problem in reversed(problems)}
    if len(first) <= held_out:
        raise DatasetError(
            f"{held_out} problems are to be held out, but there are only {len(first)} different ones, and at least "
            "one must be left to train on. Lower data.held_out_problems or give a larger data.dataset."
        )
    chosen = set(sorted(first, key=lambda identity: (stable_hash("held out", seed, identity), identity))[:held_out])
    train = [problem for problem in problems if problem.id not in chosen]
    kept = [problem for problem in problems if problem.id in chosen and first[problem.id] is problem]
    return train, kept


def _read_file(path: Path) -> Dataset:
    """Every row of a local JSON, JSONL or Parquet file."""
    if path.suffix not in FORMATS:
        raise DatasetError(
            f"The dataset {path} is not a file that can be read: its name must end in {', '.join(FORMATS)}. "
            "Give such a file, or a dataset's name on the hub, in data.dataset."
        )
    if not path.is_file():
        raise DatasetError(
            f"The dataset {path} does not exist or is no file (looked for {path.resolve()}). Correct data.dataset; "
            "a relative path counts from the folder the command is started in."
        )
    if _is_blank(path):
        raise DatasetError(f"The dataset {path} is empty. Put at least one problem a line into it.")
    from datasets import Dataset, load_dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        with _quiet_datasets():
            rows = load_dataset(FORMATS[path.suffix], data_files=str(path), split="train")
    except (DatasetGenerationError, ValueError, OSError) as error:  # ArrowInvalid is a ValueError
        cause = _bad_json_line(path) if path.suffix == ".jsonl" else None
        raise DatasetError(
            f"The dataset {path} cannot be read as {FORMATS[path.suffix]}: {cause or _root_cause(error)}. Correct "
            "that, or write the file anew; JSONL has one JSON object with the same columns in every line."
        ) from error
    assert isinstance(rows, Dataset)
    return rows


def _read_hub(dataset: str, split: str) -> Dataset:
    """Every row of one split of "owner/name" or "owner/name:config" on the Hugging Face hub."""
    from datasets import load_dataset

    name, _, config = dataset.partition(":")
    try:
        return load_dataset(name, config or None, split=split)
    except (ValueError, OSError, RuntimeError) as error:  # no such name, split or config; no network
        raise DatasetError(
            f"The dataset {dataset!r} (split {split!r}) could not be loaded from the Hugging Face hub: "
            f"{_root_cause(error)}. Check the name, the split (data.split) and the network; a config is given as "
            "'owner/name:config', and a local file must end in .jsonl, .json or .parquet."
        ) from error


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Keeps the library from logging, beside our error, what our error says, and from showing bars."""
    from datasets import disable_progress_bars, enable_progress_bars
    from datasets.utils.logging import get_verbosity, set_verbosity

    verbosity = get_verbosity()
    disable_progress_bars()
    set_verbosity(CRITICAL)
    try:
        yield
    finally:
        set_verbosity(verbosity)
        enable_progress_bars()


def _problems(
    rows: Dataset, dataset: str, question_column: str, answer_column: str, demonstration_column: str | None
) -> list[Problem]:
    """The rows as problems; a missing column or an empty cell is a DatasetError."""
    columns = {"question": question_column, "answer": answer_column, "demonstration": demonstration_column}
    for field, column in columns.items():
        if column is not None and column not in rows.column_names:
            raise DatasetError(
                f"The dataset {dataset} has no column {column!r}; it has {', '.join(map(repr, rows.column_names))}. "
                f"Set data.{field}_column to the right one of these."
            )
    if len(rows) == 0:
        raise DatasetError(f"The dataset {dataset} has no rows. Choose another data.split or data.dataset.")
    read = {field: _cells(rows, dataset, column) for field, column in columns.items() if column is not None}
    demonstrations = read.get("demonstration", [None] * len(rows))
    return [
        Problem(question_id(question.strip()), question.strip(), answer.strip(), demonstration)
        for question, answer, demonstration in zip(read["question"], read["answer"], demonstrations, strict=True)
    ]


def _cells(rows: Dataset, dataset: str, column: str) -> list[str]:
    """A column as text, one cell a row."""
    cells = ["" if value is None else str(value) for value in rows[column]]
    for row, cell in enumerate(cells, start=1):
        if not cell.strip():
            raise DatasetError(
                f"Row {row} of the dataset {dataset} has an empty {column!r}. Fill it in or remove the row."
            )
    return cells


def _is_blank(path: Path) -> bool:
    with path.open("rb") as file:
        return not any(line.strip() for line in file)


def _bad_json_line(path: Path) -> str | None:
    """The first line of a JSONL file that is no JSON object, in words."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                value = json.loads(line) if line.strip() else {}
            except ValueError as error:  # also bytes that are no UTF-8
                return f"line {number} is not JSON ({error}): {_short(line.decode(errors='replace'))!r}"
            if not isinstance(value, dict):
                return f"line {number} is no JSON object: {_short(line.decode(errors='replace'))!r}"
    return None


def _root_cause(error: BaseException) -> str:
    """The innermost error's text, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return _short(" ".join(f"{type(error).__name__}: {error}".split()), 300).rstrip(".")


def _short(text: str, limit: int = 80) -> str:
    text = text.strip()
    return text if len(text) <= limit else text[: limit - 1] + "…"
