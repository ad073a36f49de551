"""The objectives: each is its paper's, in value and gradient, however the update batch is cut and filtered."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from learner.batching import Sequence, kept, token_weights
from learner.objectives import OBJECTIVES, LossInputs, LossOptions, total_loss
from tests import plain_objectives
from tests.plain_objectives import PLAIN, PlainCompletion, PlainLoss, PlainOptions, quotients

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=7)
SEEDS = st.integers(0, 2**31)
OPTIONS = st.builds(
    PlainOptions,
    low=st.sampled_from([3e-4, 0.1, 0.2, 0.6]),
    high=st.sampled_from([4e-4, 0.1, 0.28, 0.4]),
    cap=st.sampled_from([math.inf, 1.5, 5.0]),
    correction=st.sampled_from(["off", "token", "sequence"]),
    correction_cap=st.sampled_from([1.1, 2.0, 3.0]),
    beta=st.sampled_from([0.0, 0.04, 1.0]),
    estimator=st.sampled_from(["k1", "k2", "k3"]),
    beta2=st.sampled_from([1e-3, 0.1, 1.0]),
    constant=st.sampled_from([0.0, 50.0]),
)

Loss = Callable[[LossInputs, LossOptions], tuple[Tensor, dict[str, Tensor]]]
Weigh = Callable[..., list[float]]


# -- the learner's loss beside the plain one -------------------------------------------------------


def draw(
    lengths: list[int], seed: int, dtype: torch.dtype = torch.float64, spread: float | None = None
) -> list[PlainCompletion]:
    """Random completions, some masked, some without advantage; every number is one of `dtype`.

    spread: of the other policies' log-probs around pi's; if not given, random too, and perhaps 0 (on-policy).
    """
    random = np.random.default_rng(seed)
    spreads = random.choice([0.0, 0.01, 0.4, 1.0], 3) if spread is None else [spread] * 3

    def near(values: np.ndarray, spread: float) -> np.ndarray:
        return values + spread * random.normal(size=len(values))

    def numbers(values: Any) -> list[float]:
        return torch.tensor(values).to(dtype).tolist()

    completions = []
    for length in lengths:
        logprobs = -3.0 * random.random(length)
        old, sampler, reference = (numbers(near(logprobs, spread)) for spread in spreads)
        advantage = numbers([random.normal() if random.random() < 0.8 else 0.0])[0]
        masked = bool(random.random() < 0.2)
        completions.append(PlainCompletion(numbers(logprobs), old, sampler, reference, advantage, masked))
    return completions


def away_from_kinks(completions: list[PlainCompletion], options: PlainOptions) -> bool:
    """Whether no ratio is at a bound, where rounding decides which of two gradients is the right one."""
    clip, ratios, factors = (1.0 - options.low, 1.0 + options.high, options.cap), [], []
    for c in completions:
        each, against_sampler = quotients(c.logprobs, c.old_logprobs), quotients(c.old_logprobs, c.sampler_logprobs)
        ratios += [*each, math.prod(each) ** (1.0 / len(each))]
        factors += [*against_sampler, math.prod(against_sampler)]
    away = [abs(ratio / bound - 1.0) > 1e-5 for ratio in ratios for bound in clip]
    return all(away) and all(abs(factor / options.correction_cap - 1.0) > 1e-5 for factor in factors)


def ours(objective: str, options: PlainOptions) -> LossOptions:
    """The learner's names for the options."""
    return LossOptions(
        objective=objective,
        clip_low=options.low,
        clip_high=options.high,
        ratio_cap=None if options.cap == math.inf else options.cap,
        kl_estimator=options.estimator,  # type: ignore[arg-type]
        kl_coefficient=options.beta,
        importance_correction=options.correction,  # type: ignore[arg-type]
        importance_cap=options.correction_cap,
        a_star_beta=options.beta2,
    )


def divided(objective: str, options: PlainOptions) -> PlainOptions:
    """Dr. GRPO always has a constant; for the others it is a token budget, or 0."""
    return replace(options, constant=12.0) if objective == "dr_grpo" else options


def as_sequences(completions: list[PlainCompletion]) -> list[Sequence]:
    none = np.zeros(0, dtype=np.int32)
    return [
        Sequence(none, np.zeros(len(c.logprobs), np.int32), np.array(c.sampler_logprobs), c.advantage, None, c.masked)
        for c in completions
    ]


@dataclass(frozen=True)
class Cut:
    """How the update batch is split: `micro_batches` at random by `seed`, filtered at `threshold`."""

    micro_batches: int = 1
    seed: int = 0
    threshold: float | None = None


WHOLE = Cut()


