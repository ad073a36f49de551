"""Finding the answer in a completion. Linear in the text's length, whatever the text is."""

from __future__ import annotations

import collections
import re

from rewards.registry import Tags

_BOXED = "\\boxed{"
# A sign counts only where it cannot be a subtraction: 5-3 ends in 3.
_NUMBER = re.compile(
    r"(?:(?<![\w)\]}])[-+])?"
    r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?:/[0-9]+)?%?"
)


def find_answer(text: str, tags: Tags, strict: bool = False) -> str | None:
    """The answer of a completion, stripped; None if it gives none.

    Reasoning is never an answer: only what follows the last closing reasoning tag is read, and
    nothing if the reasoning was left open. Looked for in this order: the last box inside the last
    answer tag, that tag's content, the last box, and, unless `strict`, the last number.
    """
    text = _after_reasoning(text, tags.reasoning)
    tagged = tagged_answer(text, tags.answer)
    found: str | None
    if tagged is not None:
        found = last_boxed(tagged) or tagged
    else:
        found = last_boxed(text) or (None if strict else last_number(text))
    return (found.strip() or None) if found else None


def _after_reasoning(text: str, tag: str) -> str:
    rest = text.rpartition(f"</{tag}>")[2]
    return "" if f"<{tag}>" in rest else rest


def tagged_answer(text: str, tag: str) -> str | None:
    """What the last `<tag>…</tag>` holds; None if there is none or the last is left open."""
    _, opened, inside = text.rpartition(f"<{tag}>")
    content, closed, _ = inside.partition(f"</{tag}>")
    return content if opened and closed else None


def last_boxed(text: str) -> str | None:
    r"""What the last `\boxed{…}` holds; None if there is none or its braces do not balance."""
    start = text.rfind(_BOXED)
    if start < 0:
        return None
    start += len(_BOXED)
    depth = 1
    for brace in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):
        if brace[0] in "{}":
            depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[start : start + brace.start()]
    return None


def last_number(text: str) -> str | None:
    """The last integer, decimal, fraction a/b or percentage; thousands may be parted by commas."""
    numbers = _NUMBER.finditer(text.replace("\N{MINUS SIGN}", "-"))
    last = collections.deque(numbers, maxlen=1)
    return last[0][0] if last else None
