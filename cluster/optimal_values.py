"""A*-PO's first stage: the optimal values of all problems a run will visit, from the initial policy's completions.

The rewards of those completions are kept beside the dataset, one line a problem, so that neither an interrupted
stage nor another run with the same model, prompts, sampling and rewards samples a problem again. A run's own
folder holds the values it uses.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from actors.sampling import Sampled
from cluster.curation import make_sampler
from configs.errors import UsageError
from configs.schema import Config
from data.hashing import stable_hash
from data.presets import PRESETS, find_file
from data.prompts import make_template
from data.records import Problem, Prompt
from learner.from_groups import OptimalValues
from learner.optimal_values import optimal_value

Sample = Callable[[list[Prompt]], Sampled]
Say = Callable[[str], None]
Key = tuple[str, str]  # a problem's id and gold answer

NOT_REWARDED = {"verifiers", "timeout_seconds", "memory_mb", "shuffle"}
ENDS_BYTES = 2**20


class RewardFile:
    """What the initial policy's completions were rewarded, by problem; grows by whole lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rewards: dict[Key, list[float]] = {}
        content = path.read_bytes() if path.exists() else b""
        whole = content.rfind(b"\n") + 1
        if whole < len(content):  # a kill cut the last line
            os.truncate(path, whole)
        for line in content[:whole].splitlines():
            entry = json.loads(line)
            self.rewards[entry["id"], entry["answer"]] = entry["rewards"]

    def append(self, rewards: dict[Key, list[float]]) -> None:
        """Add problems; on disk when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as out:
            for (problem, answer), values in rewards.items():
                out.write(json.dumps({"id": problem, "answer": answer, "rewards": values}) + "\n")
            out.flush()
            os.fsync(out.fileno())
        self.rewards |= rewards


def beside_dataset(config: Config, model_path: Path) -> Path:
    """The file for the rewards: beside a dataset that is a file here, in the model cache for any other.

    Its name stands for all that they depend on but the problem.
    """
    rollout = config.rollout
    key = {
        "model": _fingerprint(model_path),
        "template": asdict(make_template(config.data, config.rewards.reasoning_tag)),
        "rewards": config.rewards.model_dump(mode="json", exclude=NOT_REWARDED),
        "sampling": [rollout.temperature, rollout.top_k, rollout.top_p, rollout.max_completion_tokens],
        "samples": config.learner.a_star_samples,
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    dataset = _local_file(config)
    if dataset is not None and os.access(dataset.parent, os.W_OK):
        folder = dataset.with_suffix(".optimal_values")
    else:
        folder = Path(config.model.cache_dir).expanduser() / "optimal_values"
    return folder / f"{name}.jsonl"


def optimal_values(
    config: Config, prompts: list[Prompt], path: Path, shared: RewardFile | None, sample: Sample | None, say: Say
) -> OptimalValues:
    """V* by problem id, of the run whose values are in `path`; made before its first step.

    sample: samples and verifies groups of prompts from the initial policy, for what `shared` lacks. Both are None
    where that policy has moved on (a resumed run, a replay); UsageError if values are then missing.
    """
    values: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
    missing = [prompt for prompt in _visited(config, prompts) if prompt.problem.id not in values]
    if not missing:
        return values
    if sample is None or shared is None:
        raise UsageError(
            f"{path} lacks the optimal values of {len(missing)} problems that training.steps={config.training.steps} "
            "steps visit, and the initial policy that would sample them is gone. Give the number of steps the run was "
            "started with, or start a new run."
        )
    _sample_missing(missing, shared, config.rollout.prompts_per_batch, sample, say)
    for prompt in missing:
        rewards = np.array(shared.rewards[_key(prompt.problem)])
        values[prompt.problem.id] = optimal_value(rewards, config.learner.a_star_beta1)
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(values))
    draft.rename(path)
    return values


def _sample_missing(prompts: list[Prompt], shared: RewardFile, size: int, sample: Sample, say: Say) -> None:
    """Portions of `size` prompts: only their rewards are kept, and each portion is on disk before the next."""
    unknown = [prompt for prompt in prompts if _key(prompt.problem) not in shared.rewards]
    say(f"optimal values: {len(prompts) - len(unknown)} of {len(prompts)} problems are in {shared.path}")
    for first in range(0, len(unknown), size):
        # A visit that depends on the problem alone: its seeds are then the same whoever samples it, and when.
        portion = [replace(p, visit=stable_hash("optimal value", p.problem.id) >> 1) for p in unknown[first:][:size]]
        groups = sample(portion).groups
        shared.append({_key(g.prompt.problem): [verdict.total for verdict in g.verdicts] for g in groups})
        say(f"optimal values: {min(first + size, len(unknown))} of {len(unknown)} problems sampled")


def _visited(config: Config, prompts: list[Prompt]) -> list[Prompt]:
    """The different prompts of the run's visits, in the order of their first."""
    visits = make_sampler(config, prompts).take(config.training.steps * config.rollout.prompts_per_batch)
    return list({prompt.problem.id: prompt for prompt in visits}.values())


def _local_file(config: Config) -> Path | None:
    """The file of the run's dataset; None for a mixture, generated problems and the hub."""
    (dataset, *others), directory = config.data.sources, config.data.directory
    if not others and dataset in PRESETS and directory is not None:
        return find_file(PRESETS[dataset], "train", Path(directory).expanduser())
    file = Path(dataset).expanduser()
    return file if not others and file.is_file() else None


def _key(problem: Problem) -> Key:
    return problem.id, problem.answer


def _fingerprint(model_path: Path) -> list[list[str | int]]:
    """Names, sizes and hashed ends of the model's files: whole files of gigabytes would take a while."""
    found: list[list[str | int]] = []
    for file in sorted(model_path.glob("*")):
        if file.suffix in (".safetensors", ".json", ".jinja"):
            size = file.stat().st_size
            with file.open("rb") as content:
                ends = content.read(ENDS_BYTES)
                content.seek(max(0, size - ENDS_BYTES))
                ends += content.read(ENDS_BYTES)
            found.append([file.name, size, hashlib.sha256(ends).hexdigest()])
    return found
