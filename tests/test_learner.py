"""Whole learner ranks through DeepSpeed, each in a process of its own: the same update whatever the micro-batches,
the ZeRO stage and the number of ranks; the planted faults that this comparison catches; saving and restoring."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

from learner.checkpoint_writer import flush_to_disk
from tests.learner_process import MUTANTS
from tests.plain_grpo import PlainCompletion, plain_grpo
from tests.tiny import (
    MAX_COMPLETION,
    MAX_PROMPT,
    as_sampled,
    open_plain,
    plain_logprobs,
    tiny_completions,
    tiny_llama,
    with_old,
)

REPOSITORY = Path(__file__).resolve().parents[1]
DEADLINE_SECONDS = 240.0

TEMPERATURE, LOW, HIGH, BETA = 0.7, 0.1, 0.3, 0.05
RATE, DECAY, MAX_NORM, ADAM_EPSILON = 2e-4, 0.01, 1.0, 1e-8
TINY, ALL = MAX_PROMPT + MAX_COMPLETION, 4096  # tokens per micro-batch: one sequence, or the whole update batch
BATCH: dict[str, Any] = {"seed": 3, "count": 7, "old": 0.3}  # 7: two ranks cannot share it evenly
OTHER_BATCH: dict[str, Any] = {"seed": 4, "count": 6, "old": 0.3}

WEIGHTS_LIMIT = 1e-6  # |difference| / |weights| after one step
UPDATE_LIMIT = 1e-3  # |difference| / |step|
METRIC_LIMIT = 1e-5


@dataclass(frozen=True)
class Case:
    """One learner rank (or several alike) and what it is asked to do."""

    zero: int
    ranks: int = 1
    budget: int = ALL
    checkpointing: bool = False
    tied: bool = False
    dtype: str = "float32"
    optimizer: str = "adamw"
    mutant: str | None = None
    use: str = "step"
    learner: tuple[tuple[str, Any], ...] = field(default=())

    @property
    def name(self) -> str:
        budget = "tiny" if self.budget == TINY else "all"
        extras = ["checkpointing"] * self.checkpointing + ["tied"] * self.tied + [self.mutant] * bool(self.mutant)
        return "-".join(
            [self.use, f"zero{self.zero}", f"{self.ranks}ranks", budget, self.dtype, self.optimizer, *map(str, extras)]
        ).replace(" ", "_")

    def config(self) -> dict[str, Any]:
        return {
            "model": {"dtype": self.dtype, "gradient_checkpointing": self.checkpointing},
            "data": {"max_prompt_tokens": MAX_PROMPT},
            "rollout": {"temperature": TEMPERATURE, "max_completion_tokens": MAX_COMPLETION},
            "learner": {
                "zero_stage": self.zero,
                "optimizer": self.optimizer,
                "tokens_per_micro_batch": self.budget,
                "learning_rate": RATE,
                "weight_decay": DECAY,
                "max_grad_norm": MAX_NORM,
                "clip_low": LOW,
                "clip_high": HIGH,
                "kl_coefficient": BETA,
                "logprob_chunk_tokens": 16,
                "deadline_seconds": 60.0,
                **dict(self.learner),
            },
            "cluster": {"learner_ranks": self.ranks},
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


# -- running --------------------------------------------------------------------------------------


def run_processes(folder: Path, models: dict[str, Path], jobs: list[Job], ranks: int) -> dict[str, list[Any]]:
    """Runs the jobs, one after another, in `ranks` fresh processes; what each action answered, by job."""
    folder.mkdir()
    described = [
        {
            "name": job.name,
            "config": job.case.config(),
            "model": str(models["tied" if job.case.tied else "untied"]),
            "reference": str(models["reference"]),
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
        codes = [process.wait(DEADLINE_SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    logs = "\n".join((folder / f"rank_{rank}.log").read_text()[-2000:] for rank in range(ranks))
    assert codes == [0] * ranks, logs
    return {job.name: json.loads((folder / f"{job.name}.json").read_text()) for job in jobs}


def run_all(folder: Path, models: dict[str, Path], *rounds: list[Job]) -> dict[str, list[Any]]:
    """The same for jobs of one and of two ranks, side by side; each round in processes of its own."""
    folder.mkdir()

    def run(ranks: int) -> dict[str, list[Any]]:
        answers: dict[str, list[Any]] = {}
        for number, jobs in enumerate(rounds):
            if chosen := [job for job in jobs if job.case.ranks == ranks]:
                answers |= run_processes(folder / f"{ranks}_ranks_{number}", models, chosen, ranks)
        return answers

    with ThreadPoolExecutor() as pool:
        return {name: answers for found in pool.map(run, (2, 1)) for name, answers in found.items()}


def step_job(case: Case, folder: Path) -> Job:
    return Job(case, [["update", BATCH], ["weights", str(folder / f"{case.name}.safetensors")]])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "untied": tiny_llama(folder / "untied"),
        "tied": tiny_llama(folder / "tied", tied=True),
        "reference": tiny_llama(folder / "reference", seed=1),
    }


# -- what is run in every test run ----------------------------------------------------------------

STEPS = [  # every pair of values of two options occurs
    Case(zero=0, ranks=1, budget=TINY, checkpointing=True),
    Case(zero=1, ranks=1, budget=ALL, tied=True),
    Case(zero=2, ranks=1, budget=TINY, tied=True),
    Case(zero=3, ranks=1, budget=ALL, checkpointing=True),
    Case(zero=0, ranks=2, budget=ALL, tied=True),
    Case(zero=1, ranks=2, budget=TINY, checkpointing=True),
    Case(zero=2, ranks=2, budget=ALL, checkpointing=True),
    Case(zero=3, ranks=2, budget=TINY, tied=True, checkpointing=True),
]
FAULTY = [Case(zero=2, budget=TINY, mutant=name) for name in MUTANTS]
EIGHT_BIT = [Case(zero=zero, optimizer="adamw_8bit", use="eight_bit") for zero in (0, 2, 3)]
BF16 = [  # at a rate that moves a norm's weight of 1 by more than a bfloat16
    Case(zero, ranks=ranks, dtype="bfloat16", optimizer=o, use="train", learner=(("learning_rate", 5e-3),))
    for zero, ranks, o in [*product(range(4), (1,), ("adamw", "adamw_8bit")), (1, 2, "adamw_8bit"), (3, 2, "adamw")]
]
DECAYS = [
    Case(z, optimizer=o, use="decay", learner=(("weight_decay", 0.1), ("learning_rate", 0.1), ("kl_coefficient", 0.0)))
    for z, o in ((0, "adamw"), (1, "adamw_8bit"), (2, "adamw_8bit"), (3, "adamw"))
]
REFUSALS = [
    Case(0, use="refuse"),
    Case(2, use="refuse"),
    Case(3, ranks=2, budget=TINY, use="refuse"),
]
OVERFLOWS = [
    Case(0, use="overflow"),
    Case(3, ranks=2, budget=TINY, use="overflow"),
    *(Case(zero, dtype="bfloat16", use="overflow") for zero in range(4)),
]
SCHEDULE = (("schedule", "cosine"), ("warmup", 1.0))
SAVES = [
    *(Case(z, optimizer=o, use="save", learner=SCHEDULE) for z in (0, 2, 3) for o in ("adamw", "adamw_8bit")),
    *(Case(z, use="save", dtype="bfloat16", optimizer="adamw_8bit", tied=True, learner=SCHEDULE) for z in (0, 1, 2)),
    Case(2, ranks=2, use="save", optimizer="adamw_8bit", learner=SCHEDULE),
    Case(3, ranks=2, use="save", dtype="bfloat16", optimizer="adamw", learner=SCHEDULE),
]


@dataclass(frozen=True)
class Outcomes:
    """Where the weights lie, and what every action answered."""

    folder: Path
    models: dict[str, Path]
    answers: dict[str, list[Any]]

    def weights(self, name: str) -> dict[str, Tensor]:
        return load_file(self.folder / f"{name}.safetensors")

    def checkpoint(self, case: Case) -> Path:
        return self.folder / f"{case.name}-checkpoint"

    def initial(self, case: Case) -> dict[str, Tensor]:
        return load_file(self.models["tied" if case.tied else "untied"] / "model.safetensors")


@pytest.fixture(scope="module")
def outcomes(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Everything of this file but the long test, in as few processes as can be: they take seconds to start."""
    folder = tmp_path_factory.mktemp("outcomes")

    def weights(name: str) -> list[Any]:
        return ["weights", str(folder / f"{name}.safetensors")]

    jobs = [step_job(case, folder) for case in [*STEPS, *FAULTY, *EIGHT_BIT]]
    again = {"seed": 3, "count": 7, "old": 0.0, "advantage": 1.0}
    jobs += [Job(case, [["update", again]] * 3 + [weights(case.name)]) for case in BF16]
    still = {"seed": 3, "count": 7, "advantage": 0.0}
    jobs += [Job(case, [["update", still], weights(case.name)]) for case in DECAYS]
    sampled = {"seed": 3, "count": 7}
    for case in REFUSALS:
        actions = [
            ["update", {**sampled, "on_policy": True, "shift": 0.5}],
            ["update", {**sampled, "advantage": math.nan}],
            weights(case.name + "-refused"),
        ]
        jobs.append(Job(case, actions, suffix="-refused"))
        actions = [["update", {**sampled, "on_policy": True}], ["update", {**sampled, "shift": 0.5}]]
        jobs.append(Job(case, actions, suffix="-accepted"))
    jobs += [Job(case, [["update", {**sampled, "advantage": 1e38}], weights(case.name)]) for case in OVERFLOWS]
    resumed = []
    for case in SAVES:
        checkpoint = folder / f"{case.name}-checkpoint"
        first, last = [["update", BATCH], ["update", OTHER_BATCH]], [["update", BATCH], weights(case.name)]
        save = [weights(case.name + "-saved"), ["save", str(checkpoint)]]
        jobs.append(Job(case, first + save + last))
        last = [["update", BATCH], weights(case.name + "-resumed")]
        resumed.append(Job(case, last, resume=checkpoint, suffix="-resumed"))
    # One rank resumes in a fresh process; for two it would cost two more, so a fresh LearnerRank must do.
    alone = [job for job in resumed if job.case.ranks == 1]
    jobs += [job for job in resumed if job.case.ranks == 2]
    return Outcomes(folder, models, run_all(folder / "runs", models, jobs, alone))


