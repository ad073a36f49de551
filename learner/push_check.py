"""The proof that pushed weights arrived: the sampler's log-probs of its own tokens beside the learner's of the same."""

from __future__ import annotations

from collections.abc import Sequence as ListOf

import numpy as np

from configs.errors import RunError
from data.records import Group
from learner.alarms import Alarms
from learner.batching import Sequence

WORST_TOKEN = 100  # a single token's log-prob may differ by so many times what the mean may


def check_logprobs(alarms: Alarms, mean: float, worst: float, limit: float, version: int) -> None:
    """Raise the alarm if log-probs differ by more than `limit` on average, or a hundred times that for one token."""
    # Written so that a difference that is not a number is over the limit too.
    if mean <= limit and worst <= WORST_TOKEN * limit:
        return
    alarms.raised(
        "logprob_diff",
        f"The rollout workers' log-probs are not the learner's at policy version {version}: they "
        f"differ by {mean:.2e} on average (limit rollout.logprob_diff={limit:g}) "
        f"and {worst:.2e} at most (limit {WORST_TOKEN} times that). The weight "
        "sync did not bring these weights, or the two compute differently; in bfloat16 allow more.",
    )


def probe_sequences(probes: ListOf[Group], version: int) -> list[Sequence]:
    """The probes' completions, as the learner takes them. RunError if one was not sampled by this policy version."""
    completions = [(group.prompt, completion) for group in probes for completion in group.completions]
    versions = {int(v) for _, completion in completions for v in completion.versions}
    if versions != {version}:
        raise RunError(
            f"After the push of policy version {version} a rollout worker sampled with {sorted(versions)}. The weight "
            "sync did not reach it; look at its log, and resume from the newest checkpoint."
        )
    return [
        Sequence(
            prompt_ids=np.asarray(prompt.token_ids, dtype=np.int32),
            completion_ids=completion.token_ids,
            sampler_logprobs=completion.logprobs,
            advantage=1.0,
        )
        for prompt, completion in completions
    ]


def difference(probed: ListOf[Sequence]) -> tuple[float, float]:
    """(mean, largest) difference per token of sequences whose `old_logprobs` are the learner's own."""
    parts = [np.abs(s.old_logprobs - s.sampler_logprobs) for s in probed if s.old_logprobs is not None]
    every = np.concatenate(parts)
    return float(every.mean()), float(every.max())
