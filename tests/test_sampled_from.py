"""Temperature, top-k and top-p: the learner's distribution is the one that vLLM drew from, and keeps what was drawn."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from learner.policy import LogProbHead, SampledFrom

VOCABULARY = 300
SEEDS = st.integers(0, 2**31)
CUTS = [
    SampledFrom(0.7, top_k=50),
    SampledFrom(1.3, top_p=0.9),
    SampledFrom(0.7, top_k=50, top_p=0.9),
    SampledFrom(1.0, top_k=1),
    SampledFrom(1.0, top_p=1e-9),
    SampledFrom(1.0, top_k=7, top_p=0.3),
    SampledFrom(0.6, top_k=20, top_p=0.8),
]
EVERY = [SampledFrom(0.7), SampledFrom(1.0, top_k=VOCABULARY), *CUTS]


def draw(seed: int, step: float = 0.0, tokens: int = 6) -> tuple[Tensor, Tensor]:
    """Logits, on a grid of `step` so that many are equal, and targets anywhere in the vocabulary."""
    random = torch.Generator().manual_seed(seed)
    logits = 2.5 * torch.randn(tokens, VOCABULARY, generator=random)
    targets = torch.randint(VOCABULARY, (tokens,), generator=random)
    return (logits / step).round() * step if step else logits, targets


def drawn_from(sampled_from: SampledFrom, logits: Tensor, seed: int) -> Tensor:
    """Targets that this distribution can give."""
    anything = sampled_from.logprobs(logits, logits.argmax(dim=-1)).exp()
    return torch.multinomial(anything, 1, generator=torch.Generator().manual_seed(seed)).squeeze(1)


# -- beside a naive version -----------------------------------------------------------------------


def plain_logprobs(
    logits: list[float], target: int, cut: SampledFrom, border: Callable[[bool], object] = assume
) -> list[float]:
    """One token's distribution: the k most probable, of them the fewest with mass p, the target in any case."""
    scaled = [logit / cut.temperature for logit in logits]
    order = sorted(range(len(scaled)), key=lambda token: -scaled[token])
    if cut.top_k:
        order = [token for token in order if scaled[token] >= scaled[order[cut.top_k - 1]]]
    mass = sum(math.exp(scaled[token]) for token in order)
    keep: list[int] = []
    before = 0.0
    for token in order:
        border(not keep or cut.top_p >= 1.0 or abs(before - cut.top_p) > 1e-6)  # nearer, rounding decides who is in
        if not keep or cut.top_p >= 1.0 or before < cut.top_p:
            keep.append(token)
        before += math.exp(scaled[token]) / mass
    keep = sorted({*keep, target})
    total = math.log(sum(math.exp(scaled[token]) for token in keep))
    return [scaled[token] - total if token in keep else -math.inf for token in range(len(scaled))]


