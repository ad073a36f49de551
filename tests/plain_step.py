"""Optimizer steps written down once more: in float64, plain transformers, one sequence at a time, AdamW by hand."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.learner_cases import BETA, BETAS, DECAY, HIGH, LOW, MAX_NORM, RATE, TEMPERATURE, Batch, Case, Overrides
from tests.plain_objectives import PLAIN, PlainCompletion, PlainLoss, PlainOptions, quotients, surrogate
from tests.tiny import MAX_COMPLETION, open_plain, plain_logprobs

ADAM_EPSILON, RATIO_CAP, IMPORTANCE_CAP = 1e-8, 5.0, 2.0

GRADIENT_LIMIT = 1e-5  # largest |difference| / largest |gradient|, of the worst tensor
WEIGHTS_LIMIT = 1e-6  # |difference| / |weights| after one step
UPDATE_LIMIT = 1e-3  # |difference| / |step|
METRIC_LIMIT = 1e-4  # of the worst metric; the loss is a difference of larger terms

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class PlainSteps:
    """The first step's gradient and metrics, and the weights after the last."""

    gradient: Tensors
    metrics: dict[str, float]
    weights: Tensors


@cache
def plain_steps(
    model: Path,
    reference: Path,
    batches: tuple[Batch, ...],
    learner: Overrides = (),
    dtype: torch.dtype = torch.float64,
) -> PlainSteps:
    """One AdamW step on each update batch, whose sequences carry pi_old; no learner code. learner: a case's options."""
    policy, other = open_plain(model, dtype), open_plain(reference, dtype)
    parameters = dict(policy.named_parameters())
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in parameters.items()}
    answers = []
    for number, batch in enumerate(batches, start=1):
        policy.zero_grad()
        metrics = _backward(policy, other, batch, model, learner)
        gradient = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
        size = norm(gradient)
        answers.append((gradient, metrics | {"policy/grad_norm": size, "policy/learning_rate": RATE}))
        for name, p in parameters.items():
            g = gradient[name] * min(1.0, MAX_NORM / size)
            moments[name] = _moments(*moments[name], g)
            p.data -= RATE * (DECAY * p.data if p.ndim >= 2 else 0.0) + RATE * _adam(*moments[name], number)
    return PlainSteps(*answers[0], {name: p.detach() for name, p in parameters.items()})


