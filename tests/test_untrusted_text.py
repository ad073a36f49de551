"""Claims about text from outside: wherever it is shown, it moves no cursor, forges no line and starts no markup."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from cluster.plan_report import main as plan
from cluster.progress import Display
from cluster.replay import main as replay
from cluster.terminal import say, say_error
from cluster.train import main as train
from configs.loading import dump_config, load_config
from data.errors import DatasetError
from data.loading import Source, load_source
from data.pass_rates import read_pass_rates
from evaluation.report import Base, Report, Task, to_markdown
from evaluation.report_page import to_html
from evaluation.scores import score
from tests.evaluation_cases import result, sample
from tests.small_run import ROOT
from tests.test_evaluation import SETTINGS, figures_of

ATTACKS = {
    "clear the screen": "\x1b[2J\x1b[H",
    "colour": "\x1b[31m",
    "title": "\x1b]0;owned\x07",
    "link": "\x1b]8;;http://evil.test\x1b\\here\x1b]8;;\x1b\\",
    "clipboard": "\x1b]52;c;ZXZpbA==\x07",
    "answerback": "\x1b[c\x1b[6n",
    "8-bit CSI": "\x9b31m\x9d0;x\x9c",
    "carriage return": "step 1\rerror: none",
    "line": "x\nerror: forged",
    "backspace": "abc\b\b\bxyz\x7f",
    "NUL": "a\x00b",
    "bidi": "\u202egnp.exe\u2066\u2069\u200f",
    "zero width": "a\u200bb\ufeffc\u00adx",
    "line separators": "a\u2028b\u2029c\x85d",
    "tags": "\U000e0041\U000e0042",
    "rich": "[bold red]x[/] [link=http://evil.test]y[/link] :skull: [/nothing]",
    "HTML": "</title></pre><script>alert(1)</script><img src=x onerror=alert(2)>\"'><a href=javascript:alert(3)>",
    "Markdown": "| a ](javascript:alert(1)) ![x](http://evil.test/x.png) <b> `x`",
}
ATTACK = " ".join(ATTACKS.values())
NAME = " ".join(ATTACKS[each] for each in ("clear the screen", "carriage return", "line", "8-bit CSI", "bidi", "rich"))
ALLOWED = frozenset("\n")


def unsafe(text: str) -> set[str]:
    """The characters in a text that no person can see."""
    return {
        c for c in text if c not in ALLOWED and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
    }


def assert_shown(output: str) -> None:
    """Something of the attack is there, and nothing of it acts."""
    assert unsafe(output) == set()
    assert re.search(r"\\(x1b|u001b|e)\[2J", output), "the attack must have got as far as the output"


def in_display(text: str) -> str:
    """What a run's terminal gets, colours and live bar on."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, highlight=False, soft_wrap=True, width=10_000)
    Display("off", console).say(text)
    return out.getvalue()


def printed(speak: Callable[[str], None]) -> Callable[[str], str]:
    def captured(text: str) -> str:
        out, sys.stdout, sys.stderr = (sys.stdout, sys.stderr), io.StringIO(), io.StringIO()
        try:
            speak(text)
            return sys.stdout.getvalue() + sys.stderr.getvalue()
        finally:
            sys.stdout, sys.stderr = out

    return captured


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("shown", [in_display, printed(say), printed(say_error)], ids=["run", "say", "error"])
def test_every_way_to_the_terminal_prints_printable_text_alone(shown: Callable[[str], str], name: str) -> None:
    output = shown(ATTACKS[name])
    assert unsafe(output) == set()
    if shown is not in_display:
        return
    if name == "rich":
        assert ATTACKS[name] in output, "no markup and no emoji is made of it"


def test_an_error_is_one_line_whatever_it_quotes(capsys: pytest.CaptureFixture[str]) -> None:
    say_error("first\nerror: second\r\x1b[Afound\u2028third")
    assert capsys.readouterr().err == "error: first error: second \\x1b[Afound third\n"


def config_file(folder: Path, tree: object) -> str:
    file = folder / "a.yaml"
    file.write_text(yaml.safe_dump(tree, allow_unicode=False, width=10**6))
    return str(file)


