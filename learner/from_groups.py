"""Groups with verdicts into the sequences of update batches."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as ListOf

import numpy as np

from configs.schema import Learner
from data.records import Group
from learner.advantages import group_advantages
from learner.batching import Sequence

OptimalValues = Mapping[str, float]


def sequences_of(groups: ListOf[Group], learner: Learner, values: OptimalValues | None = None) -> list[Sequence]:
    """One sequence a completion, in order, with its advantage.

    values: A*-PO's V* by problem id; the advantage is then the reward minus its problem's value.
    """
    rewards = np.array([[verdict.total for verdict in group.verdicts] for group in groups])
    if learner.objective == "a_star_po":
        assert values is not None
        advantages = rewards - np.array([[values[group.prompt.problem.id]] for group in groups])
    else:
        advantages = group_advantages(rewards, learner.resolved_advantage)
    return [
        Sequence(
            prompt_ids=np.asarray(group.prompt.token_ids, dtype=np.int32),
            completion_ids=completion.token_ids,
            sampler_logprobs=completion.logprobs,
            advantage=float(advantage),
            truncated=completion.truncated,
        )
        for group, row in zip(groups, advantages, strict=True)
        for completion, advantage in zip(group.completions, row, strict=True)
    ]


def update_batches(sequences: ListOf[Sequence], size: int, token_budget: int | None) -> list[list[Sequence]]:
    """A sampling batch cut into update batches of `size` completions.

    With a token budget (C3PO) there is one: the first completions, in order, whose tokens fit into it. It ends
    at the first that does not fit, as going on to shorter ones would favour them; one is always taken.
    """
    if token_budget is None:
        return [list(sequences[first : first + size]) for first in range(0, len(sequences), size)]
    ends = np.cumsum([len(s.completion_ids) for s in sequences])
    return [list(sequences[: max(1, int((ends <= token_budget).sum()))])]
