"""Code judged by unit tests: a completion's Python program against the gold answer's assertions."""

from __future__ import annotations

import ast
from collections.abc import Iterable

from rewards.extraction import Answer, after_reasoning, tagged_answer
from rewards.registry import Case, Judgement, reward
from rewards.sandbox import Sandbox

MAX_CODE_CHARACTERS = 100_000
_FENCE = "```"


@reward("code")
def code(case: Case, judgement: Judgement) -> float:
    """1.0 if the completion's program passes all unit tests, run in rewards.sandbox; else 0.0.

    Source: functional correctness as in HumanEval (Chen et al. 2021) and MBPP (Austin et al. 2021).
    """
    return 1.0 if judgement.outcome == "correct" else 0.0


def judge(case: Case, sandbox: Sandbox) -> Judgement:
    """Find the program and test it. ValueError for a gold that is no unit test; RuntimeError without a sandbox."""
    check_gold(case.gold)
    program = find_code(case)
    if program is None or len(program.text) > MAX_CODE_CHARACTERS:
        return Judgement("unparsable", None)
    return Judgement(sandbox.run(program.text, case.gold), program.text, program.marked)


def find_code(case: Case) -> Answer | None:
    """The program: the last Python block in the answer tag, or all that tag holds; without a tag the last block.

    Only what follows the reasoning is read. A program counts as `marked` in the tag or in a block.
    """
    rest = after_reasoning(case.completion, case.tags)
    tagged = tagged_answer(rest, case.tags.answer)
    found = _last_block(rest if tagged is None else tagged) or tagged
    return Answer(found, True) if found and found.strip() else None


def check_gold(gold: str) -> str:
    """The unit tests; ValueError if they do not compile or would assert nothing."""
    try:
        compile(gold, "tests", "exec")
        tests = ast.parse(gold)
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:  # the last two: nested too deep
        raise ValueError(
            f"the gold answer {gold[:80]!r} is no Python program ({error or type(error).__name__}); {_EXPECTED}"
        ) from error
    if not _asserts(tests.body):
        raise ValueError(f"the gold answer {gold[:80]!r} asserts nothing when it runs; {_EXPECTED}")
    return gold


_EXPECTED = "expected unit tests such as `assert add(1, 2) == 3`; correct the row or drop it"


def _asserts(body: list[ast.stmt]) -> bool:
    """Whether these statements assert something outside a function, or call a function of theirs that does."""
    functions = [node for node in body if isinstance(node, ast.FunctionDef) and _holds_assert([node])]
    outside = [node for node in body if not isinstance(node, ast.FunctionDef | ast.ClassDef)]
    called = {
        node.func.id
        for statement in outside
        for node in ast.walk(statement)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    return _holds_assert(outside) or any(function.name in called for function in functions)


def _holds_assert(nodes: Iterable[ast.stmt]) -> bool:
    return any(isinstance(node, ast.Assert) for statement in nodes for node in ast.walk(statement))


def _last_block(text: str) -> str | None:
    """What the last closed block between ``` lines holds, of those marked as Python if there are any."""
    python: str | None = None
    other: str | None = None
    language, lines, inside = "", list[str](), False
    for line in text.split("\n"):
        if not line.lstrip().startswith(_FENCE):
            lines.append(line)
        elif inside:
            block, inside = "\n".join(lines), False
            if language in ("python", "py", "python3"):
                python = block
            else:
                other = block
        else:
            language, lines, inside = line.strip().strip("`").strip().lower(), [], True
    return other if python is None else python
