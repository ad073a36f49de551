"""The report as one HTML page without scripts: its tables, and what the model said to the first problems."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape as escape_markup

from data.escaping import escaped
from evaluation.problem_results import ProblemResult, Sample
from evaluation.report import Report, Table, settings_line, tables

SHOWN_PROBLEMS = 30
SHOWN_SAMPLES = 4
SHOWN_CHARACTERS = 4000
SHOWN_TITLE = 130

# No script, no image, no font can be loaded, whatever a model has written.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #1c2733; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; } th, td { padding: .35rem .8rem; text-align: right; white-space: nowrap; }
th { border-bottom: 2px solid #9aa7b4; vertical-align: bottom; } td { border-bottom: 1px solid #dde3e9; }
th:first-child, td:first-child { text-align: left; }
.note { color: #55636f; max-width: 52rem; }
details { border-bottom: 1px solid #dde3e9; padding: .3rem 0; } summary { cursor: pointer; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f4f6f8; padding: .6rem; margin: .3rem 0 1rem; }
.correct { color: #17692f; } .other { color: #9b2c1f; }
"""


def to_html(report: Report, shown: Mapping[str, Sequence[ProblemResult]]) -> str:
    """The page. shown: by task, the results whose samples are put on it. Every text is escaped."""
    parts = [f"<h1>Evaluation of {escape(report.model)}</h1>", f"<p class=note>{escape(settings_line(report))}</p>"]
    parts += [_table(table) for table in tables(report)]
    for task in report.tasks:
        if task.left_out:
            rows = "".join(f"<li>{escape(row)}</li>" for row in task.left_out)
            parts.append(f"<h2>Rows of {escape(task.name)} left out</h2><ul>{rows}</ul>")
        parts.append(_samples(task.name, shown[task.name], task.score.problems))
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang=en><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>Evaluation of {escape(report.model)}</title><style>{STYLE}</style></head>\n"
        f"<body>\n{body}\n</body></html>\n"
    )


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.header)
    rows = "\n".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in table.rows)
    return (
        f"<h2>{escape(table.title)}</h2>\n<div class=wide><table><thead><tr>{head}</tr></thead>\n"
        f"<tbody>{rows}</tbody></table></div>\n<p class=note>{escape(table.note)}</p>"
    )


def _samples(task: str, shown: Sequence[ProblemResult], problems: int) -> str:
    what = f"{len(shown)} of {problems:,} problems; the others stand in {task}.jsonl" if len(shown) < problems else ""
    blocks = "\n".join(_problem(result) for result in shown)
    return f"<h2>Samples of {escape(task)}</h2>\n<p class=note>{escape(what)}</p>\n{blocks}"


def _problem(result: ProblemResult) -> str:
    right = sum(sample.correct for sample in result.samples)
    kind = "correct" if right else "other"
    begin = result.question if len(result.question) <= SHOWN_TITLE else f"{result.question[:SHOWN_TITLE]}…"
    head = f"<span class={kind}>{right}/{len(result.samples)}</span> {escape(begin)}"
    samples = "".join(map(_sample, result.samples[:SHOWN_SAMPLES]))
    more = len(result.samples) - SHOWN_SAMPLES
    rest = f"<p class=note>and {more} more samples</p>" if more > 0 else ""
    question = f"<pre>{escape(_cut(result.question))}</pre><p>Gold answer: <b>{escape(_cut(result.gold, 400))}</b></p>"
    return f"<details><summary>{head}</summary>{question}{samples}{rest}</details>"


def _sample(sample: Sample) -> str:
    kind = "correct" if sample.correct else "other"
    found = "no answer" if sample.extracted is None else f"answer {_cut(sample.extracted, 200)}"
    facts = [sample.outcome, found, "" if sample.marked else "not marked", f"{sample.tokens:,} tokens"]
    facts += ["truncated"] if sample.truncated else []
    line = escape(", ".join(filter(None, facts)))
    return f"<p class={kind}>{line}</p><pre>{escape(_cut(sample.text))}</pre>"


def _cut(text: str, limit: int = SHOWN_CHARACTERS) -> str:
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text) - limit:,} more characters)"


def escape(text: str) -> str:
    """The text as it may stand in the page: no markup, and no character that hides or turns round its neighbours."""
    return escape_markup(escaped(text, keep="\n\t"))
