"""Colocated training with the Tyagi recipe's options, by run_local's own session."""

from __future__ import annotations

from pathlib import Path

from benchmarks.gpu_stages.memory import PeakMemory, beside_plan
from benchmarks.gpu_stages.part import Part, Row, Setting
from benchmarks.gpu_stages.recipe import TEACH_SECONDS, settings, taught_model
from benchmarks.recipe_run import figures, finished_run, metric_lines
from configs.loading import load_config

STEPS, TINY_STEPS = 12, 2
SECONDS = 240.0


def parts(setting: Setting) -> list[Part]:
    """The model, then the run."""
    return [Part("teach", teach, TEACH_SECONDS + 30), Part("grpo", grpo, TEACH_SECONDS + SECONDS)]


def teach(setting: Setting) -> list[Row]:
    """Supervised fine-tuning from random weights: what the run that follows starts from."""
    return [Row("taught by supervised fine-tuning", taught_model(setting).name)]


def grpo(setting: Setting) -> list[Row]:
    """8-bit AdamW, bfloat16, gradient checkpointing, turns on one device, a sync each step."""
    steps = setting.size(STEPS, TINY_STEPS)
    options = settings(setting, taught_model(setting), f"training.steps={steps}")
    with PeakMemory(setting.device) as peak, finished_run(*options, deadline_seconds=SECONDS) as run:
        rows = rows_of(run)
    config = load_config(options[0], options[1:])
    if setting.device == "cpu":
        rows.append(Row("sleep and wake", "nothing sleeps on a CPU"))
    return [*rows, *beside_plan(setting, config, peak, "train")]


def rows_of(run: Path) -> list[Row]:
    """What a finished run's metrics say of learning, of the two sides' agreement and of time."""
    found = figures(run)
    steps = [line for line in metric_lines(run) if "time/step" in line]
    first, last = steps[0], steps[-1]
    rows = [
        Row("optimizer steps", found["updates"], least=len(steps)),
        Row("reward, first step", first["reward/mean"]),
        Row("reward, last step", last["reward/mean"]),
        Row("groups without spread", sum(s["reward/flat_groups"] for s in steps) / len(steps)),
        Row("mean log-prob difference, all steps", found["rollout/logprob_diff"], "nats", most=0.005),
        Row("largest difference of a token", max(s["rollout/logprob_diff_max"] for s in steps), "nats"),
        Row("accuracy before", found["before"][0]),
        Row("accuracy after", found["after"][0]),
    ]
    return [*rows, *(Row(f"median seconds, {phase}", s, "s") for phase, s in found["median_seconds"].items())]
