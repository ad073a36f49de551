"""What a step's groups say: rewards, verdicts, lengths."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from actors.sampling import Sampled
from data.records import OUTCOMES, Group


def group_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Means over all completions of a step; `reward/flat_groups` is the share of groups without spread.

    `verdict/correct` is lenient; `verdict/correct_strict` leaves out answers that stood in no tag or box.
    """
    verdicts = [verdict for group in groups for verdict in group.verdicts]
    completions = [completion for group in groups for completion in group.completions]
    totals = np.array([[verdict.total for verdict in group.verdicts] for group in groups])
    lengths = np.array([len(completion.token_ids) for completion in completions])
    metrics = {
        "reward/mean": float(totals.mean()),
        "reward/std": float(totals.std()),
        "reward/flat_groups": float((totals == totals[:, :1]).all(axis=1).mean()),
        "rollout/length": float(lengths.mean()),
        "rollout/truncated": sum(c.truncated for c in completions) / len(completions),
        "tokens/sampled": float(lengths.sum()),
    }
    for name in verdicts[0].rewards:
        metrics[f"reward/{name}"] = float(np.mean([verdict.rewards[name] for verdict in verdicts]))
    for outcome in OUTCOMES:
        metrics[f"verdict/{outcome}"] = sum(v.outcome == outcome for v in verdicts) / len(verdicts)
    strictly = sum(v.outcome == "correct" and v.marked for v in verdicts)
    metrics["verdict/correct_strict"] = strictly / len(verdicts)
    return metrics


def staleness_metrics(sampled: Sampled, version: int) -> dict[str, float]:
    """By how many policy versions each completion's oldest token is behind; groups that were too old to be used."""
    oldest = [int(c.versions.min()) for group in sampled.groups for c in group.completions]
    return {
        "rollout/staleness": version - float(np.mean(oldest)),
        "rollout/staleness_max": float(version - min(oldest)),
        "rollout/stale_dropped": float(sampled.dropped),
    }
