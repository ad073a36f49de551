"""Groups with verdicts into the sequences of an update batch."""

from __future__ import annotations

from collections.abc import Sequence as ListOf

import numpy as np

from data.records import Group
from learner.advantages import group_advantages
from learner.batching import Sequence


def sequences_of(groups: ListOf[Group]) -> list[Sequence]:
    """One sequence a completion, in order, with its group's advantage."""
    rewards = np.array([[verdict.total for verdict in group.verdicts] for group in groups])
    return [
        Sequence(
            prompt_ids=np.asarray(group.prompt.token_ids, dtype=np.int32),
            completion_ids=completion.token_ids,
            sampler_logprobs=completion.logprobs,
            advantage=float(advantage),
        )
        for group, advantages in zip(groups, group_advantages(rewards), strict=True)
        for completion, advantage in zip(group.completions, advantages, strict=True)
    ]
