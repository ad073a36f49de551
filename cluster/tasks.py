"""The tasks of an evaluation: the config they are put by, and their problems."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import psutil
import torch

from cluster.curation import curate
from cluster.gpu import has_gpu
from cluster.materials import Say
from cluster.preflight import MIB
from configs.errors import UsageError
from configs.loading import load_config
from configs.schema import Config
from data.prompts import Template, make_template
from evaluation.benchmarks import Benchmark, limited, load_benchmark, with_examples, with_own_ids, worked_answer
from evaluation.command_line import MAX_COMPLETION_TOKENS, OWN_TASKS, Request
from rewards.registry import Gold, gold_kind

DEFAULT_PROMPT = (
    "Solve the problem. Write down how you get there, then give the final answer as \\boxed{answer}.\n\n{question}"
)
REWARDS: dict[Gold, str] = {
    "math": "accuracy",
    "exact": "exact_match",
    "code": "code",
}  # what judges which gold answers
CODE_PROMPT = "Solve the task with a Python program. Give the whole program in one ```python block."
WORKER_BYTES = 1536 * MIB  # of a rollout worker, besides weights and KV cache


def evaluation_config(request: Request) -> Config:
    """The config of an evaluation: the recipe's or run's that --config names, else one that asks for a boxed answer."""
    if request.config is None:
        wording = f"data.user_prompt={DEFAULT_PROMPT}"
        longest = f"rollout.max_completion_tokens={MAX_COMPLETION_TOKENS}"
        config = load_config(None, [wording, longest, *request.overrides])
    else:
        config = load_config(_config_file(request.config), request.overrides)
    tokens = request.max_completion_tokens or config.rollout.max_completion_tokens
    rollout = config.rollout.model_copy(update={"max_completion_tokens": tokens})
    cluster = config.cluster.model_copy(update={"learner_ranks": 0})
    return config.model_copy(update={"rollout": rollout, "cluster": cluster})


def load_benchmarks(request: Request, config: Config, say: Say) -> list[Benchmark]:
    """The tasks' problems. DatasetError or UsageError for what stands in the way."""
    directory = request.data or (Path(config.data.directory).expanduser() if config.data.directory else None)
    found = []
    for name in request.tasks:
        if name in OWN_TASKS:
            problems = curate(config, say)[OWN_TASKS.index(name)]
            gold = gold_kind(config.rewards.weights)
            benchmark = Benchmark(name, with_own_ids(problems), len(problems), gold)
        else:
            benchmark = load_benchmark(name, request.split, directory)
        benchmark = limited(benchmark, request.limit, request.seed)
        benchmark = with_examples(benchmark, request.few_shot.get(name, 0), directory)
        if benchmark.left_out:
            rows = f"{len(benchmark.left_out)} rows left out, their gold answers cannot be used"
            say(f"{name}: {rows}: {'; '.join(benchmark.left_out[:3])}")
        found.append(benchmark)
    return found


def template_of(config: Config, benchmark: Benchmark) -> Template:
    """What the benchmark's questions are put into: the config's template, with the benchmark's own examples if any.

    Where nothing else is said, programs are asked for in words of their own. An example answers as the
    template asks the model to: in the tags where it names them, else with a box.
    """
    template = make_template(config.data, config.rewards.reasoning_tag)
    if benchmark.gold == "code" and template.user_prompt == DEFAULT_PROMPT:
        template = replace(template, user_prompt=f"{CODE_PROMPT}\n\n{{question}}")
    if not benchmark.examples:
        return template
    reasoning, answer = config.rewards.reasoning_tag, config.rewards.answer_tag
    asked = f"{template.system_prompt}{template.user_prompt}"
    tags = (reasoning, answer) if f"<{answer}>" in asked else None
    pairs = tuple((example.question, worked_answer(example, tags)) for example in benchmark.examples)
    return replace(template, few_shot=pairs)


def judging(config: Config, gold: Gold) -> Config:
    """The config with the one reward that judges such gold answers: an evaluation asks what is right, and no more."""
    rewards = config.rewards.model_copy(update={"weights": {REWARDS[gold]: 1.0}})
    return config.model_copy(update={"rewards": rewards})


def fitting_workers(config: Config, model_path: Path) -> int:
    """One rollout worker for each GPU; without GPUs one a core, as far as half of the free memory holds their weights
    and KV caches."""
    if has_gpu():
        return max(1, torch.cuda.device_count() // config.rollout.tensor_parallel)
    weights = sum(path.stat().st_size for path in model_path.glob("*.safetensors"))
    each = weights + config.rollout.kv_cache_mb * MIB + WORKER_BYTES
    return max(1, min(os.cpu_count() or 1, psutil.virtual_memory().available // (2 * each)))


def _config_file(given: str) -> Path | str:
    """The config file that --config means: a run's folder and what lies in it stand for the run's config.yaml."""
    path = Path(given)
    if not path.is_dir():
        return given
    for folder in (path, *path.resolve().parents[:2]):
        if (folder / "config.yaml").is_file():
            return folder / "config.yaml"
    raise UsageError(
        f"--config {given}: there is no config.yaml in that folder or the two above it. Give a recipe, a YAML file, or "
        "the folder of a run or of one of its checkpoints."
    )
