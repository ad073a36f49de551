"""The objectives: pure functions from a dataclass of tensors to a loss and its statistics."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LossInputs:
    """Everything an objective may look at, one entry a completion token of the micro-batch.

    `logprobs` carries the gradient. `weights` sum to 1 over the whole update batch (not over the
    micro-batch), so losses and gradients of micro-batches add up.
    """

    logprobs: Float[Tensor, " tokens"]
    old_logprobs: Float[Tensor, " tokens"]
    reference_logprobs: Float[Tensor, " tokens"] | None
    advantages: Float[Tensor, " tokens"]
    weights: Float[Tensor, " tokens"]


@dataclass(frozen=True)
class Clip:
    """The ratio pi / pi_old is kept within [1 - low, 1 + high]."""

    low: float
    high: float


def grpo(inputs: LossInputs, clip: Clip, kl_coefficient: float) -> tuple[Tensor, dict[str, Tensor]]:
    """GRPO's loss: the clipped surrogate minus a k3 KL to the reference (Shao et al. 2024, eq. 3 and 4).

    Returns (scalar loss, sums over tokens of the statistics: kl weighted like the loss, clipped a count).
    """
    ratio = torch.exp(inputs.logprobs - inputs.old_logprobs)
    clipped = ratio.clamp(1.0 - clip.low, 1.0 + clip.high)
    surrogate = torch.minimum(ratio * inputs.advantages, clipped * inputs.advantages)
    per_token = -surrogate
    statistics = {"clipped": ((clipped * inputs.advantages) < (ratio * inputs.advantages)).sum().detach()}
    if inputs.reference_logprobs is not None:
        kl = k3(inputs.logprobs, inputs.reference_logprobs)
        per_token = per_token + kl_coefficient * kl
        statistics["kl"] = (inputs.weights * kl).sum().detach()
    return (inputs.weights * per_token).sum(), statistics


def k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(pi || pi_ref) per token: exp(d) - d - 1 with d = log pi_ref - log pi."""
    difference = reference_logprobs - logprobs
    return torch.exp(difference) - difference - 1.0
