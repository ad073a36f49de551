"""The terms of a loss, one by one: clipping, KL, entropy bonus, importance correction; their statistics and options."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from configs.schema import Learner
from learner.objectives import LossInputs, LossOptions, importance, loss_options, total_loss


def example(ratios: list[float], advantages: list[float], **changed: Any) -> LossInputs:
    """Tokens with these ratios pi / pi_old, each a completion; every other log-prob is 0."""
    zero = torch.zeros(len(ratios), dtype=torch.float64)
    inputs = LossInputs(
        logprobs=torch.tensor(ratios, dtype=torch.float64).log(),
        old_logprobs=zero,
        sampler_logprobs=zero,
        reference_logprobs=None,
        entropies=zero,
        advantages=torch.tensor(advantages, dtype=torch.float64),
        weights=zero + 0.1,
        sequence=torch.arange(len(ratios)),
    )
    return replace(inputs, **changed)


RATIOS = [0.5, 0.85, 1.0, 1.25, 2.0, 0.5, 2.0, 9.0, 2.0]
ADVANTAGES = [-1.0, -1.0, -1.0, 1.0, 1.0, 1.0, -1.0, -1.0, 0.0]


@pytest.mark.parametrize(
    ("options", "clipped"),
    [
        (LossOptions("grpo", 0.2, 0.3), [0, 4]),  # too low for a negative advantage, too high for a positive one
        (LossOptions("grpo", 0.2, 0.3, ratio_cap=5.0), [0, 4, 7]),
        (LossOptions("gspo", 0.2, 0.3), [0, 4]),
        (LossOptions("cispo", ratio_cap=5.0), [7]),
        (LossOptions("cispo"), []),
    ],
    ids=["grpo", "two-sided", "gspo", "cispo", "cispo without cap"],
)
def test_clipped_tokens_are_those_whose_gradient_or_weight_clipping_changed(
    options: LossOptions, clipped: list[int]
) -> None:
    for place, (ratio, advantage) in enumerate(zip(RATIOS, ADVANTAGES, strict=True)):
        assert int(total_loss(example([ratio], [advantage]), options)[1]["clipped"]) == (place in clipped)
    assert int(total_loss(example(RATIOS, ADVANTAGES), options)[1]["clipped"]) == len(clipped)


@pytest.mark.parametrize("coefficient", [0.0, 0.5])
def test_the_kl_statistic_is_a_sum_over_real_tokens_whatever_its_coefficient(coefficient: float) -> None:
    dummy = torch.arange(len(RATIOS)) - 1  # the first token is a dummy's
    inputs = example(RATIOS, ADVANTAGES, reference_logprobs=torch.zeros(len(RATIOS)), sequence=dummy)
    _, statistics = total_loss(inputs, LossOptions(kl_coefficient=coefficient))
    kl = sum(1 / r - math.log(1 / r) - 1 for r in RATIOS[1:])
    assert float(statistics["kl"]) == pytest.approx(kl, rel=1e-12)
    assert not statistics["kl"].requires_grad


def test_an_entropy_bonus_lowers_the_loss_by_the_weighted_entropies() -> None:
    entropies = torch.rand(len(RATIOS), dtype=torch.float64, requires_grad=True)
    inputs = example(RATIOS, ADVANTAGES, entropies=entropies)
    without, _ = total_loss(inputs, LossOptions())
    loss, _ = total_loss(inputs, LossOptions(entropy_coefficient=0.3))
    assert float((loss - without).detach()) == pytest.approx(-0.3 * 0.1 * float(entropies.detach().sum()), rel=1e-12)
    loss.backward()
    torch.testing.assert_close(entropies.grad, torch.full_like(entropies, -0.3 * 0.1))


# -- importance correction ------------------------------------------------------------------------


@pytest.mark.parametrize("correction", ["token", "sequence"])
def test_the_importance_correction_is_a_constant_and_one_where_the_sampler_is_pi_old(correction: Any) -> None:
    old = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    sampler = old.detach().clone().requires_grad_()
    options = LossOptions(importance_correction=correction)
    factor, cut = importance(example([1.5, 1, 1], [1, 1, 1], old_logprobs=old, sampler_logprobs=sampler), options)
    assert factor.tolist() == [1.0, 1.0, 1.0] and not cut.any()
    assert not factor.requires_grad


def test_the_importance_correction_truncates_tokens_or_drops_whole_completions() -> None:
    ratios = torch.tensor([1.5, 1.9, 0.1, 2.5, 0.5], dtype=torch.float64)
    sequence = torch.tensor([0, 0, 1, 1, 2])
    inputs = example([1.0] * 5, [1.0] * 5, old_logprobs=ratios.log(), sequence=sequence)
    factor, cut = importance(inputs, LossOptions(importance_correction="token"))
    torch.testing.assert_close(factor, ratios.clamp(max=2.0))
    assert cut.tolist() == [False, False, False, True, False]
    factor, cut = importance(inputs, LossOptions(importance_correction="sequence"))
    torch.testing.assert_close(factor, torch.tensor([0.0, 0.0, 0.25, 0.25, 0.5], dtype=torch.float64))
    assert cut.tolist() == [True, True, False, False, False]
    _, statistics = total_loss(inputs, LossOptions(importance_correction="sequence"))
    assert int(statistics["importance_cut"]) == 2


def test_a_completion_far_from_its_sampler_is_dropped_and_not_made_infinite() -> None:
    far = example([1.0], [1.0], sampler_logprobs=torch.tensor([-1e4], dtype=torch.float64))
    for correction, factor in (("sequence", 0.0), ("token", 2.0)):
        assert importance(far, LossOptions(importance_correction=correction))[0].tolist() == [factor]  # type: ignore[arg-type]


# -- options --------------------------------------------------------------------------------------


def test_a_star_po_without_reference_is_refused() -> None:
    with pytest.raises(ValueError, match="reference_logprobs are missing"):
        total_loss(example([1.0], [1.0]), LossOptions("a_star_po"))


@pytest.mark.parametrize(
    ("objective", "resolved"),
    [
        ("grpo", (0.2, 0.2, None)),
        ("dapo", (0.2, 0.28, None)),
        ("gspo", (3e-4, 4e-4, None)),
        ("cispo", (0.2, 0.2, 5.0)),
    ],
)
def test_options_left_to_auto_are_the_papers(objective: str, resolved: tuple[float, float, float | None]) -> None:
    options = loss_options(Learner.model_validate({"objective": objective}))
    assert (options.clip_low, options.clip_high, options.ratio_cap) == resolved
    assert (options.importance_correction, options.importance_cap) == ("token", 2.0)
    by_sequence = Learner.model_validate({"objective": objective, "importance_correction": "sequence"})
    assert loss_options(by_sequence).importance_cap == 3.0
