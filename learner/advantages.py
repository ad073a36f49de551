"""Advantages of completions from the rewards of their group."""

from __future__ import annotations

import numpy as np

EPSILON = 1e-6


def group_advantages(rewards: np.ndarray) -> np.ndarray:
    """(reward - group mean) / group standard deviation, GRPO's advantage (Shao et al. 2024, eq. 3).

    rewards: float [prompts, completions]. Returns float32 of the same shape. A group whose rewards
    are all equal gets exact zeros, never float noise.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    scaled = centred / (rewards.std(axis=1, ddof=1, keepdims=True) + EPSILON)
    flat = (rewards == rewards[:, :1]).all(axis=1, keepdims=True)
    return np.where(flat, 0.0, scaled).astype(np.float32)