def ids(cases: Iterable[Case]) -> list[str]:
    return [case.name for case in cases]


# -- one step is the plain step -------------------------------------------------------------------


def norm(tensors: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float((t.double() ** 2).sum()) for t in tensors.values()))


def minus(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
    assert a.keys() == b.keys()
    return {name: a[name].double() - b[name].double() for name in a}


@cache
def plain_step(model: Path, reference: Path) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The weights and metrics after one AdamW step on BATCH: float64, one sequence at a time, no learner code."""
    policy, other = open_plain(model, torch.float64), open_plain(reference, torch.float64)
    sequences = with_old(
        as_sampled(tiny_completions(BATCH["seed"], BATCH["count"]), model, TEMPERATURE), BATCH["seed"], BATCH["old"]
    )
    logprobs = [plain_logprobs(policy, s, TEMPERATURE) for s in sequences]
    completions = []
    for s, values in zip(sequences, logprobs, strict=True):
        assert s.old_logprobs is not None
        with torch.no_grad():
            wanted = plain_logprobs(other, s, TEMPERATURE).tolist()
        completions.append(PlainCompletion(values.tolist(), s.old_logprobs.tolist(), wanted, s.advantage))
    loss = plain_grpo(completions, LOW, HIGH, BETA)
    pairs = zip(logprobs, loss.gradient, strict=True)
    torch.stack([(values * torch.tensor(slopes)).sum() for values, slopes in pairs]).sum().backward()
    gradient = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    size = norm(gradient)
    weights = {}
    for name, p in policy.named_parameters():
        step = gradient[name] * min(1.0, MAX_NORM / size)  # of AdamW's first step both moments are the gradient's own
        decayed = p.detach() * (1.0 - RATE * DECAY) if p.ndim >= 2 else p.detach()
        weights[name] = decayed - RATE * step / (step.abs() + ADAM_EPSILON)
    metrics = {
        "policy/loss": loss.value,
        "policy/grad_norm": size,
        "policy/learning_rate": RATE,
        "policy/clip_fraction": loss.clip_fraction,
        "policy/kl": loss.kl,
        "tokens/trained": float(sum(len(row) for row in loss.gradient)),
    }
    return weights, metrics


@dataclass(frozen=True)
class Difference:
    """How far a rank's step is from the plain one: by the weights, by the step, by the worst metric."""

    weights: float
    step: float
    metrics: float

    @property
    def same(self) -> bool:
        return self.weights <= WEIGHTS_LIMIT and self.step <= UPDATE_LIMIT and self.metrics <= METRIC_LIMIT


def difference(
    case: Case, metrics: dict[str, float], weights: dict[str, Tensor], models: dict[str, Path]
) -> Difference:
    model = models["tied" if case.tied else "untied"]
    plain_weights, plain_metrics = plain_step(model, models["reference"])
    distance = norm(minus(weights, plain_weights))
    stepped = norm(minus(plain_weights, load_file(model / "model.safetensors")))
    worst = max(abs(metrics[name] - value) / abs(value) for name, value in plain_metrics.items())
    return Difference(distance / norm(plain_weights), distance / stepped, worst)


@pytest.mark.parametrize("case", STEPS, ids=ids(STEPS))
def test_one_step_is_the_plain_step(case: Case, outcomes: Outcomes) -> None:
    found = difference(case, outcomes.answers[case.name][0], outcomes.weights(case.name), outcomes.models)
    assert found.same, found


def test_one_step_logs_what_the_sampler_would_say(outcomes: Outcomes) -> None:
    for case in STEPS:
        metrics = outcomes.answers[case.name][0]
        assert metrics["rollout/logprob_diff"] < 1e-6 and metrics["rollout/logprob_diff_max"] < 1e-5


@pytest.mark.parametrize("case", FAULTY, ids=[case.mutant for case in FAULTY])
def test_the_comparison_sees_a_planted_fault(case: Case, outcomes: Outcomes) -> None:
    found = difference(case, outcomes.answers[case.name][0], outcomes.weights(case.name), outcomes.models)
    assert found.weights > 2 * WEIGHTS_LIMIT and found.step > 2 * UPDATE_LIMIT, found


@pytest.mark.parametrize("case", EIGHT_BIT, ids=ids(EIGHT_BIT))
def test_the_first_step_in_8_bits_is_that_of_32(case: Case, outcomes: Outcomes) -> None:
    found = difference(case, outcomes.answers[case.name][0], outcomes.weights(case.name), outcomes.models)
    assert found.same, found


@pytest.mark.long
def test_one_step_is_the_plain_step_in_every_combination(models: dict[str, Path], tmp_path: Path) -> None:
    options = product(range(4), (1, 2), (TINY, ALL), (False, True), (False, True))
    cases = [Case(*values) for values in options]
    answers = run_all(tmp_path / "product", models, [step_job(case, tmp_path) for case in cases])
    found = {
        case.name: difference(case, answers[case.name][0], load_file(tmp_path / f"{case.name}.safetensors"), models)
        for case in cases
    }
    assert all(f.same for f in found.values()), found


# -- bfloat16, weight decay -----------------------------------------------------------------------


@pytest.mark.parametrize("case", BF16, ids=ids(BF16))
def test_bfloat16_trains(case: Case, outcomes: Outcomes) -> None:
    *updates, version, _ = outcomes.answers[case.name]
    losses = [metrics["policy/loss"] for metrics in updates]
    assert version == 3 and all(math.isfinite(loss) for loss in losses)
    assert all(0 < metrics["policy/grad_norm"] < math.inf for metrics in updates)
    assert losses[2] < losses[0]  # the same completions, all wanted, become likelier
    weights, before = outcomes.weights(case.name), outcomes.initial(case)
    for name, tensor in weights.items():
        assert tensor.dtype == torch.bfloat16
        assert not torch.equal(tensor, before[name].bfloat16()), name


@pytest.mark.parametrize("case", DECAYS, ids=ids(DECAYS))
def test_without_a_gradient_matrices_decay_and_norms_stay(case: Case, outcomes: Outcomes) -> None:
    assert outcomes.answers[case.name][0]["policy/grad_norm"] == 0.0
    before = outcomes.initial(case)
    for name, tensor in outcomes.weights(case.name).items():
        if tensor.ndim >= 2:
            torch.testing.assert_close(tensor, before[name] * (1 - 0.1 * 0.1), rtol=1e-6, atol=0)
        else:
            assert torch.equal(tensor, before[name]), name


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", REFUSALS, ids=ids(REFUSALS))
def test_log_probs_that_are_not_the_samplers_stop_an_on_policy_update_before_the_step(
    case: Case, outcomes: Outcomes
) -> None:
    wrong, nan, version, _ = outcomes.answers[case.name + "-refused"]
    assert "rollout.logprob_diff_mean=0.001" in wrong["error"] and "rollout.logprob_diff_max=0.1" in wrong["error"]
    assert "5.00e-01 on average" in wrong["error"]
    assert "The loss of policy version 0 is nan" in nan["error"]
    assert version == 0
    before = outcomes.initial(case)
    for name, tensor in outcomes.weights(case.name + "-refused").items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("case", REFUSALS, ids=ids(REFUSALS))
def test_the_right_log_probs_pass_on_policy_and_any_pass_off_policy(case: Case, outcomes: Outcomes) -> None:
    on_policy, off_policy, _ = outcomes.answers[case.name + "-accepted"]
    assert on_policy["rollout/logprob_diff_max"] < 1e-5
    assert off_policy["rollout/logprob_diff"] > 0.4


@pytest.mark.parametrize("case", OVERFLOWS, ids=ids(OVERFLOWS))
def test_a_gradient_that_overflows_under_a_finite_loss_stops_the_run(case: Case, outcomes: Outcomes) -> None:
    answer, version, _ = outcomes.answers[case.name]
    assert "The gradient of policy version 0 overflowed" in answer["error"]
    assert version == 0


# -- save and restore -----------------------------------------------------------------------------


@pytest.mark.parametrize("case", SAVES, ids=ids(SAVES))
def test_a_restored_rank_goes_on_bit_for_bit(case: Case, outcomes: Outcomes) -> None:
    *_, metrics, version, _ = outcomes.answers[case.name]
    resumed_metrics, resumed_version, _ = outcomes.answers[case.name + "-resumed"]
    assert (metrics, version) == (resumed_metrics, resumed_version)
    assert version == 3 and metrics["policy/learning_rate"] < RATE
    left_alone, resumed = outcomes.weights(case.name), outcomes.weights(case.name + "-resumed")
    assert left_alone.keys() == resumed.keys()
    assert all(torch.equal(left_alone[name], resumed[name]) for name in left_alone)
    saved = outcomes.weights(case.name + "-saved")
    assert norm(minus(left_alone, saved)) > 1e-4 * norm(saved)  # and it goes on indeed


@pytest.mark.parametrize("case", SAVES, ids=ids(SAVES))
def test_a_checkpoint_opens_with_transformers_and_holds_no_pickle(case: Case, outcomes: Outcomes) -> None:
    folder = outcomes.checkpoint(case)
    files = {path for path in folder.rglob("*") if path.is_file()}
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jinja", ".txt", ".model"}
    assert {path.name for path in (folder / "trainer").iterdir()} == {
        f"rank_{rank}.{suffix}" for rank in range(case.ranks) for suffix in ("json", "safetensors")
    }
    saved = outcomes.weights(case.name + "-saved")
    opened = dict(open_plain(folder, getattr(torch, case.dtype)).named_parameters())
    assert opened.keys() == saved.keys()
    assert all(torch.equal(opened[name], saved[name]) for name in saved)
    assert json.loads((folder / "config.json").read_text())["use_cache"] is True
    assert AutoTokenizer.from_pretrained(folder).chat_template


@pytest.mark.parametrize("case", [c for c in SAVES if c.optimizer == "adamw_8bit"], ids=lambda case: case.name)
def test_8_bit_state_is_saved_in_8_bits(case: Case, outcomes: Outcomes) -> None:
    tensors = load_file(outcomes.checkpoint(case) / "trainer" / "rank_0.safetensors")
    held = {name: tensor for name, tensor in tensors.items() if name.endswith((".state1", ".state2"))}
    assert any(tensor.dtype == torch.uint8 and tensor.any() for tensor in held.values())


def test_flushing_passes_over_the_draft_of_another_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"whole")
    draft = tmp_path / ".tmp0"
    draft.write_bytes(b"draft")
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    listed = [*tmp_path.rglob("*")]
    draft.rename(tmp_path / "rank_1.safetensors")
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: iter(listed))
    flush_to_disk(tmp_path)
    assert sorted(flushed) == [str(tmp_path), str(tmp_path / "model.safetensors")]
