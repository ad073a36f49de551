"""Benchmarks: the problems put to a model, which of them, and the worked examples shown before them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from configs.errors import RunError, UsageError
from data.hashing import stable_hash
from data.presets import PRESETS, open_preset
from data.records import Problem
from data.rows import Split, read_problems
from rewards.gold_check import SlowGoldsError, gold_check
from rewards.registry import Gold

EXAMPLES_FROM = {"math500": "math"}  # benchmarks whose training problems go by another name
SOLUTION_COLUMNS = ("answer_official", "solution")
_CALCULATION = re.compile(r"<<[^<>\n]*>>")  # GSM8K's notes for a calculator
_FINAL = re.compile(r"####[^\n]*\s*\Z")


@dataclass(frozen=True)
class Benchmark:
    """What one task of an evaluation puts to a model.

    problems: those to be answered, each id once; `of` so many rows that there are. gold: what their gold answers
    are. left_out: why each row that is no problem was left out. examples: training problems with their
    solutions, shown before each question.
    """

    name: str
    problems: tuple[Problem, ...]
    of: int
    gold: Gold = "math"
    left_out: tuple[str, ...] = ()
    examples: tuple[Problem, ...] = ()


def load_benchmark(name: str, split: Split, directory: Path | None) -> Benchmark:
    """A named benchmark, whole, from a folder of JSONL files or the hub. DatasetError for what stands in the way.

    Rows whose gold answer cannot be parsed could never be scored: they are left out, and named.
    """
    gold: Gold = PRESETS[name].kind
    table, shown, reading = open_preset(name, split, directory)
    try:
        with gold_check(gold) as check:
            problems, bad = read_problems(table, shown, reading, check)
    except SlowGoldsError as error:
        raise UsageError(f"{shown}: {error}") from error
    except RuntimeError as error:  # nothing that reads them can be started
        raise RunError(str(error)) from error
    if not problems:
        raise UsageError(f"No row of {shown} can be used; the first: {bad[0]}. Correct the file.")
    return Benchmark(name, with_own_ids(problems), len(problems) + len(bad), gold, tuple(map(str, bad)))


def with_own_ids(problems: Sequence[Problem]) -> tuple[Problem, ...]:
    """The problems, a question that stands there again with an id of its own, so that results stay apart."""
    seen: Counter[str] = Counter()
    own = []
    for problem in problems:
        seen[problem.id] += 1
        times = seen[problem.id]
        own.append(problem if times == 1 else replace(problem, id=f"{problem.id}-{times}"))
    return tuple(own)


def limited(benchmark: Benchmark, limit: int | None, seed: int) -> Benchmark:
    """The first `limit` problems by a hash of seed and id, in that order; all, in their own order, without a limit."""
    if limit is None or limit >= len(benchmark.problems):
        return benchmark
    order = sorted(benchmark.problems, key=lambda problem: (stable_hash("limit", seed, problem.id), problem.id))
    return replace(benchmark, problems=tuple(order[:limit]))


def with_examples(benchmark: Benchmark, count: int, directory: Path | None) -> Benchmark:
    """The benchmark with the first `count` training problems as worked examples; none of them is also asked.

    UsageError where the benchmark has too few training problems.
    """
    if count == 0:
        return benchmark
    source = EXAMPLES_FROM.get(benchmark.name, benchmark.name)
    if benchmark.gold != "math" or source not in PRESETS or "train" not in PRESETS[source].splits:
        raise UsageError(
            f"--few-shot {benchmark.name}={count}: {benchmark.name} has no worked training problems to take examples "
            "from. Leave it out, or write examples of your own into data.few_shot of a --config."
        )
    table, shown, reading = open_preset(source, "train", directory)
    column = next((name for name in SOLUTION_COLUMNS if name in table.column_names), reading.answer)
    rows = table.select(range(min(count, len(table))))
    problems, _ = read_problems(rows, shown, replace(reading, demonstration=column))
    if len(problems) < count:
        raise UsageError(
            f"--few-shot {benchmark.name}={count}: of the first {count} rows of {shown} only {len(problems)} can be "
            "used. Ask for fewer examples."
        )
    shown_ids = {problem.id for problem in problems}
    asked = tuple(problem for problem in benchmark.problems if problem.id not in shown_ids)
    return replace(benchmark, problems=asked, examples=tuple(problems))


def worked_answer(problem: Problem, tags: tuple[str, str] | None) -> str:
    r"""An example's solution and final answer as a completion: in (reasoning, answer) tags, or ending in a box.

    The dataset's own marks (GSM8K's `<<...>>` and `####` line) are taken out.
    """
    text = _CALCULATION.sub("", problem.demonstration or "")
    text = _FINAL.sub("", text).strip()
    solution = "" if text == problem.answer else text
    if tags is not None:
        reasoning, answer = tags
        return f"<{reasoning}>{solution}</{reasoning}><{answer}>{problem.answer}</{answer}>"
    return f"{solution}\n\n\\boxed{{{problem.answer}}}".strip()
