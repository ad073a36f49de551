"""Gold answers: how the short answer is found in a dataset's cell, and whether it can be scored."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal

from data.escaping import excerpt

GoldRule = Literal["auto", "whole", "hashes", "boxed", "last_number"]
CheckGold = Callable[[str], object]  # raises a ValueError that says why one cannot be scored

_HASHES = "####"
_BOXED = re.compile(r"\\f?boxed\s*(?=\{)")
_NUMBER = re.compile(r"(?<![\w.])-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?")


def extract_gold(cell: str, rule: GoldRule) -> str:
    r"""The gold answer in a cell, stripped.

    whole: the cell as it stands. hashes: what follows the last `####`, without thousands commas
    (GSM8K). boxed: what the last `\boxed{...}` holds (MATH). last_number: the last number.
    auto: hashes if the cell has them, else boxed if it has a box, else the whole cell.
    Raises ValueError saying what the cell lacks.
    """
    if rule == "auto":
        rule = "hashes" if _HASHES in cell else "boxed" if _BOXED.search(cell) else "whole"
    gold, wanted = _FINDERS[rule](cell)
    if not (gold := gold.strip()):
        raise ValueError(f"it {wanted}")
    return gold


def gold_fault(answer: str, check_gold: CheckGold) -> str | None:
    """Why a gold answer cannot be scored, or None if it can."""
    try:
        check_gold(answer)
    except ValueError as error:
        return excerpt(str(error), 120).strip("'")
    return None


def _whole(cell: str) -> tuple[str, str]:
    return cell, "is empty"


def _hashes(cell: str) -> tuple[str, str]:
    _, found, gold = cell.rpartition(_HASHES)
    return (re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", gold) if found else ""), f"has nothing after {_HASHES}"


def _boxed(cell: str) -> tuple[str, str]:
    r"""What the last box holds; braces escaped as in \{1, 2\} count for nothing."""
    boxes = list(_BOXED.finditer(cell))
    depth, start = 0, boxes[-1].end() if boxes else len(cell)
    for brace in re.finditer(r"\\.|[{}]", cell[start:], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return cell[start + 1 : start + brace.start()], "has an empty box"
    return "", r"has no \boxed{...} whose braces balance"


def _last_number(cell: str) -> tuple[str, str]:
    numbers = _NUMBER.findall(cell)
    return (numbers[-1].replace(",", "") if numbers else ""), "has no number"


_FINDERS = {"whole": _whole, "hashes": _hashes, "boxed": _boxed, "last_number": _last_number}
