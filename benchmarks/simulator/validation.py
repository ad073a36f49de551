"""Predicted against measured: configurations that the rates were not fitted to."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.harness import ROOT
from benchmarks.simulator.calibration import RUNS as FITTED
from benchmarks.simulator.calibration import Frozen, variant
from benchmarks.simulator.lengths import Recorded
from benchmarks.simulator.quickstart import Measured, run, skipped
from benchmarks.simulator.scenario import Outcome, Scenario
from benchmarks.simulator.simulation import simulate

LIMIT = 0.20
DRAWS = 5  # simulated runs, of which a prediction is the mean

# At most two threads are busy at a time, but for the last, in which three share the two cores.
RUNS = {
    "turns, large batch": variant(64, 8),
    "turns, small batch": variant(12, 4),
    "turns, group of 16, full worker": variant(20, 16, max_running=96),
    "turns, short": variant(48, 8, limit=10),
    "turns, two workers": variant(48, 8, workers=2),
    "turns, two ranks": variant(40, 8, ranks=2),
    "at once, staleness 1, group of 4": variant(48, 4, max_staleness=1),
    "at once, staleness 2": variant(24, 8, max_staleness=2, steps=16),
    "at once, staleness 4, short": variant(32, 6, limit=20, max_staleness=4, steps=20),
    "at once, staleness 1, two workers": variant(32, 8, max_staleness=1, workers=2, steps=16),
}


# A virtual machine's speed drifts by a fifth within minutes. Beside every run stands this one, of those fitted:
# how its steps now compare with what the rates say of them is the machine's speed at that moment.
REFERENCE = replace(FITTED[0], steps=8)


@dataclass(frozen=True)
class Comparison:
    """Mean seconds of a step and of its phases, predicted and measured.

    slower: by how much the machine was slower just then than when the rates were measured, which is in the predictions.
    """

    predicted: dict[str, float]
    measured: dict[str, float]
    slower: float

    @property
    def error(self) -> float:
        """Of the predicted step, as a share of the measured."""
        return self.predicted["step"] / self.measured["step"] - 1.0

    def figures(self) -> dict[str, Any]:
        return {
            "predicted": self.predicted,
            "measured": self.measured,
            "slower": self.slower,
            "error": self.error,
        }


def predicted(scenario: Scenario, frozen: Frozen) -> dict[str, float]:
    """Of the scenario, with lengths drawn from those that were frozen with the rates."""
    lengths = Recorded(frozen.lengths, scenario.lengths.limit)
    given = replace(scenario, lengths=lengths, prompt_tokens=frozen.prompt_tokens)
    outcomes = [simulate(replace(given, seed=seed), frozen.rates) for seed in range(DRAWS)]
    phases = [means(outcome, skipped(scenario)) for outcome in outcomes]
    return {name: fmean(each[name] for each in phases) for name in phases[0]}


def means(outcome: Outcome, skip: int) -> dict[str, float]:
    steps = outcome.steady(skip)
    return {
        "wait": fmean(step.wait for step in steps),
        "update": fmean(step.update for step in steps),
        "sync": fmean(step.sync for step in steps),
        "step": fmean(step.seconds for step in steps),
    }


def measured(found: Measured) -> dict[str, float]:
    return {phase: found.mean(phase) for phase in ("wait", "update", "sync", "step")}


def compare(scenario: Scenario, frozen: Frozen) -> Comparison:
    """Run the reference, predict, then run the scenario."""
    slower = measured(run(REFERENCE))["step"] / predicted(REFERENCE, frozen)["step"]
    expected = {phase: slower * seconds for phase, seconds in predicted(scenario, frozen).items()}
    return Comparison(expected, measured(run(scenario)), slower)


def committed(path: Path) -> bool:
    """Whether the rates stand in git as they are: what is fitted after looking is no prediction."""
    kept = [["git", "ls-files", "--error-unmatch", str(path)], ["git", "diff", "--quiet", "HEAD", "--", str(path)]]
    return all(subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0 for command in kept)
