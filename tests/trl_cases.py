"""The optimizer steps asked of us and of TRL, in our words and in TRL's, and the completions they are made on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.tokenizer import build_tokenizer
from learner.advantages import group_advantages
from learner.batching import Sequence
from learner.objectives import LossOptions
from tests.tiny import MAX_COMPLETION, as_sampled, open_plain, tiny_completions, tiny_llama

GROUPS, GROUP = 2, 4
COUNT = GROUPS * GROUP
TEMPERATURE = 0.7


@dataclass(frozen=True)
class Step:
    """What is asked for.

    micro_batches: TRL's, as ours are by tokens; `sizes`: completions of each, if not equally many. on_policy: pi_old
    is the policy. `trl`: TRL's options that have no word of ours.
    """

    options: LossOptions
    micro_batches: int = 1
    sizes: tuple[int, ...] = ()
    mask_truncated: bool = False
    on_policy: bool = False
    trl: Mapping[str, Any] = field(default_factory=dict)


def in_trls_words(step: Step) -> dict[str, Any]:
    """GRPOConfig entries. GSPO is a level of TRL's grpo, and for CISPO epsilon_high is the cap itself, not cap - 1."""
    options = step.options
    gspo, cispo = options.objective == "gspo", options.objective == "cispo"
    return {
        "loss_type": "grpo" if gspo else options.objective,
        "importance_sampling_level": "sequence" if gspo else "token",
        "epsilon": options.clip_low,
        "epsilon_high": options.ratio_cap if cispo else options.clip_high,
        "delta": None if cispo else options.ratio_cap,
        "beta": options.kl_coefficient,
        "use_bias_correction_kl": False,
        "entropy_coef": options.entropy_coefficient,
        "vllm_importance_sampling_correction": options.importance_correction != "off",
        "vllm_importance_sampling_mode": (
            "sequence_mask" if options.importance_correction == "sequence" else "token_truncate"
        ),
        "vllm_importance_sampling_clip_max": options.importance_cap,
        "mask_truncated_completions": step.mask_truncated,
        "temperature": TEMPERATURE,
        "max_completion_length": MAX_COMPLETION,
        "num_generations": GROUP,
        "scale_rewards": "none",
        "num_iterations": 1 if step.on_policy else 2,
        "gradient_accumulation_steps": step.micro_batches,
        "per_device_train_batch_size": COUNT // step.micro_batches,
        **step.trl,
    }


# -- steps ----------------------------------------------------------------------------------------

PLAIN = {
    "grpo": LossOptions("grpo", clip_low=0.1, clip_high=0.3),
    "dr_grpo": LossOptions("dr_grpo", clip_low=0.1, clip_high=0.3),
    "dapo": LossOptions("dapo", clip_low=0.1, clip_high=0.3),
    "gspo": LossOptions("gspo", clip_low=0.02, clip_high=0.06),
    "cispo": LossOptions("cispo", ratio_cap=1.3),
}
BONUS = 0.5
KL: dict[str, Any] = {"kl_coefficient": 0.1}
TOKEN: dict[str, Any] = {"importance_correction": "token", "importance_cap": 1.1}
SEQUENCE: dict[str, Any] = {"importance_correction": "sequence", "importance_cap": 1.8}


def settings(name: str) -> dict[str, Step]:
    """An objective as it is, with each option, and with all of them."""
    plain = PLAIN[name]
    cap = plain.ratio_cap or (1.1 if name == "gspo" else 1.4)
    steps = {
        "as it is": Step(plain),
        "on-policy": Step(plain, on_policy=True),
        "KL": Step(replace(plain, **KL)),
        "token correction": Step(replace(plain, **TOKEN)),
        "sequence correction": Step(replace(plain, **SEQUENCE)),
        "truncated left out": Step(plain, mask_truncated=True),
        "four micro-batches": Step(plain, micro_batches=4),
        "everything": Step(replace(plain, **KL, **TOKEN, ratio_cap=cap), micro_batches=2, mask_truncated=True),
    }
    if name != "cispo":
        steps["two-sided clip"] = Step(replace(plain, ratio_cap=cap))
    if name in ("dapo", "cispo"):
        steps["entropy bonus"] = Step(replace(plain, entropy_coefficient=BONUS))
    return {f"{name}, {setting}": step for setting, step in steps.items()}


SAME = {case: step for name in PLAIN for case, step in settings(name).items()}
DIFFERENT = {
    "corrected KL": Step(
        replace(PLAIN["grpo"], kl_coefficient=1.0), on_policy=True, trl={"use_bias_correction_kl": True}
    ),
    "top_k": Step(PLAIN["dapo"], on_policy=True, trl={"top_k": 5}),
    "top_p": Step(PLAIN["dapo"], on_policy=True, trl={"top_p": 0.8}),
    "grpo, uneven": Step(PLAIN["grpo"], micro_batches=2, sizes=(3, 5)),
    "dr_grpo, uneven": Step(PLAIN["dr_grpo"], micro_batches=2, sizes=(3, 5)),
    "half": Step(PLAIN["dapo"], micro_batches=2, trl={"gradient_accumulation_steps": 1, "steps_per_generation": 2}),
    "bonus": Step(replace(PLAIN["grpo"], entropy_coefficient=BONUS), micro_batches=2),
    "group_std": Step(PLAIN["grpo"], trl={"scale_rewards": "group"}),
    "batch_std": Step(PLAIN["grpo"], trl={"scale_rewards": "batch"}),
}
STEPS = SAME | DIFFERENT


# -- models and completions -----------------------------------------------------------------------


@dataclass(frozen=True)
class Models:
    """Folders of the policy, of pi_old and of the reference, which are near each other."""

    policy: Path
    old: Path
    reference: Path


def models_in(folder: Path) -> Models:
    policy = tiny_llama(folder / "policy")
    return Models(policy, _near(policy, folder / "old", 1, 0.01), _near(policy, folder / "reference", 2, 0.02))


def _near(source: Path, folder: Path, seed: int, spread: float) -> Path:
    model: Any = open_plain(source)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(spread * torch.randn(parameter.shape, generator=draw))
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def rewards() -> np.ndarray:
    """[GROUPS, GROUP]"""
    return np.random.default_rng(6).normal(size=(GROUPS, GROUP))


def completions(old: Path) -> list[Sequence]:
    """Random completions, every third without an end, scored by pi_old, and by a sampler that is not quite pi_old."""
    random, tokenizer = np.random.default_rng(5), build_tokenizer()
    advantages = group_advantages(rewards(), "no_std").ravel()
    sequences = []
    for index, s in enumerate(tiny_completions(5, COUNT)):
        truncated = index % 3 == 0
        end = tokenizer.convert_tokens_to_ids("7") if truncated else tokenizer.eos_token_id
        ids = np.append(s.completion_ids[:-1], end).astype(np.int32)
        sequences.append(replace(s, completion_ids=ids, truncated=truncated, advantage=float(advantages[index])))
    return [
        replace(
            s,
            old_logprobs=s.sampler_logprobs,
            sampler_logprobs=(s.sampler_logprobs + 0.2 * random.normal(size=len(s.completion_ids))).astype(np.float32),
        )
        for s in as_sampled(sequences, old, TEMPERATURE)
    ]
