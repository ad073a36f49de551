"""Claims about `python -m rewards.score`: one verdict a line, hostile lines included, and clear about bad ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rewards.score import main

ROOT = Path(__file__).resolve().parent.parent


def run(lines: str | bytes, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    given = lines.encode() if isinstance(lines, str) else lines
    command = [sys.executable, "-m", "rewards.score", *arguments]
    return subprocess.run(command, cwd=ROOT, input=given, capture_output=True, timeout=120)


def line(gold: str, completion: str, **more: object) -> str:
    return json.dumps({"gold": gold, "completion": completion, **more}) + "\n"


def test_every_line_gets_its_verdict_in_order_and_a_hostile_one_costs_only_itself():
    lines = (
        line("1/2", r"so \boxed{0.5}")
        + line("7", r"\boxed{10^{10^{10^{10}}}}")
        + "\n"
        + line("7", "it is 7")
        + line("7", "\ud800 no idea")
        + line("?!", "7")
    )
    start = time.monotonic()
    done = run(lines, "--reward", "accuracy", "--reward", "accuracy_strict", "--timeout-seconds", "1")
    assert time.monotonic() - start < 60
    assert (done.returncode, done.stderr) == (0, b"")
    verdicts = [json.loads(text) for text in done.stdout.splitlines()]
    assert [verdict["outcome"] for verdict in verdicts] == ["correct", "timeout", "correct", "unparsable", "error"]
    assert [verdict["score"] for verdict in verdicts] == [2.0, 0.0, 1.0, 0.0, 0.0]
    assert verdicts[0] == {
        "score": 2.0,
        "outcome": "correct",
        "extracted": "0.5",
        "marked": True,
        "rewards": {"accuracy": 1.0, "accuracy_strict": 1.0},
    }


def test_what_a_reward_quotes_of_a_completion_is_no_command_to_the_terminal(tmp_path: Path):
    (tmp_path / "quoting.py").write_text("def reward(case, judge):\n    raise ValueError(case.completion)\n")
    command = [sys.executable, "-m", "rewards.score", "--reward", "quoting:reward"]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    given = line("7", "\x1b[2J\u202e").encode()
    done = subprocess.run(command, cwd=ROOT, env=environment, input=given, capture_output=True, timeout=120)
    assert done.returncode == 1
    assert b"\\x1b[2J\\u202e" in done.stderr and b"\x1b" not in done.stderr


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("not json\n", "line 2 is no JSON"),
        (b'"\xff"\n', "line 2 is no JSON"),
        ("[" * 100_000 + "\n", "line 2 is no JSON"),
        ("[1]\n", "line 2 is '[1]'; expected an object"),
        ('{"gold": "7"}\n', "line 2 is"),
        (line("7", "7", tokens="many"), "line 2 is"),
        (line("7", "7", tokens=0), "line 2 is"),
    ],
)
def test_a_bad_line_is_named_after_the_verdicts_before_it(bad, said):
    given = bad.encode() if isinstance(bad, str) else bad
    done = run(line("7", "7").encode() + given, "--reward", "exact_match")
    assert done.returncode == 2
    assert said in done.stderr.decode() and done.stderr.startswith(b"error: ")
    assert len(done.stdout.splitlines()) == 1


def test_an_unknown_reward_is_refused_with_the_nearest_name(capsys):
    assert main(["--reward", "acuracy"]) == 2
    assert "did you mean 'accuracy'" in capsys.readouterr().err
    assert main(["--reward", "accuracy", "--reward", "code"]) == 2
    assert "leave out one" in capsys.readouterr().err


def test_lengths_prefills_tags_and_scripts_can_be_given():
    lines = line("7", "сумма</plan><result>7</result>", prefill="<plan>", tokens=100, max_tokens=100)
    names = ("format", "cosine", "overlong", "language", "accuracy")
    options = [part for name in names for part in ("--reward", name)]
    done = run(lines, *options, "--reasoning-tag", "plan", "--answer-tag", "result", "--script", "cyrillic")
    assert json.loads(done.stdout)["rewards"] == {
        "format": 1.0,
        "cosine": 0.5,
        "overlong": -1.0,
        "language": 1.0,
        "accuracy": 1.0,
    }


def test_the_help_shows_a_line_that_works(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "python -m rewards.score" in said and "Hostile text cannot hang it" in said
    example = said.partition("echo '")[2].partition("'")[0]
    done = run(example + "\n")
    assert json.loads(done.stdout)["outcome"] == "correct"
