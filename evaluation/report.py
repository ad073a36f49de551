"""The report of an evaluation: scores and comparisons as JSON, as tables, and as Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from data.escaping import escaped
from evaluation.estimators import Comparison, Estimate
from evaluation.scores import CONFIDENCE, Score


@dataclass(frozen=True)
class Task:
    """A benchmark as reported: its score, `of` how many problems, and why rows were left out."""

    name: str
    score: Score
    of: int
    few_shot: int
    left_out: tuple[str, ...] = ()

    @property
    def problems(self) -> str:
        """`50 of 1,319`, or `1,319` if they are all."""
        asked = f"{self.score.problems:,}"
        return asked if self.score.problems == self.of else f"{asked} of {self.of:,}"


@dataclass(frozen=True)
class Base:
    """The model compared with: its scores and the paired comparisons, by task and measure."""

    model: str
    scores: dict[str, Score]
    comparisons: dict[str, dict[str, Comparison]]


@dataclass(frozen=True)
class Report:
    """An evaluation of one model."""

    model: str
    settings: dict[str, Any]
    tasks: tuple[Task, ...]
    base: Base | None = None


@dataclass(frozen=True)
class Table:
    """A table of plain text. `note` explains it."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str


def to_json(report: Report) -> dict[str, Any]:
    """Everything the tables show, unrounded."""
    return asdict(report)


def tables(report: Report) -> list[Table]:
    """The tables of a report: accuracy, lengths and outcomes, and the comparison if there is a base."""
    found = [_accuracy(report), _lengths(report)]
    return found if report.base is None else [*found, _comparison(report.base)]


def settings_line(report: Report) -> str:
    """One sentence on how was sampled."""
    s = report.settings
    count = "one sample" if s["samples"] == 1 else f"{s['samples']} samples"
    subset = f" Of a limited task the problems are chosen by a hash of seed {s['seed']}." if s["limit"] else ""
    return (
        f"{count.capitalize()} a problem at temperature {s['temperature']:g}, top-p {s['top_p']:g}, at most "
        f"{s['max_completion_tokens']:,} tokens, {s['dtype']}, seed {s['seed']}, {s['split']} split.{subset} "
        f"Intervals: {CONFIDENCE:.0%}."
    )


def to_markdown(report: Report) -> str:
    """The report as Markdown."""
    parts = [f"# Evaluation of {_cell(report.model)}", settings_line(report)]
    for table in tables(report):
        parts += [f"## {_cell(table.title)}", _markdown_table(table), table.note]
    left_out = [f"- {_cell(task.name)}: {_cell(row)}" for task in report.tasks for row in task.left_out]
    if left_out:
        parts += ["## Rows left out", "\n".join(left_out), "Their gold answers cannot be used to score."]
    return "\n\n".join(parts) + "\n"


def _accuracy(report: Report) -> Table:
    samples = report.settings["samples"]
    ks = sorted({k for task in report.tasks for k in task.score.pass_at})
    voted = any(task.score.majority for task in report.tasks)
    header = ["task", "problems", "few-shot", f"avg@{samples} lenient", f"avg@{samples} strict"]
    header += [*(f"pass@{k}" for k in ks), *([f"maj@{samples}", "ties"] if voted else [])]
    rows = []
    for task in report.tasks:
        score = task.score
        row = [task.name, task.problems, str(task.few_shot), percent(score.lenient), percent(score.strict)]
        row += [percent(score.pass_at[k]) for k in ks]
        if voted:
            row += [percent(score.majority), _share(score.tied)] if score.majority else ["–", "–"]
        rows.append(tuple(row))
    note = (
        "Percent, with intervals over problems: a bootstrap of whole problems; Wilson's where each is right or wrong, "
        "or hardly any differ. Lenient counts a right answer wherever it stands, strict only in the answer tag or box."
    )
    if voted:
        note += (
            " pass@k is the unbiased estimate. maj@k: the answer given most often, right answers being one answer; a "
            "tie among t answers counts 1/t if the right one is among them. Ties: the share of votes that were tied."
        )
    return Table("Accuracy", tuple(header), tuple(rows), note)


def _lengths(report: Report) -> Table:
    outcomes = list(report.tasks[0].score.outcomes)
    header = ("task", "tokens, mean", "tokens, 90th percentile", "truncated", *outcomes)
    rows = tuple(
        (
            task.name,
            f"{task.score.length:,.0f}",
            f"{task.score.length_p90:,.0f}",
            _share(task.score.truncated),
            *(_share(task.score.outcomes[outcome]) for outcome in outcomes),
        )
        for task in report.tasks
    )
    return Table("Lengths and outcomes", header, rows, "Shares of all samples, in percent.")


def _comparison(base: Base) -> Table:
    header = ("task", "accuracy", "base", "difference", "p", "smallest p possible", "problems that differ")
    rows = tuple(
        (
            task,
            measure,
            percent(getattr(base.scores[task], measure)),
            percent(found.difference, signed=True),
            p_value(found.p_value),
            p_value(found.smallest_p),
            f"{found.differing:,}",
        )
        for task, measures in base.comparisons.items()
        for measure, found in measures.items()
    )
    note = (
        "Differences are in percentage points, paired by problem, with bootstrap intervals; p is two-sided, of the "
        "exact sign-flip permutation test, not corrected for the number of tasks. Where few problems differ the "
        "intervals are too narrow; p is not."
    )
    return Table(f"Against {base.model}", header, rows, note)


def percent(estimate: Estimate, signed: bool = False) -> str:
    """`52.0 [46.1, 57.9]`, in percent."""
    value, low, high = (100 * part for part in (estimate.value, estimate.low, estimate.high))
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]" if signed else f"{value:.1f} [{low:.1f}, {high:.1f}]"


def p_value(p: float) -> str:
    """Three digits, or a power of ten where they would be zeros."""
    return f"{p:.3f}" if p >= 0.001 else f"{max(p, 1e-300):.0e}"


def _share(value: float) -> str:
    return f"{100 * value:.1f}"


def _markdown_table(table: Table) -> str:
    lines = [table.header, tuple("---" for _ in table.header), *table.rows]
    return "\n".join(_markdown_row(line) for line in lines)


def _markdown_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(map(_cell, cells))} |"


def _cell(text: str) -> str:
    """Text that ends no cell, no line and no paragraph, and starts no HTML, no link and no image."""
    plain = escaped(" ".join(text.split()))
    return plain.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "'").replace("](", "] (")