COMMANDS: dict[str, Callable[[Path], tuple[Callable[[list[str]], int], list[str]]]] = {
    "a value in YAML": lambda folder: (train, ["--config", config_file(folder, {"training": {"steps": ATTACK}})]),
    "a key in YAML": lambda folder: (train, ["--config", config_file(folder, {"training": {ATTACK: 1}})]),
    "a section in YAML": lambda folder: (train, ["--config", config_file(folder, {ATTACK: {"steps": 1}})]),
    "a run's name": lambda folder: (train, ["--config", config_file(folder, {"training": {"name": ATTACK}})]),
    "a file's name": lambda folder: (train, ["--config", str(folder / NAME.replace("/", "|"))]),
    "a flag": lambda folder: (train, [f"--{ATTACK}"]),
    "an override": lambda folder: (train, [f"model.lora_rank={ATTACK}"]),
    "a resumed folder": lambda folder: (train, ["--resume", str(folder / "no" / NAME)]),
    "a dataset": lambda folder: (train, ["--dry-run", f"data.dataset={folder}/{NAME}.jsonl"]),
    "a reward": lambda folder: (
        train,
        ["--dry-run", "--config", config_file(folder, {"rewards": {"weights": {ATTACK: 1.0}}})],
    ),
    "a reward's module": lambda folder: (
        train,
        ["--dry-run", "--config", config_file(folder, {"rewards": {"weights": {f"{ATTACK}:f": 1.0}}})],
    ),
    "a planned model": lambda folder: (plan, ["--config", config_file(folder, {"model": {"name": NAME}})]),
    "a planned flag": lambda folder: (plan, [f"--{ATTACK}"]),
    "a replayed folder": lambda folder: (replay, [str(folder / NAME), "--step", "1"]),
    "a replayed step": lambda folder: (replay, [str(folder), "--step", ATTACK]),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_a_mistake_that_quotes_an_attack_is_one_safe_line(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, arguments = COMMANDS[case](tmp_path)
    assert command(arguments) == 2
    error = capsys.readouterr().err
    assert_shown(error)
    assert error.startswith("error: ") and error.count("\n") == 1


def test_a_config_that_is_printed_shows_what_is_hidden_and_reads_back(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = config_file(tmp_path, {"data": {"system_prompt": ATTACK}})
    assert train(["--config", file, "--print-config"]) == 0
    text = capsys.readouterr().out
    assert unsafe(text) == set() and "\\e[2J" in text
    (tmp_path / "again.yaml").write_text(text)
    assert load_config(tmp_path / "again.yaml").data.system_prompt == ATTACK
    assert dump_config(load_config(file)) == text


ROWS: dict[str, list[object]] = {
    "question": [{"question": ATTACK, "answer": ""}],
    "answer": [{"question": "q", "answer": f"#### {ATTACK}"}],
    "column": [{ATTACK: "q", "answer": "1"}],
    "no object": [ATTACK],
    "one good row": [{"question": "q", "answer": "1"}, {"question": ATTACK, "answer": ""}],
}


@pytest.mark.parametrize("case", ROWS)
def test_what_is_said_of_a_datasets_rows_is_safe(case: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS[case]))

    def refuse(answer: str) -> None:
        raise ValueError(f"cannot parse {answer}")

    try:
        _, bad = load_source(Source(str(path)), refuse if case == "answer" else None)
        said = " ".join(map(str, bad))
    except DatasetError as error:
        said = str(error)
    assert said and unsafe(said) == set()


def test_pass_rates_that_are_none_are_shown_safely(tmp_path: Path) -> None:
    path = tmp_path / "rates.jsonl"
    path.write_text(json.dumps({"question": ATTACK, "pass_rate": ATTACK}, ensure_ascii=False) + "\n")
    with pytest.raises(DatasetError) as caught:
        read_pass_rates(path)
    assert_shown(str(caught.value))


class Elements(HTMLParser):
    """The elements of a page and their attributes, as a browser takes them apart."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.title = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        if self.lasttag == "title":
            self.title += data


def attacked_report() -> tuple[Report, dict[str, list[object]]]:
    wrong = sample("wrong", text=ATTACK, extracted=ATTACK)
    results = [result("a", wrong, sample(), question=ATTACK, gold=ATTACK)]
    found = score([figures_of(each) for each in results])
    task = Task(ATTACK, found, of=9, few_shot=0, left_out=(ATTACK,))
    return Report(ATTACK, SETTINGS, (task,), Base(ATTACK, {ATTACK: found}, {})), {ATTACK: list(results)}


def test_a_page_full_of_attacks_has_no_element_of_theirs() -> None:
    report, shown = attacked_report()
    page = to_html(report, shown)  # type: ignore[arg-type]
    elements = Elements(page)
    assert elements.tags & {"script", "img", "a", "iframe", "svg", "link", "object", "form", "base"} == set()
    assert elements.attributes <= {"lang", "charset", "http-equiv", "content", "name", "class"}
    assert "alert(1)" in elements.title, "</title> did not end the title"
    assert unsafe(page) - {"\t"} == set() and "default-src 'none'" in page


def test_a_table_full_of_attacks_stays_a_table() -> None:
    report, _ = attacked_report()
    markdown = to_markdown(report)
    assert_shown(markdown)
    assert "](" not in markdown and "<" not in markdown.replace("&lt;", "")
    for line in markdown.splitlines():
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) > 2 and line.endswith("|")
    assert not re.search("^(error|step)", markdown, re.MULTILINE)


def test_a_crash_that_quotes_an_attack_is_escaped() -> None:
    program = f"from cluster.terminal import escape_crashes\nescape_crashes()\nraise ValueError({ATTACK!r})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, cwd=ROOT, timeout=60)
    assert done.returncode == 1
    assert_shown(done.stderr.decode())


def test_no_command_prints_past_the_one_place_that_escapes() -> None:
    """Every print and every write to a console of the packages that speak; those listed print no text from outside."""
    allowed = {
        "cluster/terminal.py", "cluster/progress.py", "cluster/train.py", "cluster/evaluate.py", "cluster/replay.py",
        "rewards/score.py", "rewards/unit_tests.py", "pocketgrpo.py",
    }  # fmt: skip
    found = set()
    for path in [*ROOT.glob("*.py"), *(p for name in PACKAGES for p in (ROOT / name).rglob("*.py"))]:
        if re.search(r"(?<![\w.])print\(|\.print\(|sys\.std(out|err)\.write", path.read_text()):
            found.add(str(path.relative_to(ROOT)))
    assert found <= allowed


PACKAGES = ("actors", "cluster", "configs", "data", "evaluation", "learner", "rewards")