@pytest.mark.parametrize("cut", EVERY, ids=str)
@given(SEEDS)
@settings(max_examples=15, deadline=None)
def test_log_probs_are_those_of_a_naive_version(cut: SampledFrom, seed: int) -> None:
    logits, targets = draw(seed, tokens=2)
    expected = [plain_logprobs(row, int(t), cut) for row, t in zip(logits.tolist(), targets, strict=True)]
    torch.testing.assert_close(cut.logprobs(logits, targets), torch.tensor(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("cut", "fault"),
    [
        (SampledFrom(0.7), SampledFrom(1.0)),
        (SampledFrom(0.7, top_k=50), SampledFrom(0.7)),
        (SampledFrom(0.7, top_k=50), SampledFrom(0.7, top_k=51)),
        (SampledFrom(0.7, top_p=0.9), SampledFrom(0.7, top_p=0.88)),
        (SampledFrom(1.0, top_k=10, top_p=0.9), SampledFrom(1.0, top_k=10)),
        (SampledFrom(1.0, top_k=10, top_p=0.9), SampledFrom(1.0, top_p=0.9)),
    ],
    ids=["no temperature", "no top-k", "one more", "another p", "no top-p", "top-p of all tokens"],
)
def test_the_naive_version_sees_a_wrong_cut(cut: SampledFrom, fault: SampledFrom) -> None:
    logits, targets = draw(0, tokens=24)
    rows = zip(logits.tolist(), targets.tolist(), strict=True)
    expected = torch.tensor([plain_logprobs(row, target, cut, border=bool) for row, target in rows])
    torch.testing.assert_close(cut.logprobs(logits, targets), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(fault.logprobs(logits, targets), expected, atol=1e-3)


# -- beside vLLM ----------------------------------------------------------------------------------


def vllm_logits(logits: Tensor, cut: SampledFrom) -> Tensor:
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch

    tokens = len(logits)
    k = torch.full((tokens,), cut.top_k) if cut.top_k else None
    p = torch.full((tokens,), cut.top_p) if cut.top_p < 1.0 else None
    return apply_top_k_top_p_pytorch(logits / cut.temperature, k, p)


@pytest.mark.parametrize("step", [0.0, 0.5, 3.0, 100.0], ids=["no ties", "ties", "many ties", "all equal"])
@pytest.mark.parametrize("cut", EVERY, ids=str)
@given(SEEDS)
@settings(max_examples=25, deadline=None)
def test_log_probs_of_what_vllm_can_sample_are_vllms_to_the_bit(cut: SampledFrom, step: float, seed: int) -> None:
    logits, _ = draw(seed, step)
    theirs = vllm_logits(logits, cut).log_softmax(dim=-1)
    targets = torch.multinomial(theirs.exp(), 1, generator=torch.Generator().manual_seed(seed)).squeeze(1)
    assert torch.equal(cut.logprobs(logits, targets), theirs)


# -- the sampled token ----------------------------------------------------------------------------


@pytest.mark.parametrize("cut", CUTS, ids=str)
@given(SEEDS)
@settings(max_examples=25, deadline=None)
def test_a_target_is_kept_wherever_it_stands_and_moves_no_border(cut: SampledFrom, seed: int) -> None:
    logits, targets = draw(seed)
    logprobs = cut.logprobs(logits, targets)
    assert logprobs.gather(1, targets[:, None]).isfinite().all()
    kept = vllm_logits(logits, cut).isfinite().scatter(1, targets[:, None], True)
    assert torch.equal(logprobs.isfinite(), kept)
    torch.testing.assert_close(logprobs.exp().sum(dim=-1), torch.ones(len(targets)))


# -- entropies and gradients ----------------------------------------------------------------------


def head_of(entropy_gradient: bool = True) -> LogProbHead:
    """A head whose logits are its hidden states."""
    return LogProbHead(torch.nn.Parameter(torch.eye(VOCABULARY), requires_grad=False), None, 4, entropy_gradient)


def plain_gradients(logprobs: list[float], target: int, temperature: float) -> tuple[float, list[float], list[float]]:
    """Entropy H, and by each logit z the derivatives of H, -p (log p + H) / T, and of the target's log-prob."""
    probabilities = [math.exp(value) for value in logprobs]
    pairs = list(zip(probabilities, logprobs, strict=True))
    entropy = -sum(p * value for p, value in pairs if p)
    by_entropy = [-p * (value + entropy) / temperature if p else 0.0 for p, value in pairs]
    by_logprob = [((token == target) - p) / temperature for token, (p, _) in enumerate(pairs)]
    return entropy, by_entropy, by_logprob


@pytest.mark.parametrize("cut", EVERY, ids=str)
def test_entropies_log_probs_and_their_gradients_are_those_of_a_plain_softmax(cut: SampledFrom) -> None:
    logits, targets = draw(3)
    hidden = logits.clone().requires_grad_()
    logprobs, entropies = head_of()(hidden, targets, cut)
    (by_entropy,) = torch.autograd.grad(entropies.sum(), hidden, retain_graph=True)
    (by_logprob,) = torch.autograd.grad(logprobs.sum(), hidden)
    for place, (row, target) in enumerate(zip(logits.tolist(), targets.tolist(), strict=True)):
        plain = plain_logprobs(row, target, cut, border=bool)
        expected = [torch.tensor(value) for value in plain_gradients(plain, target, cut.temperature)]
        found = (entropies[place], by_entropy[place], by_logprob[place])
        torch.testing.assert_close(logprobs[place], torch.tensor(plain[target]), rtol=1e-5, atol=1e-5)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one.detach(), other, rtol=1e-5, atol=3e-6)


def test_the_gradient_of_entropies_is_that_of_finite_differences() -> None:
    cut = SampledFrom(0.7, top_k=50, top_p=0.9)
    logits, _ = draw(4)
    targets = drawn_from(cut, logits, 4)
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(4))
    hidden = logits.clone().requires_grad_()
    head_of()(hidden, targets, cut)[1].sum().backward()
    assert hidden.grad is not None
    step = 1e-3
    with torch.no_grad():
        above, below = (head_of()(logits + sign * step * direction, targets, cut)[1].sum() for sign in (1, -1))
    assert float((above - below) / (2 * step)) == pytest.approx(float((hidden.grad * direction).sum()), rel=1e-2)


@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_entropies_carry_a_gradient_only_where_a_bonus_needs_one(entropy_gradient: bool) -> None:
    logits, targets = draw(5)
    hidden = logits.requires_grad_()
    logprobs, entropies = head_of(entropy_gradient)(hidden, targets, SampledFrom())
    assert logprobs.requires_grad and entropies.requires_grad is entropy_gradient
    with torch.no_grad():
        assert not any(value.requires_grad for value in head_of(True)(hidden, targets, SampledFrom()))


@pytest.mark.parametrize("cut", EVERY, ids=str)
def test_values_and_gradients_are_finite_even_for_extreme_logits(cut: SampledFrom) -> None:
    logits, targets = draw(6)
    hidden = (1e4 * logits).requires_grad_()
    values: Any = head_of()(hidden, targets, cut)
    (values[0].sum() + values[1].sum()).backward()
    assert hidden.grad is not None
    assert values[0].isfinite().all() and values[1].isfinite().all() and hidden.grad.isfinite().all()
