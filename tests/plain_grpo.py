"""GRPO written down once more, straight from the paper: token by token, no tensors, derivatives by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PlainCompletion:
    """One completion o_i: its log-probs under pi_theta, pi_old and (for the KL) pi_ref, and its advantage."""

    logprobs: Sequence[float]
    old_logprobs: Sequence[float]
    reference_logprobs: Sequence[float] | None
    advantage: float


@dataclass(frozen=True)
class PlainLoss:
    """-J of Shao et al. 2024, eq. 3; `scale` sums the sizes of its terms, `gradient` is by log-prob of each token."""

    value: float
    scale: float
    kl: float
    clip_fraction: float
    gradient: list[list[float]]


def plain_grpo(completions: Sequence[PlainCompletion], low: float, high: float, beta: float) -> PlainLoss:
    """Mean over completions of the mean over tokens of -(min(r A, clip(r) A) - beta KL), KL as in eq. 4."""
    value = scale = mean_kl = 0.0
    clipped_tokens = 0
    gradient = []
    for completion in completions:
        share = 1.0 / len(completions) / len(completion.logprobs)
        row = []
        for t, logprob in enumerate(completion.logprobs):
            ratio = math.exp(logprob - completion.old_logprobs[t])
            if ratio < 1.0 - low:
                clipped = 1.0 - low
            elif ratio > 1.0 + high:
                clipped = 1.0 + high
            else:
                clipped = ratio
            unclipped_counts = ratio * completion.advantage <= clipped * completion.advantage
            surrogate = (ratio if unclipped_counts else clipped) * completion.advantage
            slope = -ratio * completion.advantage if unclipped_counts else 0.0
            kl = 0.0
            if completion.reference_logprobs is not None:
                quotient = math.exp(completion.reference_logprobs[t]) / math.exp(logprob)
                kl = quotient - math.log(quotient) - 1.0
                slope += beta * (1.0 - quotient)
            clipped_tokens += not unclipped_counts
            mean_kl += share * kl
            value += share * (-surrogate + beta * kl)
            scale += share * (abs(surrogate) + beta * abs(kl))
            row.append(share * slope)
        gradient.append(row)
    return PlainLoss(value, scale, mean_kl, clipped_tokens / sum(len(row) for row in gradient), gradient)
