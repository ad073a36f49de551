"""Arithmetic problems made here: deterministic in (seed, index), with a worked answer for the warm start."""

from __future__ import annotations

from collections.abc import Collection

from data.errors import DatasetError
from data.hashing import question_id, stable_hash
from data.records import Problem

GENERATOR_VERSION = 1  # part of the warm start's cache key: count it up when a text below changes


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

    "47 + 38" is worked by columns, "7+8=15 4+3+1=8". With other operators products come first, then
    the terms from left to right, place by place: "47 - 38" is "47-30=17-8=9". Not worked, the
    reasoning is empty.
    """
    reasoning = " ".join(working(problem.question)) if worked else ""
    return f"<{reasoning_tag}>{reasoning}</{reasoning_tag}><{answer_tag}>{problem.answer}</{answer_tag}>"


def working(question: str) -> list[str]:
    """The steps of a generated question: a sum's columns, or each product and then a chain "4+2=6-5=1"."""
    terms = question.split()
    if set(terms[1::2]) == {"+"} and any(len(number) > 1 for number in terms[::2]):
        return _columns(terms[::2])
    steps: list[str] = []
    place = 1
    while place < len(terms):
        if terms[place] == "*":
            product = str(int(terms[place - 1]) * int(terms[place + 1]))
            steps.append(f"{terms[place - 1]}*{terms[place + 1]}={product}")
            terms[place - 1 : place + 2] = [product]
        else:
            place += 2
    if len(terms) > 1:
        steps.append(_chain(terms))
    return steps


def _columns(numbers: list[str]) -> list[str]:
    """A sum of numbers of the same length, column by column from the right: "7+8=15", "4+3+1=8"."""
    steps: list[str] = []
    carry = 0
    for column in zip(*(reversed(number) for number in numbers), strict=True):
        total = sum(map(int, column)) + carry
        steps.append("+".join([*column, *([str(carry)] if carry else [])]) + f"={total}")
        carry = total // 10
    return steps


def _chain(terms: list[str]) -> str:
    """A sum worked out from left to right, every number place by place."""
    text, total = terms[0], int(terms[0])
    for operator, number in zip(terms[1::2], terms[2::2], strict=True):
        for part in _places(int(number)):
            total += part if operator == "+" else -part
            text += f"{operator}{part}={total}"
    return text


def _places(number: int) -> list[int]:
    """347 -> [300, 40, 7]; zero places are left out, except for 0 itself."""
    text = str(number)
    places = [int(digit) * 10 ** (len(text) - 1 - i) for i, digit in enumerate(text)]
    return [place for place in places if place] or [0]


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
