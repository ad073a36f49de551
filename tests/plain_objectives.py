"""The objectives written down once more, each from its paper: token by token, no tensors, derivatives by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PlainCompletion:
    """One completion o_i: log-probs of its tokens under four policies, and its advantage (A*-PO: r - V*(x)).

    masked: it takes no part in the loss and its tokens are not counted, though it is one of the completions.
    """

    logprobs: Sequence[float]
    old_logprobs: Sequence[float]
    sampler_logprobs: Sequence[float]
    reference_logprobs: Sequence[float]
    advantage: float
    masked: bool = False


@dataclass(frozen=True)
class PlainOptions:
    """low, high: epsilons of the clip. cap: of the ratio where A < 0, and of CISPO's weight. correction_cap: C.

    beta: weight of the KL. beta2: A*-PO's. constant: Dr. GRPO's length, or a budget in place of the token count.
    """

    low: float = 0.2
    high: float = 0.2
    cap: float = math.inf
    correction: str = "off"
    correction_cap: float = 2.0
    beta: float = 0.0
    estimator: str = "k3"
    beta2: float = 1e-3
    constant: float = 0.0


class PlainLoss:
    """A loss and its gradient by the log-prob of each token; `size` and `gradient_size` sum the sizes of the terms."""

    def __init__(self, completions: Sequence[PlainCompletion]) -> None:
        self.value = self.size = self.gradient_size = 0.0
        self.gradient = [[0.0] * len(c.logprobs) for c in completions]

    def add(self, i: int, t: int, share: float, values: Sequence[float], slopes: Sequence[float]) -> None:
        """Terms of the value, and of its derivative by token t of completion i, each times `share`."""
        self.value += share * sum(values)
        self.size += share * sum(map(abs, values))
        self.gradient[i][t] += share * sum(slopes)
        self.gradient_size += share * sum(map(abs, slopes))


# -- terms ----------------------------------------------------------------------------------------


def quotients(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Of two policies' probabilities of each token, from their log-probs."""
    return [math.exp(a) / math.exp(b) for a, b in zip(above, below, strict=True)]


def corrections(c: PlainCompletion, options: PlainOptions) -> list[float]:
    """pi_old / pi_sampler of each token, truncated at C; or of the whole completion, 0 above C."""
    each = quotients(c.old_logprobs, c.sampler_logprobs)
    if options.correction == "token":
        return [quotient if quotient < options.correction_cap else options.correction_cap for quotient in each]
    whole = math.prod(each) if options.correction == "sequence" else 1.0
    return [whole if whole <= options.correction_cap else 0.0] * len(each)


def add_kl(loss: PlainLoss, i: int, share: float, c: PlainCompletion, options: PlainOptions) -> None:
    """beta times Schulman's k1, k2 or k3 of every token, from q = pi_ref / pi, whose derivative is -q."""
    for t, q in enumerate(quotients(c.reference_logprobs, c.logprobs)):
        values, slopes = {
            "k1": ([-math.log(q)], [1.0]),
            "k2": ([math.log(q) ** 2 / 2], [-math.log(q)]),
            "k3": ([q, -math.log(q), -1.0], [-q, 1.0]),
        }[options.estimator]
        loss.add(i, t, share * options.beta, values, slopes)


def surrogate(ratio: float, advantage: float, options: PlainOptions) -> tuple[float, float]:
    """min(r A, clip(r) A), case by case, and its derivative by log r; with a cap it is flat beyond it for A < 0."""
    low, high = (-math.inf, 1.0 + options.high) if advantage >= 0.0 else (1.0 - options.low, options.cap)
    if ratio < low:
        return low * advantage, 0.0
    if ratio > high:
        return high * advantage, 0.0
    return ratio * advantage, ratio * advantage


def per_token(completions: Sequence[PlainCompletion], shares: Sequence[float], options: PlainOptions) -> PlainLoss:
    """Sum over tokens, times the share of their completion, of -surrogate (corrected) + beta KL."""
    loss = PlainLoss(completions)
    for i, (c, share) in enumerate(zip(completions, shares, strict=True)):
        if not c.masked:
            factors = corrections(c, options)
            for t, ratio in enumerate(quotients(c.logprobs, c.old_logprobs)):
                value, slope = surrogate(ratio, c.advantage, options)
                loss.add(i, t, share, [-factors[t] * value], [-factors[t] * slope])
            add_kl(loss, i, share, c, options)
    return loss


