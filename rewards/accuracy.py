"""Mathematical equivalence of a completion's answer and the gold answer, by math-verify.

math-verify guards time with SIGALRM, which fails off the main thread and cancels outer alarms, so
its limits are off here: `judge` can take for ever on hostile text and runs in rewards.child.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Mapping
from typing import Any

from rewards.extraction import MAX_ANSWER_CHARACTERS, find_answer
from rewards.notation import Plain, formula, mend, plain, same, unassigned
from rewards.registry import Case, Judgement, Outcome, Score, check_weights, reward, weigh

MAX_GOLD_DEPTH = 10  # bare braces double the time with each of them, and every completion asks anew
_SCIENTIFIC = re.compile(r"([-+]?[0-9]*\.?[0-9]+)[eE]([-+]?[0-9]+)")
_PROSE = re.compile(r"(?<![A-Za-z])[A-Za-z]{2,} +[A-Za-z]{2,}")


@reward("accuracy")
def accuracy(case: Case, judgement: Judgement) -> float:
    """1.0 for a correct answer, wherever it stood; 0.0 for everything else, time-outs and errors included.

    Source: the rule-based accuracy reward of DeepSeek-R1 (2025), compared by math-verify.
    """
    return 1.0 if judgement.outcome == "correct" else 0.0


@reward("accuracy_strict")
def accuracy_strict(case: Case, judgement: Judgement) -> float:
    """1.0 for a correct answer in an answer tag or a box; 0.0 for everything else, a last number included."""
    return 1.0 if judgement.outcome == "correct" and judgement.marked else 0.0


def judge(case: Case) -> Judgement:
    """Find the answer and compare it with the gold one. Unbounded time and memory: see above.

    Raises ValueError if the gold answer cannot be parsed.
    """
    answer = find_answer(case.completion, case.tags)
    if answer is None:
        if not is_plain(case.gold):
            parse_gold(case.gold)
        return Judgement("unparsable", None)
    return Judgement(compare(case.gold, answer.text), answer.text[:MAX_ANSWER_CHARACTERS], answer.marked)


def score(case: Case, weights: Mapping[str, float]) -> Score:
    """Judge and weigh one case in this process, without limits. For text you trust."""
    check_weights(weights)
    return weigh(case, judge(case), weights)


def compare(gold: str, answer: str) -> Outcome:
    """correct, wrong or unparsable. Not symmetric: (1, 2) answers 1 < x < 2, but not the reverse.

    Decimals agree if they do to six places. ValueError for a gold answer that cannot be parsed.
    """
    if len(answer) > MAX_ANSWER_CHARACTERS:
        return "unparsable"
    expected, found = _plain(gold), _plain(unassigned(answer))
    equal = same(expected, found) if expected and found else None
    if equal is None:
        parsed = parse_gold(gold)
        equal = mend(gold) == mend(answer)
        if not equal:
            candidates = _parse(answer)
            if not candidates:
                return "unparsable"
            equal = _math_verify().verify(list(parsed), list(candidates), timeout_seconds=None)  # gold comes first
    return "correct" if equal else "wrong"


def parse_gold(answer: str) -> tuple[Any, ...]:
    """The gold answer as sympy objects, or as a plain form. ValueError, naming it, if it cannot be parsed."""
    parsed: tuple[Any, ...] = ()
    if len(answer) <= MAX_ANSWER_CHARACTERS and _depth(answer) <= MAX_GOLD_DEPTH:
        parsed = _parse(answer) or tuple(filter(None, [_plain(answer)]))
    if not parsed:
        raise ValueError(refusal(answer))
    return parsed


def is_plain(gold: str) -> bool:
    """Whether a gold answer is read here, exactly and at once, without sympy."""
    return _plain(gold) is not None


def refusal(gold: str, why: str = "cannot be parsed") -> str:
    """What to say of a gold answer that cannot be scored."""
    shown = gold if len(gold) <= 80 else gold[:80] + "…"
    return (
        rf"the gold answer {shown!r} {why}: expected a number or LaTeX such as \frac{{1}}{{2}}, at most "
        f"{MAX_ANSWER_CHARACTERS} characters and {MAX_GOLD_DEPTH} brackets deep; correct the row or drop it"
    )


def _depth(text: str) -> int:
    """Of the deepest place, how many brackets are open there."""
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return deepest


@functools.lru_cache(maxsize=4096)
def _plain(answer: str) -> Plain | None:
    return plain(mend(answer)) if len(answer) <= MAX_ANSWER_CHARACTERS else None


@functools.lru_cache(maxsize=1024)  # a group shares its gold answer and often its wrong answers
def _parse(answer: str) -> tuple[Any, ...]:
    """sympy objects of the first reading that math-verify accepts; empty if there is none."""
    for form in _readings(answer):
        parsed = _math_verify().parse(form, fallback_mode="no_fallback", parsing_timeout=None)
        if parsed:
            return tuple(parsed)
    return ()


def _readings(answer: str) -> list[str]:
    """How to hand an answer to math-verify, which reads LaTeX only between delimiters."""
    text = _undelimited(mend(answer))
    if scientific := _SCIENTIFIC.fullmatch(text.strip("$ ")):  # it reads 1.7e-6 as Euler's e
        return [rf"${scientific[1]} \times 10^{{{scientific[2]}}}$"]
    if "$" in text or r"\(" in text or r"\[" in text:
        return [text]
    if _PROSE.search(text) and "\\" not in text:
        return [text, rf"$\text{{{text}}}$"]
    return [f"${formula(text)}$", f"${unassigned(text)}$"]


def _undelimited(text: str) -> str:
    for opening, closing in (("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        inside = text.removeprefix(opening).removesuffix(closing)
        if len(inside) == len(text) - len(opening) - len(closing) and opening not in inside and closing not in inside:
            return inside.strip()
    return text


@functools.cache
def _math_verify() -> Any:
    """math-verify, imported late (it takes half a second) and without its warning of no time-out."""
    import math_verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return math_verify
