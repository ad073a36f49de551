"""Runs of the Tyagi recipe by the project's own session: its options, on arithmetic problems, which need no network."""

from __future__ import annotations

import shutil
from pathlib import Path

from benchmarks.gpu_stages.models import base_shape, kept, random_model
from benchmarks.gpu_stages.part import Setting
from benchmarks.recipe_run import finished_run

RECIPE = "tyagi_gsm8k_single_gpu"
TEACH_SECONDS = 240.0


def settings(setting: Setting, model: Path, *more: str) -> tuple[str, ...]:
    """A run's recipe and options: the recipe's own but for the problems and, at toy sizes, whatever has a size."""
    return (
        RECIPE,
        f"model.name={model}",
        "data.dataset=arithmetic",
        "data.operators=+",
        "data.decontaminate=[]",
        "evaluation.every=0",
        "cluster.deadline_seconds=200",
        *setting.size(REAL, TINY),
        *more,
    )


REAL = ("data.train_problems=4096", "data.held_out_problems=64")
TINY = (
    "data.train_problems=64",
    "data.held_out_problems=4",
    "rewards.verifiers=1",
    "rollout.prompts_per_batch=4",
    "rollout.completions_per_prompt=4",
    "rollout.max_completion_tokens=32",
    "rollout.kv_cache_mb=32",
    "learner.tokens_per_micro_batch=1024",
    "learner.threads=1",
)
IDLE = "rollout.completions_per_prompt"  # where nothing is sampled to learn from


def taught_model(setting: Setting) -> Path:
    """A model that supervised fine-tuning has taught to add up, from random weights: it ends its answers, and some are
    right, so that groups have spread. RuntimeError if that run fails."""

    def write(folder: Path) -> None:
        steps, prompts = setting.size((100, 64), (4, 8))
        teaching = (
            "learner.objective=sft",
            f"learner.learning_rate={setting.size('3e-4', '1e-3')}",
            "learner.max_grad_norm=1.0",
            f"training.steps={steps}",
            f"rollout.prompts_per_batch={prompts}",
            "rollout.max_completion_tokens=64",
        )
        start = random_model(setting, base_shape(setting))
        chosen = [option for option in settings(setting, start, *teaching) if not option.startswith(IDLE)]
        with finished_run(*chosen, deadline_seconds=TEACH_SECONDS) as run:
            checkpoint = run / "checkpoints" / f"step_{steps:06d}"
            shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("trainer"))

    return kept(setting.models / f"{base_shape(setting)}-taught", write)
