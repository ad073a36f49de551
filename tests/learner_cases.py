"""What a learner rank under test is given: a case (its options), update batches, and the processes that run them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from learner.alarms import NO_LIMITS, Limits
from learner.batching import Sequence
from tests.tiny import MAX_COMPLETION, MAX_PROMPT, as_sampled, tiny_completions, tiny_llama, with_old

REPOSITORY = Path(__file__).resolve().parents[1]
DEADLINE_SECONDS = 240.0  # less than a test may take, so that no process outlives it

TEMPERATURE, LOW, HIGH, BETA = 0.7, 0.1, 0.3, 0.05
RATE, DECAY, MAX_NORM, BETAS = 2e-4, 0.01, 1.0, (0.9, 0.99)
TINY = MAX_PROMPT + MAX_COMPLETION  # tokens per micro-batch: one row of the longest sequence,
MEDIUM, ALL = 3 * TINY, 4096  # a few rows, or the whole update batch
BUDGETS = {TINY: "tiny", MEDIUM: "medium", ALL: "all"}

Overrides = tuple[tuple[str, Any], ...]  # options of the section `learner`


@dataclass(frozen=True)
class Batch:
    """An update batch of random ragged completions, the same in every process.

    old: how far pi_old is from the sampler's log-probs; None: pi_old is the current policy. flat: so many
    completions have the advantage 0, truncated: so many no end. shift: how far the sampler's log-probs are from
    the model's.
    """

    seed: int = 26
    count: int = 9  # which two ranks cannot share evenly, and of which some share rows at every budget
    old: float | None = None
    advantage: float | None = None
    flat: int = 0
    truncated: int = 0
    shift: float = 0.0

    def sequences(self, model: Path) -> list[Sequence]:
        sequences = as_sampled(tiny_completions(self.seed, self.count), model, TEMPERATURE)
        if self.old is not None:
            sequences = with_old(sequences, self.seed, self.old)
        if self.advantage is not None:
            sequences = [replace(s, advantage=self.advantage) for s in sequences]
        sequences = [
            replace(s, advantage=0.0 if i < self.flat else s.advantage, truncated=i < self.truncated)
            for i, s in enumerate(sequences)
        ]
        return [replace(s, sampler_logprobs=s.sampler_logprobs + self.shift) for s in sequences]


@dataclass(frozen=True)
class Case:
    """One learner rank (or several alike) and what it is used for."""

    zero: int = 0
    ranks: int = 1
    budget: int = ALL
    packing: bool = True
    checkpointing: bool = False
    tied: bool = False
    dtype: str = "float32"
    optimizer: str = "adamw"
    lora: int = 0
    mutant: str | None = None
    use: str = "step"
    learner: Overrides = ()
    guards: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        parts = [self.use, f"zero{self.zero}", f"{self.ranks}ranks", BUDGETS[self.budget]]
        parts += ["packed" if self.packing else "padded", self.dtype, self.optimizer]
        parts += ["checkpointing"] * self.checkpointing + ["tied"] * self.tied
        parts += ["lora"] * bool(self.lora) + [self.mutant or ""]
        parts += [f"{key}={value}" for key, value in self.learner]
        return "-".join(filter(None, parts)).replace(" ", "_")

    @property
    def model(self) -> str:
        return "tied" if self.tied else "untied"

    def config(self) -> dict[str, Any]:
        return {
            "model": {"dtype": self.dtype, "gradient_checkpointing": self.checkpointing, "lora_rank": self.lora},
            "data": {"max_prompt_tokens": MAX_PROMPT},
            "rollout": {"temperature": TEMPERATURE, "max_completion_tokens": MAX_COMPLETION},
            "learner": {
                "zero_stage": self.zero,
                "optimizer": self.optimizer,
                "tokens_per_micro_batch": self.budget,
                "packing": self.packing,
                "learning_rate": RATE,
                "betas": BETAS,
                "weight_decay": DECAY,
                "max_grad_norm": MAX_NORM,
                "clip_low": LOW,
                "clip_high": HIGH,
                "kl_coefficient": BETA,
                "logprob_chunk_tokens": 16,
                **dict(self.learner),
            },
            "training": {"guards": dict(self.guards)},
            "cluster": {"learner_ranks": self.ranks, "deadline_seconds": 60.0},
        }


@dataclass(frozen=True)
class Job:
    """A case, the folder it starts from if not the tiny model, and its actions."""

    case: Case
    actions: list[list[Any]]
    resume: Path | None = None
    suffix: str = ""

    @property
    def name(self) -> str:
        return self.case.name + self.suffix


def update(
    batch: Batch, on_policy: bool = False, gradient: Path | None = None, limits: Limits = NO_LIMITS
) -> list[Any]:
    """The action of one update; its whole gradient, reduced and not yet clipped, goes to the file `gradient`."""
    files = {"gradient": str(gradient) if gradient else None}
    return ["update", {"batch": asdict(batch), "on_policy": on_policy, "limits": asdict(limits), **files}]


def tiny_models(folder: Path) -> dict[str, Path]:
    """The models that cases start from, and their reference policy."""
    return {
        "untied": tiny_llama(folder / "untied"),
        "tied": tiny_llama(folder / "tied", tied=True),
        "reference": tiny_llama(folder / "reference", seed=1),
    }


# -- running --------------------------------------------------------------------------------------


def run_processes(
    folder: Path, models: dict[str, Path], jobs: list[Job], ranks: int, deadline: float = DEADLINE_SECONDS
) -> dict[str, list[Any]]:
    """Runs the jobs, one after another, in `ranks` fresh processes; what each action answered, by job."""
    folder.mkdir()
    described = [
        {
            "name": job.name,
            "config": job.case.config(),
            "model": str(models[job.case.model]),
            "reference": str(models[job.case.model if job.case.lora else "reference"]),
            "resume": str(job.resume) if job.resume else None,
            "mutant": job.case.mutant,
            "actions": job.actions,
        }
        for job in jobs
    ]
    (folder / "jobs.json").write_text(json.dumps(described))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    processes = []
    try:
        for rank in range(ranks):
            with (folder / f"rank_{rank}.log").open("w") as log:
                arguments = [str(folder / "jobs.json"), str(rank), str(ranks), str(port)]
                command = [sys.executable, "-m", "tests.learner_process", *arguments]
                processes.append(subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=log, stderr=log))
        codes = [process.wait(deadline) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    logs = "\n".join((folder / f"rank_{rank}.log").read_text()[-2000:] for rank in range(ranks))
    assert codes == [0] * ranks, logs
    return {job.name: json.loads((folder / f"{job.name}.json").read_text()) for job in jobs}


def run_all(
    folder: Path, models: dict[str, Path], *rounds: list[Job], deadline: float = DEADLINE_SECONDS
) -> dict[str, list[Any]]:
    """The same for jobs of one and of two ranks, side by side; each round in processes of its own."""
    folder.mkdir()

    def run(ranks: int) -> dict[str, list[Any]]:
        answers: dict[str, list[Any]] = {}
        for number, jobs in enumerate(rounds):
            if chosen := [job for job in jobs if job.case.ranks == ranks]:
                answers |= run_processes(folder / f"{ranks}_ranks_{number}", models, chosen, ranks, deadline)
        return answers

    with ThreadPoolExecutor() as pool:
        return {name: answers for found in pool.map(run, (2, 1)) for name, answers in found.items()}
