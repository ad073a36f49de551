"""TRL's loss and gradient of one optimizer step: `.venv-trl/bin/python -m tests.trl_losses IN OUT` (see test_trl.py).

IN is JSON: folders of the models `policy`, `old` and `reference`, the completions of a generation batch, and cases
(GRPOConfig entries by name). What TRL makes of a case is all TRL's, from rewards and the sampler's log-probs on.
OUT is a safetensors file: `case/loss`, `case/gradient/parameter`, `case/told/name`.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

# TRL imports these wherever it finds them, at a cost of ten seconds, and needs none of them here.
# ruff: noqa: E402
sys.modules.update(dict.fromkeys(("vllm", "peft", "deepspeed", "bitsandbytes")))  # type: ignore[arg-type]

import torch
import transformers
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer
from trl.trainer import grpo_trainer

PLAIN = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "gradient_checkpointing": False}

Rows = list[dict[str, Any]]
Batch = dict[str, Tensor]


def weights(folder: str) -> dict[str, Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def rewards_given(completions: list[str], reward: list[float], **_: object) -> list[float]:
    """TRL hands a reward function the columns of the dataset; ours holds the rewards."""
    return reward


def trainer_of(config: dict[str, Any], task: dict[str, Any], output: str) -> GRPOTrainer:
    """A trainer that holds the old policy and takes the given completions for its own samples."""
    completions = task["completions"]

    def rollout(prompts: list[str], _: GRPOTrainer) -> dict[str, list[list[float]]]:
        return {name: [c[name] for c in completions] for name in ("prompt_ids", "completion_ids", "logprobs")}

    trainer = GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(task["old"], dtype=torch.float32),
        rewards_given,
        GRPOConfig(output, **PLAIN, **config),
        Dataset.from_list(rows_of(task)),
        processing_class=AutoTokenizer.from_pretrained(task["old"], padding_side="left"),
        rollout_func=rollout,
    )
    if trainer.ref_model is not None:
        trainer.ref_model.load_state_dict(weights(task["reference"]))
    # The correction is only made with vLLM, which a rollout function that returns log-probs stands in for: TRL
    # believes that it is there and has the newest weights.
    trainer.use_vllm = config["vllm_importance_sampling_correction"]
    trainer._last_loaded_step = trainer.state.global_step
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps  # as train() does
    trainer.model.train()
    return trainer


def rows_of(task: dict[str, Any]) -> Rows:
    return [{"prompt": "", "reward": c["reward"]} for c in task["completions"]]


def split(batches: list[Batch], sizes: list[int]) -> list[Batch]:
    """The same completions in micro-batches of other sizes."""
    names = [name for name, value in batches[0].items() if value.dim()]
    pieces = {name: torch.cat([batch[name] for batch in batches]).split(sizes) for name in names}
    return [{**batches[0], **{name: pieces[name][i] for name in names}} for i in range(len(sizes))]


def step(case: dict[str, Any], task: dict[str, Any], output: str) -> dict[str, Tensor]:
    """Loss, gradient, metrics and advantages of the first optimizer step on a generation batch.

    With num_iterations 2 the old policy scores the batch in the first iteration, and the step is that of the second,
    when the weights are the policy's.
    """
    trainer, rows = trainer_of(case["config"], task, output), rows_of(task)
    if trainer.num_iterations > 1:
        trainer._prepare_inputs(rows)
        trainer._step = trainer.args.steps_per_generation
        if case["sizes"]:
            trainer._buffered_inputs = split(trainer._buffered_inputs, case["sizes"])
    trainer.model.load_state_dict(weights(task["policy"]))
    accumulated = trainer.current_gradient_accumulation_steps
    loss = sum(trainer.training_step(trainer.model, rows, None) for _ in range(accumulated))
    gradients = {f"gradient/{name}": p.grad for name, p in trainer.model.named_parameters()}
    metrics = {f"told/{name}": torch.tensor(values) for name, values in trainer._metrics["train"].items()}
    advantages = torch.cat([batch["advantages"] for batch in trainer._buffered_inputs])
    return {"loss": torch.as_tensor(loss), "told/advantages": advantages, **gradients, **metrics}


def main(source: str, target: str) -> None:
    task = json.loads(Path(source).read_text())
    transformers.logging.set_verbosity_error()
    # So that the caller knows which completions share a micro-batch.
    grpo_trainer.shuffle_sequence_dict = lambda batch: batch
    found: dict[str, Tensor] = {}
    with tempfile.TemporaryDirectory() as output:
        for name, case in task["cases"].items():
            found |= {f"{name}/{key}": value for key, value in step(case, task, output).items()}
    save_file(found, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
