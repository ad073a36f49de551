"""One run of a recipe, by `run_local.py` as a user starts it, and its figures."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, ROOT, record

HOUR = 3600.0
RUN_LOCAL = (str(ROOT / "run_local.py"),)
SEEDS = (42, 7, 11)
PHASES = ("sample", "verify", "update", "sync", "step")
MEANS = (
    "policy/clip_fraction",
    "policy/filtered",
    "rollout/logprob_diff",
    "rollout/staleness",
    "rollout/stale_dropped",
)


@contextmanager
def finished_run(*settings: str, deadline_seconds: float = HOUR, program: Sequence[str] = RUN_LOCAL) -> Iterator[Path]:
    """Run a recipe in a folder that is deleted afterwards, and yield it. RuntimeError with its last output if it fails.

    settings: `section.key=value`; the first may be the recipe's name, else it is the quickstart. program: what Python
    runs with run_local's command line.
    """
    if "=" in settings[0]:
        settings = ("quickstart", *settings)
    with tempfile.TemporaryDirectory(prefix="pocketgrpo-run-") as folder:
        command = [sys.executable, *program, "--config", *settings]
        place = [f"training.runs_dir={folder}", "training.name=run", "telemetry.live=off", "checkpoint.every=0"]
        done = subprocess.run([*command, *place], cwd=ROOT, capture_output=True, text=True, timeout=deadline_seconds)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}"[-4000:])
        yield Path(folder) / "run"


def measure(*settings: str, deadline_seconds: float = HOUR, program: Sequence[str] = RUN_LOCAL) -> dict[str, Any]:
    """The figures of a `finished_run`."""
    with finished_run(*settings, deadline_seconds=deadline_seconds, program=program) as run:
        return figures(run)


def figures(run: Path) -> dict[str, Any]:
    """What a finished run's metrics say: accuracies with their intervals, seconds by phase, means over its updates."""
    lines = metric_lines(run)
    evaluations = [line for line in lines if "eval/accuracy" in line]
    steps = [line for line in lines if "time/step" in line]
    updates = [line for line in steps if "policy/loss" in line]
    found: dict[str, Any] = {
        name: [line[f"eval/accuracy{suffix}"] for suffix in ("", "_low", "_high")]
        for name, line in (("before", evaluations[0]), ("after", evaluations[-1]))
    }
    found["evaluations"] = {line["step"]: line["eval/accuracy"] for line in evaluations}
    for phase in PHASES:
        found[f"{phase}_seconds"] = sum(line.get(f"time/{phase}", 0.0) for line in steps)
    found["median_seconds"] = {
        phase: statistics.median(line.get(f"time/{phase}", 0.0) for line in steps) for phase in PHASES
    }
    for name in MEANS:
        values = [line[name] for line in updates if name in line]
        if values:
            found[name] = sum(values) / len(values)
    found["updates"] = sum(line["policy/updates"] for line in steps)
    found["tokens_trained"] = sum(line["tokens/trained"] * line["policy/updates"] for line in updates)
    return found


def metric_lines(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def recorded(name: str) -> list[dict[str, Any]]:
    """The figures recorded under a name, oldest first."""
    if not RESULTS.exists():
        return []
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    return [line["figures"] for line in lines if line["name"] == name]


def percent(accuracy: list[float]) -> str:
    """`99.2 % [98.0, 99.7]` from an accuracy with its interval."""
    value, low, high = (100 * part for part in accuracy)
    return f"{value:.1f} % [{low:.1f}, {high:.1f}]"


def grow_table(
    argv: Sequence[str] | None, about: str | None, run_seed: Callable[[int, bool], None], table: Callable[[], str]
) -> int:
    """The command line of a table of runs: `run_seed(seed, again)` for every seed, then the table. Returns 0."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the table of what is recorded")
    parser.add_argument("--again", action="store_true", help="make runs again that are recorded")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="training seeds")
    given = parser.parse_args(argv)
    if not given.table:
        for seed in given.seeds:
            run_seed(seed, given.again)
    print(table())
    return 0


def run_cell(name: str, cell: dict[str, Any], settings: Sequence[str], again: bool) -> None:
    """Measure one cell of a table with these settings and record both, unless a run of just these is recorded."""
    if not again and any(line["settings"] == list(settings) for line in recorded(name)):
        return
    found = {**cell, "settings": list(settings), **measure(*settings)}
    record(name, found)
    print(*cell.values(), percent(found["before"]), "->", percent(found["after"]), flush=True)