def learners(
    objective: str,
    completions: list[PlainCompletion],
    options: PlainOptions,
    dtype: torch.dtype = torch.float64,
    cut: Cut = WHOLE,
    loss: Loss = total_loss,
    weigh: Weigh = token_weights,
) -> tuple[float, list[Tensor]]:
    """The learner's loss summed over micro-batches, and its gradient by the log-probs of each completion."""
    sequences = as_sequences(completions)
    weights = weigh(sequences, OBJECTIVES[objective].denominator, options.constant, True)
    leaves = [torch.tensor(c.logprobs, dtype=dtype, requires_grad=True) for c in completions]
    random = np.random.default_rng(cut.seed)
    order = random.permutation(kept(sequences, weights, cut.threshold))
    place = random.integers(0, cut.micro_batches, len(order))
    value = 0.0
    for number in range(cut.micro_batches):
        chosen = order[place == number].tolist()
        if chosen:
            part, _ = loss(loss_inputs(completions, leaves, weights, chosen), ours(objective, options))
            part.backward()
            value += part.item()
    return value, [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]


def loss_inputs(
    completions: list[PlainCompletion], leaves: list[Tensor], weights: list[float], chosen: list[int]
) -> LossInputs:
    """One micro-batch of the completions at `chosen`, in that order."""
    dtype = leaves[0].dtype
    counts = torch.tensor([len(completions[i].logprobs) for i in chosen])

    def flat(name: str) -> Tensor:
        return torch.tensor([x for i in chosen for x in getattr(completions[i], name)], dtype=dtype)

    def spread(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=dtype).repeat_interleave(counts)

    return LossInputs(
        logprobs=torch.cat([leaves[i] for i in chosen]),
        old_logprobs=flat("old_logprobs"),
        sampler_logprobs=flat("sampler_logprobs"),
        reference_logprobs=flat("reference_logprobs"),
        entropies=torch.zeros(int(counts.sum()), dtype=dtype),
        advantages=spread([completions[i].advantage for i in chosen]),
        weights=spread([weights[i] for i in chosen]),
        sequence=torch.tensor(chosen).repeat_interleave(counts),
    )


def difference(found: tuple[float, list[Tensor]], plain: PlainLoss) -> float:
    """The larger of those of value and gradient, relative to the sums of the sizes of their terms; NaN stays NaN."""
    value, gradient = found
    expected = [torch.tensor(row, dtype=torch.float64) for row in plain.gradient]
    off = sum(float((row.double() - want).abs().sum()) for row, want in zip(gradient, expected, strict=True))
    least = float(np.finfo(np.float64).tiny)  # without any term, both must be 0
    return float(np.max([abs(value - plain.value) / max(plain.size, least), off / max(plain.gradient_size, least)]))


