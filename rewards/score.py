"""Scores lines of text without a model: `python -m rewards.score --reward accuracy < cases.jsonl`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from typing import IO, Any

from rewards.judges import open_judge
from rewards.language import SCRIPTS
from rewards.registry import Case, Length, RewardError, Score, Settings, Tags, check_weights

FAILURE, USAGE_ERROR = 1, 2
TEXTS, COUNTS = ("gold", "completion", "prefill"), ("tokens", "max_tokens")


class LineError(ValueError):
    """A line of the input that is no case; the message names it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print one verdict a line. Returns 0; 2, with a message on stderr, for a bad line or name; 1 if judging failed."""
    options = _parser().parse_args(argv)
    weights = dict.fromkeys(options.reward or ["accuracy"], 1.0)
    try:
        check_weights(weights)
        judge = open_judge(weights, options.timeout_seconds, options.memory_mb, options.unsafe_code)
        judge.start()
        try:
            for case in _cases(sys.stdin.buffer, options):
                print(_verdict(judge.score([case])[0]), flush=True)
        finally:
            judge.close()
    except (ValueError, RewardError, RuntimeError) as error:
        print(f"error: {_escaped(str(error))}", file=sys.stderr)
        return USAGE_ERROR if isinstance(error, ValueError) else FAILURE
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m rewards.score",
        description="Score completions from standard input, one JSON object a line with the keys gold and completion "
        "(and, if you like, prefill: what the prompt began of it; tokens and max_tokens: its length and limit). "
        "Prints one JSON object a line: score (the sum), outcome, extracted (the answer found), marked (it stood in "
        "a tag or box) and rewards (each one's value). Hostile text cannot hang it.",
        epilog="""example: echo '{"gold": "1/2", "completion": "so \\\\boxed{0.5}"}' | python -m rewards.score""",
    )
    parser.add_argument(
        "--reward",
        action="append",
        metavar="NAME",
        help="a registered reward or module:function; may be repeated (default: accuracy)",
    )
    parser.add_argument("--reasoning-tag", default="think", help="tag around the reasoning (default: %(default)s)")
    parser.add_argument("--answer-tag", default="answer", help="tag around the answer (default: %(default)s)")
    parser.add_argument(
        "--script", choices=SCRIPTS, default="latin", metavar="SCRIPT", help="script that the reward language expects"
    )
    parser.add_argument("--timeout-seconds", type=float, default=5.0, help="for one line (default: %(default)s)")
    parser.add_argument("--memory-mb", type=int, default=2048, help="address space in MiB (default: %(default)s)")
    parser.add_argument("--unsafe-code", action="store_true", help="run programs without namespaces")
    return parser


def _cases(lines: IO[bytes], options: argparse.Namespace) -> Iterator[Case]:
    tags, settings = Tags(options.reasoning_tag, options.answer_tag), Settings(script=options.script)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        fields = _fields(number, line)
        length = None
        if "tokens" in fields:
            limit = fields.get("max_tokens", max(fields["tokens"], 1))
            length = Length(fields["tokens"], limit, max(limit // 5, 1))
        yield Case(fields["completion"], fields["gold"], tags, length, fields.get("prefill", ""), settings)


def _fields(number: int, line: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise LineError(f"line {number} is no JSON ({error}); write one object a line") from error
    if not _is_case(fields):
        raise LineError(
            f"line {number} is {line.decode(errors='replace').strip()[:80]!r}; expected an object with the texts gold "
            'and completion, such as {"gold": "7", "completion": "<answer>7</answer>"}, and counts of tokens above 0'
        )
    return fields


def _is_case(fields: object) -> bool:
    if not isinstance(fields, dict) or not {"gold", "completion"} <= fields.keys():
        return False
    texts = all(isinstance(fields.get(key, ""), str) for key in TEXTS)
    return texts and all(type(fields.get(key, 1)) is int and fields.get(key, 1) > 0 for key in COUNTS)


def _escaped(text: str) -> str:
    """A reward of your own may quote a completion in what it raises, and that is no command to a terminal."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def _verdict(score: Score) -> str:
    return json.dumps(
        {
            "score": score.total,
            "outcome": score.outcome,
            "extracted": score.extracted,
            "marked": score.marked,
            "rewards": score.rewards,
        }
    )


if __name__ == "__main__":
    sys.exit(main())
