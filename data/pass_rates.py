"""Measured pass rates: read from a file, put on the problems, and used to choose among them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data.errors import DatasetError
from data.escaping import excerpt
from data.records import Problem


@dataclass(frozen=True)
class Chosen:
    """The problems whose rate lies within the range, and how many were dropped: outside it, or not measured."""

    problems: list[Problem]
    outside: int
    unmeasured: int


def read_pass_rates(path: Path) -> dict[str, float]:
    """The pass rate in [0, 1] of each problem id; measured twice, the mean over all samples.

    path: JSONL, or a JSON list, of {"id", "pass_rate", "samples"}; more keys are welcome.
    Raises DatasetError naming the line.
    """
    right: dict[str, float] = {}
    total: dict[str, int] = {}
    for number, entry in enumerate(_entries(path), start=1):
        match entry:
            case {"id": str(identity), "pass_rate": float() | int() as rate, "samples": int(samples)} if (
                0 <= rate <= 1 and samples >= 1
            ):
                right[identity] = right.get(identity, 0.0) + rate * samples
                total[identity] = total.get(identity, 0) + samples
            case _:
                raise DatasetError(
                    f"Entry {number} of data.pass_rates={path} is no measured pass rate: {excerpt(json.dumps(entry))}. "
                    'It takes "id" (text), "pass_rate" (from 0 to 1) and "samples" (at least 1), as evaluate.py '
                    "--save-pass-rates writes them."
                )
    return {identity: right[identity] / total[identity] for identity in total}


def choose_by_pass_rate(problems: Sequence[Problem], rates: Mapping[str, float], low: float, high: float) -> Chosen:
    """The problems with a rate from low to high, carrying it; those without a measured rate are dropped.

    Raises DatasetError if none is left.
    """
    measured = [replace(problem, pass_rate=rates[problem.id]) for problem in problems if problem.id in rates]
    chosen = [problem for problem in measured if low <= rates[problem.id] <= high]
    if not chosen:
        raise DatasetError(
            f"Of {len(problems)} problems data.pass_rates measured {len(measured)}, and none of them within "
            f"data.pass_rate_range=[{low:g}, {high:g}]. Widen the range, or measure this dataset."
        )
    return Chosen(chosen, len(measured) - len(chosen), len(problems) - len(measured))


def _entries(path: Path) -> Iterator[object]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(
            f"data.pass_rates={path} cannot be read ({error}). Give the file that evaluate.py --save-pass-rates wrote."
        ) from error
    lines: Iterable[str] = [text] if path.suffix == ".json" else filter(str.strip, text.split("\n"))
    for line in lines:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DatasetError(f"data.pass_rates={path} is not JSON ({error}): {excerpt(line)}. Correct it.") from error
        yield from value if isinstance(value, list) else [value]