# -- every objective is its paper's ---------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=["f64", "f32"])
@pytest.mark.parametrize("objective", list(OBJECTIVES))
@given(LENGTHS, SEEDS, OPTIONS, st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_the_objective_and_its_gradient_are_the_papers_for_every_cut_into_micro_batches(
    objective: str,
    dtype: torch.dtype,
    tolerance: float,
    lengths: list[int],
    seed: int,
    options: PlainOptions,
    micro_batches: int,
) -> None:
    completions, options = draw(lengths, seed, dtype), divided(objective, options)
    assume(away_from_kinks(completions, options))
    found = learners(objective, completions, options, dtype, Cut(micro_batches, seed))
    assert difference(found, PLAIN[objective](completions, options)) <= tolerance


def test_the_objectives_are_all_compared_with_references_of_at_most_60_lines() -> None:
    assert PLAIN.keys() == OBJECTIVES.keys()
    functions = dict(inspect.getmembers(plain_objectives, inspect.isfunction))

    def used(name: str) -> set[str]:
        inner = set(functions) & set(functions[name].__code__.co_names)
        return {name}.union(*(used(other) for other in inner))

    for plain in PLAIN.values():
        assert sum(len(inspect.getsource(functions[name]).splitlines()) for name in used(plain.__name__)) <= 60


# -- the comparison sees faults -------------------------------------------------------------------


def with_options(**changed: Any) -> Loss:
    return lambda inputs, options: total_loss(inputs, replace(options, **changed))


def clip_bounds_swapped(inputs: LossInputs, options: LossOptions) -> tuple[Tensor, dict[str, Tensor]]:
    return total_loss(inputs, replace(options, clip_low=options.clip_high, clip_high=options.clip_low))


def kl_the_other_way(inputs: LossInputs, options: LossOptions) -> tuple[Tensor, dict[str, Tensor]]:
    return total_loss(inputs, replace(options, kl_coefficient=-options.kl_coefficient))


def normalised_per_micro_batch(inputs: LossInputs, options: LossOptions) -> tuple[Tensor, dict[str, Tensor]]:
    return total_loss(replace(inputs, weights=inputs.weights / inputs.weights.sum()), options)


def corrected_towards_pi(inputs: LossInputs, options: LossOptions) -> tuple[Tensor, dict[str, Tensor]]:
    moved = inputs.sampler_logprobs + inputs.old_logprobs - inputs.logprobs.detach()
    return total_loss(replace(inputs, sampler_logprobs=moved), options)


def masked_completions_trained(sequences: list[Sequence], denominator: str, constant: float, _: bool) -> list[float]:
    return token_weights(sequences, denominator, constant, False)


def masked_tokens_counted(sequences: list[Sequence], *rest: Any) -> list[float]:
    counted = masked_completions_trained(sequences, *rest)
    return [0.0 if s.truncated else weight for s, weight in zip(sequences, counted, strict=True)]


def weighed_by(denominator: str) -> Weigh:
    return lambda sequences, _, constant, mask: token_weights(sequences, denominator, constant, mask)


TOKEN = PlainOptions(low=0.1, high=0.3, cap=1.5, correction="token", beta=0.1)
SEQUENCE = replace(TOKEN, correction="sequence", correction_cap=1.5)
FAULTS: list[tuple[str, str, PlainOptions, dict[str, Any]]] = [
    *(
        (f"{objective} normalised per micro-batch", objective, TOKEN, {"loss": normalised_per_micro_batch})
        for objective in OBJECTIVES
    ),
    ("clip bounds swapped", "grpo", TOKEN, {"loss": clip_bounds_swapped}),
    ("clip bounds swapped", "gspo", TOKEN, {"loss": clip_bounds_swapped}),
    ("KL with the wrong sign", "grpo", TOKEN, {"loss": kl_the_other_way}),
    ("KL by another estimator", "grpo", TOKEN, {"loss": with_options(kl_estimator="k2")}),
    ("no two-sided cap", "grpo", TOKEN, {"loss": with_options(ratio_cap=None)}),
    ("no cap of the weight", "cispo", TOKEN, {"loss": with_options(ratio_cap=None)}),
    ("ratio per token", "gspo", TOKEN, {"loss": with_options(objective="grpo")}),
    ("weight with a gradient", "cispo", TOKEN, {"loss": with_options(objective="dapo")}),
    ("another beta2", "a_star_po", TOKEN, {"loss": with_options(a_star_beta=2e-3)}),
    ("no correction", "grpo", TOKEN, {"loss": with_options(importance_correction="off")}),
    ("correction not truncated", "grpo", TOKEN, {"loss": with_options(importance_cap=1e9)}),
    ("completions over the cap trained", "grpo", SEQUENCE, {"loss": with_options(importance_cap=1e9)}),
    ("corrected by pi, not pi_old", "grpo", TOKEN, {"loss": corrected_towards_pi}),
    ("masked tokens counted", "dapo", TOKEN, {"weigh": masked_tokens_counted}),
    ("masked completions trained", "grpo", TOKEN, {"weigh": masked_completions_trained}),
    ("mean over tokens", "grpo", TOKEN, {"weigh": weighed_by("token")}),
    ("mean over completions", "dapo", TOKEN, {"weigh": weighed_by("sequence")}),
    ("own length for the constant", "dr_grpo", TOKEN, {"weigh": weighed_by("sequence")}),
]


@pytest.mark.parametrize(
    ("objective", "options", "fault"), [case[1:] for case in FAULTS], ids=[f"{c[1]}: {c[0]}" for c in FAULTS]
)
def test_the_comparison_sees_a_wrong_loss(objective: str, options: PlainOptions, fault: dict[str, Any]) -> None:
    options = divided(objective, options)
    completions = draw([3, 9, 5, 2, 7, 8, 4, 1], 2, spread=0.5)
    assert {c.masked for c in completions} == {True, False}
    plain = PLAIN[objective](completions, options)
    assert difference(learners(objective, completions, options, cut=Cut(2)), plain) <= 1e-9
    assert difference(learners(objective, completions, options, cut=Cut(2), **fault), plain) > 1e-4


# -- filtering ------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["grpo", "dr_grpo", "dapo", "gspo", "cispo"])
@given(LENGTHS, SEEDS, OPTIONS)
@settings(max_examples=30, deadline=None)
def test_leaving_out_what_has_no_advantage_changes_no_bit_of_the_gradient(
    objective: str, lengths: list[int], seed: int, options: PlainOptions
) -> None:
    completions, options = draw(lengths, seed), divided(objective, replace(options, beta=0.0))
    whole = learners(objective, completions, options)[1]
    filtered = learners(objective, completions, options, cut=Cut(3, seed, threshold=0.0))[1]
    assert all(map(torch.equal, whole, filtered))
    if all(c.masked or not c.advantage for c in completions):
        assert not any(row.any() for row in whole)
