"""Variants of the quickstart as they are measured: a scenario run by `run_local.py`, and what its folder says."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from benchmarks.recipe_run import finished_run
from benchmarks.simulator.scenario import Scenario
from data.records import Group
from data.rollouts import read_groups

SETTLING = 2  # steps at a run's beginning that are no measure; as many more as staleness allows
# The policy stays what the warm start made it, and so do the lengths of its completions.
FIXED = ("learner.learning_rate=1e-9", "learner.threads=1", "evaluation.every=0")

Phases = dict[str, float]


@dataclass(frozen=True)
class Measured:
    """The steps that count: seconds by phase (wait, sample, verify, update, sync, step), and their groups."""

    scenario: Scenario
    phases: list[Phases]
    steps: list[list[Group]]

    def mean(self, phase: str) -> float:
        return fmean(step[phase] for step in self.phases)

    @property
    def groups(self) -> list[Group]:
        return [group for step in self.steps for group in step]


def settings(scenario: Scenario) -> list[str]:
    """The scenario as options of the quickstart. Lengths are the policy's own, up to their limit."""
    return [
        *FIXED,
        f"rollout.prompts_per_batch={scenario.prompts_per_batch}",
        f"rollout.completions_per_prompt={scenario.completions_per_prompt}",
        f"rollout.max_completion_tokens={scenario.lengths.limit}",
        f"rollout.max_running={scenario.max_running}",
        f"rewards.verifiers={scenario.verifiers}",
        f"cluster.max_staleness={scenario.max_staleness}",
        f"cluster.rollout_workers={scenario.workers}",
        f"cluster.learner_ranks={scenario.ranks}",
        f"training.steps={scenario.steps}",
        f"training.seed={scenario.seed}",
    ]


def run(scenario: Scenario) -> Measured:
    """Run it as a user does. RuntimeError if it fails."""
    with finished_run(*settings(scenario)) as folder:
        return read(folder, scenario)


def read(folder: Path, scenario: Scenario) -> Measured:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "time/step" in line][skipped(scenario) :]
    times = [{name.partition("/")[2]: line[name] for name in line if name.startswith("time/")} for line in steps]
    return Measured(
        scenario, times, [read_groups(folder / "rollouts" / f"step_{line['step']:06d}.parquet") for line in steps]
    )


def skipped(scenario: Scenario) -> int:
    return SETTLING + scenario.max_staleness


def lengths(groups: list[Group]) -> list[list[int]]:
    return [[len(completion.token_ids) for completion in group.completions] for group in groups]


def whole_tokens(groups: list[Group]) -> int:
    """Those of prompts and completions, which is what the learner works on."""
    return sum(
        len(group.prompt.token_ids) + len(completion.token_ids) for group in groups for completion in group.completions
    )
