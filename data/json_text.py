"""The text of a JSON or JSONL file, checked line by line for what its readers do not say, or do not survive.

pyarrow takes bytes that are no text, and crashes on a line `null` and on deep nesting.
"""

from __future__ import annotations

import json
import re
from codecs import BOM_UTF8
from itertools import accumulate
from pathlib import Path

from data.errors import DatasetError
from data.escaping import excerpt

MAX_DEPTH = 64
HEAD_BYTES = 65536
_MARKS = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{}]')  # text in quotes, or a bracket
_STEP = {b"[": 1, b"{": 1, b"]": -1, b"}": -1}


def check_json(path: Path) -> None:
    """Raises DatasetError, naming the line, unless the file is UTF-8 with an object in every line, or one list of
    objects where its name ends in .json."""
    with path.open("rb") as file:
        is_list = path.suffix == ".json" and _begins_a_list(path, file.read(HEAD_BYTES))
        file.seek(0)
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(BOM_UTF8) if number == 1 else line
            _check_text(path, number, line)
            if not is_list and line.strip() and not line.lstrip().startswith(b"{"):
                raise DatasetError(
                    f"The dataset {path}: line {number} is no JSON object: {excerpt(line.decode())}. Write one object "
                    'in every line, such as {"question": "1 + 1", "answer": "2"}, or in a .json file a list of such.'
                )


def bad_line(path: Path) -> str | None:
    """The first line of a JSONL file that is no JSON, in words."""
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            try:
                json.loads(line if line.strip() else "{}")
            except ValueError as error:
                return f"line {number} is not JSON ({error}): {excerpt(line)}"
    return None


def _begins_a_list(path: Path, head: bytes) -> bool:
    """Whether a .json file is a list, whose first entry must be an object."""
    text = head.removeprefix(BOM_UTF8).lstrip()
    if not text.startswith(b"["):
        return False
    first = text[1:].lstrip()
    if first and not first.startswith((b"{", b"]")) and _depth(head) <= MAX_DEPTH:
        raise DatasetError(
            f"The dataset {path} is a list whose first entry is no JSON object: "
            f"{excerpt(text.decode(errors='replace'))}. "
            'Write a list of objects, such as [{"question": "1 + 1", "answer": "2"}].'
        )
    return True


def _check_text(path: Path, number: int, line: bytes) -> None:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"The dataset {path} is no text in UTF-8: line {number}, {excerpt(line.decode(errors='replace'))}, has the "
            f"byte 0x{line[error.start]:02x} at place {error.start + 1}. Save it as UTF-8, or give another "
            "data.dataset."
        ) from error
    if line.count(b"[") + line.count(b"{") > MAX_DEPTH and _depth(line) > MAX_DEPTH:
        raise DatasetError(
            f"The dataset {path} nests more than {MAX_DEPTH} lists and objects in line {number}, "
            f"{excerpt(line.decode())}, and questions and answers are text. Give another data.dataset."
        )


def _depth(line: bytes) -> int:
    """How deep a line of JSON nests; what stands in quotes counts for nothing."""
    return max(accumulate(_STEP.get(mark[0], 0) for mark in _MARKS.finditer(line)), default=0)
