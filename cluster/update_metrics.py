"""The metrics of a step's updates, as one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from learner.alarms import PREFIX


def combined(updates: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over the updates that made their step, or else over those that a guard skipped.

    policy/updates is the number of steps, policy/filtered a mean over all updates, seconds are a sum over them, and
    every guard that fired has a count. Of updates that filtering left empty only policy/updates and policy/filtered
    exist.
    """
    made = [update for update in updates if update["policy/updates"]]
    told = made or [update for update in updates if "policy/loss" in update] or updates
    means = {name: _mean(told, name) for name in told[0] if not name.startswith(PREFIX)}
    # Later updates of a batch are off-policy: only the first compares like with like.
    means |= {name: value for name, value in told[0].items() if name.startswith("rollout/")}
    added = {name for update in updates for name in update if name.startswith((PREFIX, "time/"))}
    means |= {name: sum(update.get(name, 0.0) for update in updates) for name in sorted(added)}
    return means | {"policy/updates": float(len(made)), "policy/filtered": _mean(updates, "policy/filtered")}


def _mean(updates: Sequence[dict[str, float]], name: str) -> float:
    return float(np.mean([update[name] for update in updates]))
