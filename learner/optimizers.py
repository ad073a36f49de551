"""AdamW in 32 and in 8 bits. The only file that knows bitsandbytes."""

from __future__ import annotations

from typing import Any

import torch

from configs.schema import Learner


def build_optimizer(module: torch.nn.Module, learner: Learner) -> torch.optim.Optimizer:
    """The optimizer of `learner.optimizer`; matrices decay, vectors (norms, biases) do not.

    Its learning rate is 0 until the first update sets it: some DeepSpeed wrappers step once on zero
    gradients when they are built, and that step must change no weight.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": learner.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    options: dict[str, Any] = {"lr": 0.0, "betas": learner.betas}
    if learner.optimizer == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, **options)
    return torch.optim.AdamW(groups, **options)
