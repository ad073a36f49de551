"""The learning rate of every optimizer step."""

from __future__ import annotations

import math

from configs.schema import Learner


def warmup_updates(warmup: float, total: int) -> int:
    """Optimizer steps of warm-up: a count if 1 or more, else a share of the total."""
    return int(warmup) if warmup >= 1 else round(warmup * total)


def learning_rate(learner: Learner, update: int, total: int) -> float:
    """Learning rate of optimizer step `update` (from 0) of `total`: linear warm-up, then the schedule."""
    warm = warmup_updates(learner.warmup, total)
    if update < warm:
        return learner.learning_rate * (update + 1) / warm
    done = min(1.0, (update - warm) / max(1, total - warm))
    floor = learner.min_learning_rate_ratio
    decay = {
        "constant": 1.0,
        "linear": 1.0 - (1.0 - floor) * done,
        "cosine": floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * done)),
    }
    return learner.learning_rate * decay[learner.schedule]
