"""The objectives: pure functions from a dataclass of tensors to a loss and its statistics.

An objective gives one value a token; `weights`, fixed over the whole update batch, turn the values
of all micro-batches into one loss. So which mean a paper takes (over sequences, over tokens, over a
constant) is the business of the weights (`learner.batching`), and everything else stands here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from configs.schema import Learner


@dataclass(frozen=True, eq=False)
class LossInputs:
    """Everything an objective may look at, one entry a completion token of the micro-batch.

    logprobs (pi) and, with an entropy bonus, entropies carry the gradient. old_logprobs are the
    learner's at the start of the update batch (pi_old), sampler_logprobs the sampler's. `sequence`
    tells completions apart (-1: a dummy's token); each is whole within its micro-batch. `weights` are
    loss weights over the whole update batch (not over the micro-batch), so losses and gradients of
    micro-batches add up.
    """

    logprobs: Float[Tensor, " tokens"]
    old_logprobs: Float[Tensor, " tokens"]
    sampler_logprobs: Float[Tensor, " tokens"]
    reference_logprobs: Float[Tensor, " tokens"] | None
    entropies: Float[Tensor, " tokens"]
    advantages: Float[Tensor, " tokens"]
    weights: Float[Tensor, " tokens"]
    sequence: Int[Tensor, " tokens"]


@dataclass(frozen=True)
class LossOptions:
    """What the config says of the loss; `loss_options` fills it in.

    The ratio pi / pi_old is kept within [1 - clip_low, 1 + clip_high], and below ratio_cap also where
    its advantage is negative. a_star_beta is A*-PO's beta2.
    """

    objective: str = "grpo"
    clip_low: float = 0.2
    clip_high: float = 0.2
    ratio_cap: float | None = None
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    kl_coefficient: float = 0.0
    entropy_coefficient: float = 0.0
    importance_correction: Literal["off", "token", "sequence"] = "off"
    importance_cap: float = 2.0
    a_star_beta: float = 1e-3


def loss_options(learner: Learner) -> LossOptions:
    """The loss of a config, `auto` values resolved."""
    return LossOptions(
        objective=learner.objective,
        clip_low=learner.resolved_clip_low,
        clip_high=learner.resolved_clip_high,
        ratio_cap=learner.resolved_ratio_cap,
        kl_estimator=learner.kl_estimator,
        kl_coefficient=learner.kl_coefficient,
        entropy_coefficient=learner.entropy_coefficient,
        importance_correction=learner.importance_correction,
        importance_cap=learner.resolved_importance_cap,
        a_star_beta=learner.a_star_beta2,
    )


PerToken = tuple[Float[Tensor, " tokens"], Bool[Tensor, " tokens"]]


@dataclass(frozen=True)
class Objective:
    """per_token: (loss of each token, whether clipping changed it). denominator: of which mean the weights are.

    corrected: whether the importance correction applies, which makes up for a sampler that is not pi_old.
    """

    per_token: Callable[[LossInputs, LossOptions], PerToken]
    denominator: Literal["sequence", "token", "constant"]
    corrected: bool = True


def total_loss(inputs: LossInputs, options: LossOptions) -> tuple[Tensor, dict[str, Tensor]]:
    """The scalar loss of a micro-batch, and sums over its tokens of the statistics."""
    objective = OBJECTIVES[options.objective]
    per_token, clipped = objective.per_token(inputs, options)
    statistics = {"clipped": clipped.sum()}
    if objective.corrected and options.importance_correction != "off":
        factor, cut = importance(inputs, options)
        per_token = factor * per_token
        statistics["importance_cut"] = cut.sum()
    if inputs.reference_logprobs is not None:
        kl = KL_ESTIMATORS[options.kl_estimator](inputs.logprobs, inputs.reference_logprobs)
        per_token = per_token + options.kl_coefficient * kl
        statistics["kl"] = kl.detach()[inputs.sequence >= 0].sum()
    if options.entropy_coefficient:
        per_token = per_token - options.entropy_coefficient * inputs.entropies
    return (inputs.weights * per_token).sum(), statistics


# -- objectives -----------------------------------------------------------------------------------


def clipped_surrogate(inputs: LossInputs, options: LossOptions) -> PerToken:
    """-min(ratio A, clip(ratio) A) with a ratio per token: GRPO (Shao et al. 2024, eq. 3), and with
    other weights Dr. GRPO (Liu et al. 2025) and DAPO (Yu et al. 2025)."""
    return _clipped(torch.exp(inputs.logprobs - inputs.old_logprobs), inputs.advantages, options)


def gspo(inputs: LossInputs, options: LossOptions) -> PerToken:
    """The same with one ratio a sequence, the geometric mean of its tokens' (Zheng et al. 2025, eq. 5 and 7)."""
    log_ratio = _sequence_sum(inputs.logprobs - inputs.old_logprobs, inputs.sequence)
    length = _sequence_sum(torch.ones_like(log_ratio), inputs.sequence)
    return _clipped(torch.exp(log_ratio / length), inputs.advantages, options)


def cispo(inputs: LossInputs, options: LossOptions) -> PerToken:
    """-sg(min(ratio, cap)) A log pi: no token loses its gradient (MiniMax-M1 2025, eq. 4 and 5)."""
    ratio = torch.exp(inputs.logprobs - inputs.old_logprobs).detach()
    cap = torch.inf if options.ratio_cap is None else options.ratio_cap
    return -ratio.clamp(max=cap) * inputs.advantages * inputs.logprobs, (ratio > cap) & (inputs.advantages != 0)


def a_star_po(inputs: LossInputs, options: LossOptions) -> PerToken:
    """(beta2 log(pi / pi_ref)(y|x) + V*(x) - r)^2 of the whole completion, on each of its tokens (Brantley
    et al. 2025); the advantage is r - V*(x). Its weights, 1 / length, count it once."""
    if inputs.reference_logprobs is None:
        raise ValueError("a_star_po compares with the reference policy: reference_logprobs are missing")
    log_ratio = _sequence_sum(inputs.logprobs - inputs.reference_logprobs, inputs.sequence)
    loss = (options.a_star_beta * log_ratio - inputs.advantages) ** 2
    return loss, torch.zeros_like(loss, dtype=torch.bool)


def likelihood(inputs: LossInputs, options: LossOptions) -> PerToken:
    """-log pi: supervised fine-tuning on demonstrations."""
    return -inputs.logprobs, torch.zeros_like(inputs.logprobs, dtype=torch.bool)


OBJECTIVES: dict[str, Objective] = {
    "grpo": Objective(clipped_surrogate, "sequence"),
    "dr_grpo": Objective(clipped_surrogate, "constant"),
    "dapo": Objective(clipped_surrogate, "token"),
    "gspo": Objective(gspo, "sequence"),
    "cispo": Objective(cispo, "token"),
    "a_star_po": Objective(a_star_po, "sequence", corrected=False),
    "sft": Objective(likelihood, "token", corrected=False),
}


def _clipped(ratio: Tensor, advantages: Tensor, options: LossOptions) -> PerToken:
    """Pessimistic of the clipped and the unclipped surrogate; capped, where asked, on the other side too
    (dual clip, Ye et al. 2020; "two-sided" in INTELLECT-2 2025)."""
    clipped = ratio.clamp(1.0 - options.clip_low, 1.0 + options.clip_high)
    capped = ratio if options.ratio_cap is None else ratio.clamp(max=options.ratio_cap)
    surrogate = torch.minimum(capped * advantages, clipped * advantages)
    return -surrogate, (surrogate != ratio * advantages).detach()


# -- terms ----------------------------------------------------------------------------------------


def importance(inputs: LossInputs, options: LossOptions) -> PerToken:
    """A constant factor a token, pi_old / pi_sampler, and which tokens the cap C cut.

    token: min(ratio, C). sequence: the ratio of the whole completion, 0 where it is above C.
    """
    difference = (inputs.old_logprobs - inputs.sampler_logprobs).detach()
    if options.importance_correction == "sequence":
        ratio = torch.exp(_sequence_sum(difference, inputs.sequence))
        cut = ratio > options.importance_cap
        return ratio.masked_fill(cut, 0.0), cut
    ratio = torch.exp(difference)
    return ratio.clamp(max=options.importance_cap), ratio > options.importance_cap


def k1(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """log pi - log pi_ref per token: unbiased as a value; as a loss its expected gradient is zero on-policy."""
    return logprobs - reference_logprobs


def k2(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """(log pi - log pi_ref)^2 / 2 per token: biased as a value; as a loss its on-policy gradient is the KL's."""
    return (logprobs - reference_logprobs) ** 2 / 2


def k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """exp(d) - d - 1 per token with d = log pi_ref - log pi: unbiased and never negative; GRPO's (eq. 4)."""
    difference = reference_logprobs - logprobs
    return torch.expm1(difference) - difference


KL_ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}


def _sequence_sum(values: Tensor, sequence: Tensor) -> Tensor:
    """For each token the sum over the tokens of its sequence."""
    _, place = torch.unique(sequence, return_inverse=True)
    sums = values.new_zeros(len(values)).index_add(0, place, values)
    return sums[place]