def one_token(completions: Sequence[PlainCompletion], options: PlainOptions) -> float:
    """A token's share in a mean over all tokens that are not masked, or in the budget."""
    counted = sum(len(c.logprobs) for c in completions if not c.masked)
    return 1.0 / (options.constant if options.constant else max(1, counted))


# -- objectives -----------------------------------------------------------------------------------


def plain_grpo(completions: Sequence[PlainCompletion], options: PlainOptions) -> PlainLoss:
    """Shao et al. 2024, eq. 3 and 4: 1/G sum_i 1/|o_i| sum_t."""
    return per_token(completions, [1.0 / len(completions) / len(c.logprobs) for c in completions], options)


def plain_dr_grpo(completions: Sequence[PlainCompletion], options: PlainOptions) -> PlainLoss:
    """Liu et al. 2025: the length of a completion is replaced by a constant."""
    return per_token(completions, [1.0 / len(completions) / options.constant] * len(completions), options)


def plain_dapo(completions: Sequence[PlainCompletion], options: PlainOptions) -> PlainLoss:
    """Yu et al. 2025: 1 / (sum_i |o_i|) sum_i sum_t."""
    return per_token(completions, [one_token(completions, options)] * len(completions), options)


def plain_gspo(completions: Sequence[PlainCompletion], options: PlainOptions) -> PlainLoss:
    """Zheng et al. 2025, eq. 5 and 7: one surrogate a completion, of s = (pi(o) / pi_old(o)) ^ (1 / |o|)."""
    loss = PlainLoss(completions)
    for i, c in enumerate(completions):
        if not c.masked:
            length = len(c.logprobs)
            s = math.prod(quotients(c.logprobs, c.old_logprobs)) ** (1.0 / length)
            value, slope = surrogate(s, c.advantage, options)
            factor = sum(corrections(c, options)) / length / len(completions)
            loss.add(i, 0, factor, [-value], [])
            for t in range(length):  # d log s / d logprob_t = 1 / length
                loss.add(i, t, factor, [], [-slope / length])
            add_kl(loss, i, 1.0 / len(completions) / length, c, options)
    return loss


def plain_cispo(completions: Sequence[PlainCompletion], options: PlainOptions) -> PlainLoss:
    """MiniMax-M1 2025, eq. 4 and 5: REINFORCE, every token weighed by its ratio up to the cap, a constant."""
    loss = PlainLoss(completions)
    share = one_token(completions, options)
    for i, c in enumerate(completions):
        if not c.masked:
            factors = corrections(c, options)
            for t, ratio in enumerate(quotients(c.logprobs, c.old_logprobs)):
                weight = -factors[t] * (ratio if ratio < options.cap else options.cap) * c.advantage
                loss.add(i, t, share, [weight * c.logprobs[t]], [weight])
            add_kl(loss, i, share, c, options)
    return loss


def plain_a_star_po(completions: Sequence[PlainCompletion], options: PlainOptions) -> PlainLoss:
    """Brantley et al. 2025: mean of (beta2 log(pi(y|x) / pi_ref(y|x)) + V*(x) - r)^2, the square multiplied out."""
    loss = PlainLoss(completions)
    share = 1.0 / len(completions)
    for i, c in enumerate(completions):
        if not c.masked:
            pairs = zip(c.logprobs, c.reference_logprobs, strict=True)
            terms = [*(options.beta2 * (logprob - reference) for logprob, reference in pairs), -c.advantage]
            loss.add(i, 0, share, [a * b for a in terms for b in terms], [])
            for t in range(len(c.logprobs)):
                loss.add(i, t, share, [], [2.0 * options.beta2 * a for a in terms])
            add_kl(loss, i, share / len(c.logprobs), c, options)
    return loss


def plain_sft(completions: Sequence[PlainCompletion], options: PlainOptions) -> PlainLoss:
    """Cross-entropy of demonstrations, a mean over tokens."""
    loss = PlainLoss(completions)
    share = one_token(completions, options)
    for i, c in enumerate(completions):
        if not c.masked:
            for t, logprob in enumerate(c.logprobs):
                loss.add(i, t, share, [-logprob], [-1.0])
            add_kl(loss, i, share, c, options)
    return loss


PLAIN = {
    "grpo": plain_grpo,
    "dr_grpo": plain_dr_grpo,
    "dapo": plain_dapo,
    "gspo": plain_gspo,
    "cispo": plain_cispo,
    "a_star_po": plain_a_star_po,
    "sft": plain_sft,
}
