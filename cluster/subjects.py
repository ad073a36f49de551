"""A model under evaluation: its folder, the prompts of every task in its own tokens, and where its results go."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from cluster.materials import Say, find_model
from cluster.tasks import fitting_workers, template_of
from configs.errors import UsageError
from configs.schema import Config
from configs.urls import is_url
from data.escaping import block
from data.prompts import render_all
from data.records import Prompt
from evaluation.benchmarks import Benchmark
from evaluation.command_line import Request
from evaluation.results_folder import ResultsFolder
from learner.model_cache import file_sha256
from rewards.registry import Gold

# Of a model's folder what decides on its samples; a checkpoint holds more.
MODEL_FILES = ("*.safetensors", "config.json", "generation_config.json", "tokenizer*", "chat_template*", "vocab.json")
ANY_LENGTH = sys.maxsize  # no prompt is dropped: a score is of all problems


@dataclass(frozen=True)
class Subject:
    """A model with its prompts by task, and what gold answers each has. config: the evaluation's, sized for them."""

    name: str
    path: Path
    config: Config
    settings: dict[str, Any]
    prompts: dict[str, list[Prompt]]
    golds: dict[str, Gold]
    folder: ResultsFolder

    def ids(self, task: str) -> list[str]:
        """The problems of a task, in their order."""
        return [prompt.problem.id for prompt in self.prompts[task]]

    def unfinished(self) -> list[str]:
        """The tasks of which problems are missing in the folder."""
        return [task for task in self.prompts if self.missing(task)]

    def missing(self, task: str) -> int:
        """How many problems of a task are not finished."""
        return len(set(self.ids(task)) - self.folder.done(task))


def find_subject(
    name: str, request: Request, config: Config, benchmarks: Sequence[Benchmark], output: Path | None, say: Say
) -> Subject:
    """Find or convert the model, render the prompts, and open the results folder (None: a name of its own).

    UsageError where a prompt with its completion is longer than the model can take, or the folder holds
    results of other settings. ModelError, DatasetError for a model that is missing or cannot be prompted.
    """
    config = config.model_copy(update={"model": config.model.model_copy(update={"name": name})})
    path = find_model(config, say)
    say(f"model: {path}")
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    prompts = {}
    for benchmark in benchmarks:
        template = template_of(config, benchmark)
        prompts[benchmark.name], _ = render_all(tokenizer, benchmark.problems, template, ANY_LENGTH)
        say(f"first prompt of {benchmark.name}:\n{block(tokenizer.decode(prompts[benchmark.name][0].token_ids))}")
    sized = _sized(config, request.workers, path, prompts)
    settings = settings_of(name, request, sized, benchmarks, path)
    folder = ResultsFolder(output or _default_output(sized, name, settings))
    folder.open(settings)
    golds = {benchmark.name: benchmark.gold for benchmark in benchmarks}
    return Subject(name, path, sized, settings, prompts, golds, folder)


def settings_of(
    name: str, request: Request, config: Config, benchmarks: Sequence[Benchmark], model_path: Path
) -> dict[str, Any]:
    """All that decides on the results, as JSON: two evaluations agree in it, but for the model, or are not compared."""
    return {
        "model": name,
        "model_sha256": _fingerprint(model_path),
        "dtype": config.model.dtype,
        "split": request.split,
        "limit": request.limit,
        "samples": request.samples,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "max_completion_tokens": config.rollout.max_completion_tokens,
        "seed": request.seed,
        "tags": {"reasoning": config.rewards.reasoning_tag, "answer": config.rewards.answer_tag},
        "tasks": {benchmark.name: _task_settings(config, benchmark) for benchmark in benchmarks},
    }


def _task_settings(config: Config, benchmark: Benchmark) -> dict[str, Any]:
    template = template_of(config, benchmark)
    problems = [(problem.id, problem.question, problem.answer) for problem in benchmark.problems]
    return {
        "problems": len(problems),
        "of": benchmark.of,
        "few_shot": len(template.few_shot),
        "prompt": {"system": template.system_prompt, "user": template.user_prompt, "chat": template.chat},
        "sha256": sha256(json.dumps([template.few_shot, problems]).encode()).hexdigest()[:16],
    }


def _sized(config: Config, workers: int | None, model_path: Path, prompts: dict[str, list[Prompt]]) -> Config:
    """The config with room for the longest of these prompts, and its workers; UsageError where the model has not."""
    longest = max(len(prompt.token_ids) for rendered in prompts.values() for prompt in rendered)
    data = config.data.model_copy(update={"max_prompt_tokens": longest})
    chosen = workers or fitting_workers(config, model_path)
    cluster = config.cluster.model_copy(update={"rollout_workers": chosen})
    sized = config.model_copy(update={"data": data, "cluster": cluster})
    limit = json.loads((model_path / "config.json").read_text()).get("max_position_embeddings")
    if limit is not None and sized.max_tokens > limit:
        raise UsageError(
            f"The longest prompt has {longest} tokens, and a completion up to {config.rollout.max_completion_tokens}; "
            f"the model takes {limit} in all. Lower --max-completion-tokens to at most {max(0, limit - longest)}, or "
            "show fewer examples (--few-shot)."
        )
    return sized


def _default_output(config: Config, name: str, settings: dict[str, Any]) -> Path:
    """The same for the same settings, so that the same command goes on where it was."""
    if is_url(config.training.runs_dir):
        raise UsageError(f"training.runs_dir={config.training.runs_dir} is a URL. Name a local folder with --output.")
    digest = sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return Path(config.training.runs_dir).expanduser() / "evaluations" / f"{Path(name).name}-{digest}"


def _fingerprint(folder: Path) -> str:
    """One hash of the files that make the model."""
    files = sorted({path for pattern in MODEL_FILES for path in folder.glob(pattern) if path.is_file()})
    lines = [f"{path.name} {file_sha256(path)}" for path in files]
    return sha256("\n".join(lines).encode()).hexdigest()[:16]
