"""One learner rank in a process of its own, as DeepSpeed wants it: runs the jobs of a JSON file one after another.

    python -m tests.learner_process JOBS.json RANK RANKS PORT

A job is one `LearnerRank`: {"name", "config", "model", "reference", "resume", "mutant", "actions"}. Each
action is [name, argument]; rank 0 writes what they answered to NAME.json beside the file.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import save_file

import learner.batching
import learner.objectives
import learner.rank
from configs.errors import RunError
from configs.schema import Config
from learner.batching import MicroBatch, Sequence
from learner.objectives import Clip, grpo, k3
from learner.rank import LearnerRank, RankOptions
from tests.tiny import as_sampled, tiny_completions, with_old


def main(jobs_file: Path, rank: int, ranks: int, port: int) -> None:
    for job in json.loads(jobs_file.read_text()):
        options = RankOptions(
            rank=rank,
            ranks=ranks,
            address="127.0.0.1",
            port=port,
            threads=1,
            model_path=Path(job["resume"] or job["model"]),
            reference_path=Path(job["reference"]),
            total_updates=10,
        )
        began = time.perf_counter()
        with mutant(job["mutant"]):
            # The next job's rank finds the process group as this one leaves it: only the last one closes.
            learner_rank = LearnerRank(Config.model_validate_json(json.dumps(job["config"])), options)
            if job["resume"]:
                learner_rank.load_trainer_state(Path(job["resume"]) / "trainer")
            answers = [act(learner_rank, job, name, argument) for name, argument in job["actions"]]
        answers.append({"seconds": time.perf_counter() - began})
        if rank == 0:
            (jobs_file.parent / f"{job['name']}.json").write_text(json.dumps(answers))
    learner_rank.close()


def act(rank: LearnerRank, job: dict[str, Any], name: str, argument: Any) -> Any:
    """Runs one action; a RunError is an answer too."""
    if name == "update":
        try:
            return rank.update(sequences_of(job, argument), argument.get("on_policy", False))
        except RunError as error:
            return {"error": str(error)}
    if name == "weights":
        weights = rank.whole_weights()
        if weights:
            save_file(weights, argument)
        return rank.version
    if name == "save":
        rank.begin_save(Path(argument))
        return rank.saved(wait=True)
    raise ValueError(f"no action {name!r}")


def sequences_of(job: dict[str, Any], options: dict[str, Any]) -> list[Sequence]:
    """The update batch an action describes; the same in every process."""
    temperature = job["config"]["rollout"]["temperature"]
    sequences = as_sampled(tiny_completions(options["seed"], options["count"]), Path(job["model"]), temperature)
    if "old" in options:
        sequences = with_old(sequences, options["seed"], options["old"])
    if "advantage" in options:
        sequences = [replace(s, advantage=float(options["advantage"])) for s in sequences]
    if "shift" in options:
        sequences = [replace(s, sampler_logprobs=s.sampler_logprobs + options["shift"]) for s in sequences]
    return sequences


# -- planted faults -------------------------------------------------------------------------------


def mutant(name: str | None) -> contextlib.AbstractContextManager[Any]:
    """The named fault, planted while the context lasts; none for None."""
    if name is None:
        return contextlib.nullcontext()
    target, attribute, replacement = MUTANTS[name]
    return patch.object(target, attribute, replacement)


def _normalised_per_micro_batch(sequences: Any, budget: int, rank: int, ranks: int) -> list[MicroBatch]:
    batches = _right_micro_batches(sequences, budget, rank, ranks)
    return [
        replace(b, weights=b.weights / b.weights.sum() / (len(batches) * ranks) if b.weights.any() else b.weights)
        for b in batches
    ]


def _without_temperature(self: LearnerRank, module: Any, batch: MicroBatch) -> Any:
    return module(batch.input_ids, batch.rows, batch.positions, batch.targets, 1.0)


_right_micro_batches = learner.batching.micro_batches
MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "loss normalised per micro-batch": (learner.rank, "micro_batches", _normalised_per_micro_batch),
    "temperature left out": (LearnerRank, "_forward", _without_temperature),
    "clip bounds swapped": (learner.rank, "grpo", lambda inputs, clip, kl: grpo(inputs, Clip(clip.high, clip.low), kl)),
    "KL with the wrong sign": (learner.rank, "grpo", lambda inputs, clip, kl: grpo(inputs, clip, -kl)),
    "KL the wrong way round": (learner.objectives, "k3", lambda own, reference: k3(reference, own)),
}


if __name__ == "__main__":
    torch.manual_seed(0)
    main(Path(sys.argv[1]), *map(int, sys.argv[2:5]))
