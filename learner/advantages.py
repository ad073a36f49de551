"""Advantages of completions from the rewards of their group."""

from __future__ import annotations

from typing import Literal

import numpy as np

EPSILON = 1e-6

Kind = Literal["group_std", "batch_std", "no_std", "leave_one_out"]


def group_advantages(rewards: np.ndarray, kind: Kind = "group_std") -> np.ndarray:
    """How much better each completion is than its group.

    rewards: float [prompts, completions]. Returns float32 of the same shape.
    group_std: (reward - group mean) / group standard deviation (GRPO, Shao et al. 2024, eq. 3).
    batch_std: the same with the standard deviation of all rewards of the sampling batch.
    no_std: reward - group mean (Dr. GRPO, Liu et al. 2025).
    leave_one_out: reward - mean of the other rewards of the group (RLOO, Ahmadian et al. 2024).
    Standard deviations are the sample's (n - 1). A group whose rewards are all equal gets exact zeros,
    never float noise.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    if kind == "group_std":
        scaled = centred / (rewards.std(axis=1, ddof=1, keepdims=True) + EPSILON)
    elif kind == "batch_std":
        scaled = centred / (rewards.std(ddof=1) + EPSILON)
    elif kind == "leave_one_out":
        size = rewards.shape[1]
        scaled = centred * size / (size - 1)
    else:
        scaled = centred
    return np.where(flat_groups(rewards)[:, None], 0.0, scaled).astype(np.float32)


def flat_groups(rewards: np.ndarray) -> np.ndarray:
    """Which groups have all rewards equal, exactly: bool [prompts] from float [prompts, completions]."""
    rewards = np.asarray(rewards, dtype=np.float64)
    return (rewards == rewards[:, :1]).all(axis=1)
