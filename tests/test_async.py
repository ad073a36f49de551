"""Sampling and learning at once, through the whole system: bounded staleness, nothing lost, every push proven."""

from __future__ import annotations

import re
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks.prey import WORKER, strike
from cluster.loop import check_push
from configs.errors import RunError
from configs.schema import Config
from data.records import Completion, Group, Problem, Prompt
from data.rollouts import read_groups
from learner.alarms import Alarms
from learner.batching import Sequence
from tests.small_run import arguments, metrics, start, status

STEPS, BATCH = 10, 4
LONG = ("rollout.max_completion_tokens=48", "evaluation.every=0")


def groups_of(run: Path, steps: int = STEPS) -> list[list[Group]]:
    return [read_groups(run / "rollouts" / f"step_{step:06d}.parquet") for step in range(1, steps + 1)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run at staleness 2, stopped by Ctrl-C on the way, and gone on with, whereupon its rollout worker dies; its
    folder, and what it said at first."""
    folder = tmp_path_factory.mktemp("async")
    given = arguments(folder, "run", f"training.steps={STEPS}", "cluster.max_staleness=2", *LONG, "telemetry.live=off")
    process = start(*given)
    deadline = time.monotonic() + 200
    lines = folder / "run" / "metrics.jsonl"
    while not (lines.exists() and len(lines.read_text().splitlines()) > 3) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert status(folder / "run")["state"] == "interrupted"
    resumed = start("--resume", str(folder / "run"), "telemetry.live=off")
    strike(resumed, folder / "run", WORKER, signal.SIGKILL, after_step=STEPS - 3)
    said, _ = resumed.communicate(timeout=280)
    assert resumed.returncode == 0, said
    assert "Rollout worker 0 was lost and is started again" in said
    return folder / "run", output


def test_every_prompt_is_trained_on_once_in_order_and_none_is_too_old(run: tuple[Path, str]) -> None:
    folder, _ = run
    visits = [[group.prompt.visit for group in groups] for groups in groups_of(folder)]
    assert visits == [list(range(BATCH * i, BATCH * (i + 1))) for i in range(STEPS)]
    lines = [line for line in metrics(folder) if "rollout/staleness" in line]
    assert len(lines) == STEPS
    assert all(0 <= line["rollout/staleness_max"] <= 2 and line["rollout/stale_dropped"] == 0 for line in lines)
    assert max(line["rollout/staleness_max"] for line in lines) > 0, "it did sample ahead"
    prompts = status(folder)["prompts"]
    assert (prompts["trained"], prompts["stale"], prompts["rewound"]) == (BATCH * STEPS, 0, 0)


def test_tokens_carry_the_version_that_sampled_them(run: tuple[Path, str]) -> None:
    folder, _ = run
    for version, groups in enumerate(groups_of(folder)):
        for completion in (c for group in groups for c in group.completions):
            assert (np.diff(completion.versions) >= 0).all()
            assert version - 2 <= completion.versions[0] and completion.versions[-1] <= version


def test_it_says_where_everyone_sits_and_that_every_push_agreed(run: tuple[Path, str]) -> None:
    folder, output = run
    assert "placement: disaggregated, because cluster.max_staleness=2" in output
    pushed = [line["rollout/logprob_diff_max"] for line in metrics(folder) if "rollout/logprob_diff_max" in line]
    assert len(pushed) == STEPS and max(pushed) < 1e-4


# -- the proof of a push, by planted faults -------------------------------------------------------


class Learner:
    """Knows the log-probs of its own weights: `true` for every token."""

    def __init__(self, true: float) -> None:
        self.true = true

    def with_old_logprobs(self, sequences: list[Sequence]) -> list[Sequence]:
        return [replace(s, old_logprobs=np.full_like(s.sampler_logprobs, self.true)) for s in sequences]


def checked(sampled: float, version: int) -> dict[str, float]:
    """What `check_push` says of a learner at version 3 and a worker that sampled with these log-probs, so stamped."""
    tokens = np.arange(5, dtype=np.int32)
    completion = Completion(0, 0, tokens, np.full(5, sampled, np.float32), np.full(5, version, np.int32), "", "stop")
    probe = Group(Prompt(0, Problem("", "", ""), (1, 2)), (completion,))
    rollouts = SimpleNamespace(probed=lambda references: [probe])
    actors = SimpleNamespace(rollouts=rollouts, learner=Learner(-1.0))
    config = Config.model_validate({"cluster": {"max_staleness": 1}})
    run: Any = SimpleNamespace(probes="asked", version=3, actors=actors, config=config)
    return check_push(run, probe.prompt, Alarms(config.training.guards))


def test_a_push_that_arrived_is_confirmed() -> None:
    assert checked(-1.0 - 5e-4, 3) == pytest.approx(
        {"rollout/logprob_diff": 5e-4, "rollout/logprob_diff_max": 5e-4}, 1e-2
    )


@pytest.mark.parametrize(
    ("sampled", "version", "said"),
    [
        (-1.1, 3, "rollout.logprob_diff=0.001"),
        (float("nan"), 3, "at policy version 3"),
        (-1.0, 2, "sampled with [2]"),
    ],
)
def test_stale_weights_stop_the_run(sampled: float, version: int, said: str) -> None:
    with pytest.raises(RunError, match=re.escape(said)):
        checked(sampled, version)