def _moments(first: Tensor, second: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    return BETAS[0] * first + (1 - BETAS[0]) * g, BETAS[1] * second + (1 - BETAS[1]) * g**2


def _adam(first: Tensor, second: Tensor, number: int) -> Tensor:
    return first / (1 - BETAS[0] ** number) / ((second / (1 - BETAS[1] ** number)).sqrt() + ADAM_EPSILON)


def _backward(policy: nn.Module, other: nn.Module, batch: Batch, model: Path, learner: Overrides) -> dict[str, float]:
    """Puts the gradient into the policy's parameters; the metrics of the loss."""
    chosen = {"objective": "grpo", "kl_coefficient": BETA, "mask_truncated": False, **dict(learner)}
    options = PlainOptions(
        low=LOW,
        high=HIGH,
        cap=RATIO_CAP if chosen["objective"] == "cispo" else math.inf,
        correction="token",
        correction_cap=IMPORTANCE_CAP,
        beta=chosen["kl_coefficient"],
        constant=MAX_COMPLETION if chosen["objective"] == "dr_grpo" else chosen.get("tokens_per_update", 0),
    )
    temperature = 1.0 if chosen["objective"] == "sft" else TEMPERATURE
    logprobs, completions = [], []
    for s in batch.sequences(model):
        logprobs.append(plain_logprobs(policy, s, temperature))
        assert s.old_logprobs is not None
        with torch.no_grad():
            reference = plain_logprobs(other, s, temperature).tolist()
        old, sampler = s.old_logprobs.tolist(), s.sampler_logprobs.tolist()
        masked = chosen["mask_truncated"] and s.truncated
        completions.append(PlainCompletion(logprobs[-1].tolist(), old, sampler, reference, s.advantage, masked))
    loss = PLAIN[chosen["objective"]](completions, options)
    pairs = zip(logprobs, loss.gradient, strict=True)
    slopes = [(values * torch.tensor(row, dtype=values.dtype)).sum() for values, row in pairs]
    torch.stack(slopes).sum().backward()
    clips = chosen["objective"] in ("grpo", "dr_grpo", "dapo")
    return _metrics(completions, options, loss) | (_clip_metrics(completions, options) if clips else {})


def _metrics(completions: list[PlainCompletion], options: PlainOptions, loss: PlainLoss) -> dict[str, float]:
    """Means over the tokens that are trained on."""
    trained = [c for c in completions if not c.masked]
    tokens = sum(len(c.logprobs) for c in trained)
    metrics = {"policy/loss": loss.value, "tokens/trained": float(tokens)}
    if options.beta:
        references = [q for c in trained for q in quotients(c.reference_logprobs, c.logprobs)]
        metrics["policy/kl"] = sum(q - math.log(q) - 1.0 for q in references) / tokens
    return metrics


def _clip_metrics(completions: list[PlainCompletion], options: PlainOptions) -> dict[str, float]:
    """Of the objectives with a ratio per token."""
    trained = [c for c in completions if not c.masked]
    ratios = [(ratio, c.advantage) for c in trained for ratio in quotients(c.logprobs, c.old_logprobs)]
    factors = [factor for c in trained for factor in quotients(c.old_logprobs, c.sampler_logprobs)]
    clipped = [surrogate(ratio, advantage, options)[0] != ratio * advantage for ratio, advantage in ratios]
    return {
        "policy/clip_fraction": sum(clipped) / len(clipped),
        "policy/importance_cut": sum(factor > options.correction_cap for factor in factors) / len(factors),
    }


# -- comparing ------------------------------------------------------------------------------------


def norm(tensors: Tensors) -> float:
    return math.sqrt(sum(float((t.double() ** 2).sum()) for t in tensors.values()))


def minus(a: Tensors, b: Tensors) -> Tensors:
    assert a.keys() == b.keys()
    return {name: a[name].double() - b[name].double() for name in a}


def gradient_difference(found: Tensors, wanted: Tensors) -> float:
    """Largest |difference| / largest |wanted| of a tensor, of the worst tensor."""
    off = minus(found, wanted)
    return max(float(off[name].abs().max() / wanted[name].abs().max()) for name in wanted)


def relative(found: Tensors, wanted: Tensors) -> float:
    """|difference| / |wanted| of all tensors together."""
    return norm(minus(found, wanted)) / norm(wanted)


@dataclass(frozen=True)
class Difference:
    """How far a rank's step is from the plain one: gradient, weights (by their norm and the step's), worst metric."""

    gradient: float
    weights: float
    step: float
    metrics: float

    @property
    def same(self) -> bool:
        right = self.gradient <= GRADIENT_LIMIT and self.weights <= WEIGHTS_LIMIT
        return right and self.step <= UPDATE_LIMIT and self.metrics <= METRIC_LIMIT


def difference(
    case: Case, batch: Batch, metrics: dict[str, float], files: tuple[Path, Path], models: dict[str, Path]
) -> Difference:
    """Of a case's first update, whose gradient and weights lie in `files`."""
    gradient, weights = map(load_file, files)
    model = models[case.model]
    plain = plain_steps(model, models["reference"], (batch,), case.learner)
    stepped = norm(minus(plain.weights, load_file(model / "model.safetensors")))
    return Difference(
        gradient=gradient_difference(gradient, plain.gradient),
        weights=relative(weights, plain.weights),
        step=norm(minus(weights, plain.weights)) / stepped,
        metrics=max(abs(metrics[name] - value) / abs(value) for name, value in plain.metrics.items()),
    )
