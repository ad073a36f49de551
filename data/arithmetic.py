"""Arithmetic problems made here: deterministic in (seed, index), with a worked answer for the warm start."""

from __future__ import annotations

from collections.abc import Collection

from data.errors import DatasetError
from data.hashing import question_id, stable_hash
from data.records import Problem

GENERATOR_VERSION = 1  # part of the warm start's cache key: count it up when a text below changes
PRECEDENCE = (("*",), ("+", "-"))


def generate(
    count: int, seed: int, operands: int, digits: int, operators: str, avoid: Collection[str] = ()
) -> list[Problem]:
    """`count` distinct problems such as "47 + 38", none with an id in `avoid`.

    operands: numbers in a problem. digits: of each number (one digit includes 0). operators: any
    of + - *, drawn evenly. A larger count with the same seed continues the same list.
    Raises DatasetError if there are not that many.
    """
    total = count_distinct(operands, digits, operators)
    avoided = frozenset(avoid)
    seen: set[int] = set()
    problems: list[Problem] = []
    index = 0
    while len(problems) < count:
        if len(seen) == total:
            raise DatasetError(
                f"{count} arithmetic problems were asked for, but of the {total} with operands={operands}, "
                f"digits={digits} and operators={operators!r} only {len(problems)} are left. Raise data.operands "
                "or data.digits, or lower data.train_problems and data.held_out_problems."
            )
        code = stable_hash("arithmetic", seed, index) % total
        index += 1
        if code in seen:
            continue
        seen.add(code)
        problem = _decode(code, operands, digits, operators)
        if problem.id not in avoided:
            problems.append(problem)
    return problems


def count_distinct(operands: int, digits: int, operators: str) -> int:
    """How many different problems these options allow."""
    return len(_numbers(digits)) ** operands * len(_distinct(operators)) ** (operands - 1)


def structured_answer(
    problem: Problem, reasoning_tag: str = "think", answer_tag: str = "answer", worked: bool = True
) -> str:
    """The right answer in the form the warm start teaches: `<think>working</think><answer>N</answer>`.

    "47 + 38" is worked as "47+30=77+8=85": left to right, products first, the second number of a
    sum place by place from the largest. Not worked, the reasoning is empty.
    """
    reasoning = " ".join(working(problem.question)) if worked else ""
    return f"<{reasoning_tag}>{reasoning}</{reasoning_tag}><{answer_tag}>{problem.answer}</{answer_tag}>"


def working(question: str) -> list[str]:
    """The steps of a generated question, each a chain such as "47+30=77+8=85"."""
    terms = question.split()
    steps: list[str] = []
    for level in PRECEDENCE:
        place = 1
        while place < len(terms):
            if terms[place] not in level:
                place += 2
                continue
            left, operator, right = int(terms[place - 1]), terms[place], int(terms[place + 1])
            steps.append(_chain(left, operator, right))
            terms[place - 1 : place + 2] = [str(_apply(left, operator, right))]
    return steps


def _chain(left: int, operator: str, right: int) -> str:
    """One operation worked out: a sum adds the parts of `right` one by one."""
    parts = [right] if operator == "*" else _places(right)
    text = str(left)
    for part in parts:
        left = _apply(left, operator, part)
        text += f"{operator}{part}={left}"
    return text


def _places(number: int) -> list[int]:
    """347 -> [300, 40, 7]; zero places are left out, except for 0 itself."""
    text = str(number)
    places = [int(digit) * 10 ** (len(text) - 1 - i) for i, digit in enumerate(text)]
    return [place for place in places if place] or [0]


def _apply(left: int, operator: str, right: int) -> int:
    if operator == "+":
        return left + right
    return left - right if operator == "-" else left * right


def _decode(code: int, operands: int, digits: int, operators: str) -> Problem:
    """The problem with number `code` among all that the options allow."""
    numbers, symbols = _numbers(digits), _distinct(operators)
    terms: list[str] = []
    for place in range(operands):
        if place:
            code, symbol = divmod(code, len(symbols))
            terms.append(symbols[symbol])
        code, number = divmod(code, len(numbers))
        terms.append(str(numbers[number]))
    question = " ".join(terms)
    return Problem(id=question_id(question), question=question, answer=str(_value(question)))


def _value(question: str) -> int:
    terms = question.split()
    total, sign, product = 0, 1, int(terms[0])
    for operator, number in zip(terms[1::2], terms[2::2], strict=True):
        if operator == "*":
            product *= int(number)
        else:
            total, sign, product = total + sign * product, 1 if operator == "+" else -1, int(number)
    return total + sign * product


def _numbers(digits: int) -> range:
    return range(0 if digits == 1 else 10 ** (digits - 1), 10**digits)


def _distinct(operators: str) -> str:
    return "".join(dict.fromkeys(operators))
