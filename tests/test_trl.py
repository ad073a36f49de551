"""Our losses and TRL's: of the same models, completions, rewards and log-probs both make the same loss and gradient.

Where TRL means something else, a test says what, and shows it. TRL runs in an environment of its own (`.venv-trl`, see
the Makefile) through `trl_losses.py`, from rewards and the sampler's log-probs to the gradient of an optimizer step.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
from collections.abc import Sequence as ListOf
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from learner.advantages import EPSILON, Kind, group_advantages
from learner.batching import Sequence, kept, micro_batches, token_weights
from learner.objectives import OBJECTIVES, LossInputs, LossOptions, total_loss
from learner.policy import SampledFrom, load_policy
from tests.tiny import MAX_COMPLETION
from tests.trl_cases import (
    BONUS,
    COUNT,
    GROUP,
    GROUPS,
    KL,
    PLAIN,
    SAME,
    STEPS,
    TEMPERATURE,
    Models,
    Step,
    completions,
    in_trls_words,
    models_in,
    rewards,
    settings,
)

ROOT = Path(__file__).resolve().parents[1]
TRL_PYTHON = ROOT / ".venv-trl" / "bin" / "python"

# Both compute in float32, TRL with prompts padded on the left, we with packed rows. Measured: 2e-6, and 8e-6 with the
# sequence correction, whose ratio adds up the rounding of a whole completion.
LIMIT = 3e-5
FAULT = 1e-2  # what is not the same is further off than this
BUDGET = 48  # tokens of our micro-batches: two rows of the longest completions
SAMPLED_FROM = SampledFrom(TEMPERATURE)


@dataclass(frozen=True)
class Found:
    """Loss and gradient of a step, and what else was told of it: our statistics, or TRL's metrics and advantages."""

    loss: float
    gradient: dict[str, Tensor]
    others: dict[str, Tensor]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return models_in(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def sequences(models: Models) -> list[Sequence]:
    return completions(models.old)


# -- TRL's steps ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trl(models: Models, sequences: list[Sequence], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    """TRL's answer to every step, from one process."""
    folder = tmp_path_factory.mktemp("trl")
    task = {
        "policy": str(models.policy),
        "old": str(models.old),
        "reference": str(models.reference),
        "completions": [
            {
                "prompt_ids": s.prompt_ids.tolist(),
                "completion_ids": s.completion_ids.tolist(),
                "logprobs": s.sampler_logprobs.tolist(),
                "reward": reward,
            }
            for s, reward in zip(sequences, rewards().ravel().tolist(), strict=True)
        ],
        "cases": {case: {"config": in_trls_words(step), "sizes": step.sizes} for case, step in STEPS.items()},
    }
    (folder / "in.json").write_text(json.dumps(task))
    assert TRL_PYTHON.exists(), f"{TRL_PYTHON} is missing; `make setup-dev` makes it"
    files = [str(folder / name) for name in ("in.json", "out.safetensors")]
    done = subprocess.run(
        [str(TRL_PYTHON), "-m", "tests.trl_losses", *files], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return answers(Path(files[1]))


def answers(path: Path) -> dict[str, Found]:
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no mapping

    def those(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

    return {
        case: Found(float(tensors[f"{case}/loss"]), those(f"{case}/gradient/"), those(f"{case}/told/"))
        for case in STEPS
    }


# -- our steps ------------------------------------------------------------------------------------


def ours(
    models: Models,
    sequences: ListOf[Sequence],
    step: Step,
    weights: ListOf[float] | None = None,
    sampled_from: SampledFrom = SAMPLED_FROM,
) -> Found:
    """Gradient accumulated over our micro-batches; weights: instead of the objective's."""
    options = step.options
    policy = load_policy(models.policy, "float32", 16, False, entropy_gradient=options.entropy_coefficient > 0)
    reference = load_policy(models.reference, "float32", 16, False)
    if weights is None:
        denominator = OBJECTIVES[options.objective].denominator
        constant = float(MAX_COMPLETION) if denominator == "constant" else 0.0
        weights = token_weights(sequences, denominator, constant, step.mask_truncated)
    told: dict[str, Tensor] = {}
    for batch in micro_batches(sequences, weights, kept(sequences, weights, None), BUDGET, True, 0, 1):
        tokens = batch.input_ids, batch.position_ids, batch.rows, batch.columns, batch.targets, sampled_from
        logprobs, entropies = policy(*tokens)
        with torch.no_grad():
            reference_logprobs = reference(*tokens)[0] if options.kl_coefficient else None
        assert batch.old_logprobs is not None
        inputs = LossInputs(
            logprobs=logprobs,
            old_logprobs=logprobs.detach() if step.on_policy else batch.old_logprobs,
            sampler_logprobs=batch.sampler_logprobs,
            reference_logprobs=reference_logprobs,
            entropies=entropies,
            advantages=batch.advantages,
            weights=batch.weights,
            sequence=batch.sequence,
        )
        loss, statistics = total_loss(inputs, options)
        loss.backward()
        statistics |= {"loss": loss, "entropy": entropies.sum(), "tokens": torch.tensor(len(logprobs))}
        told = {name: told.get(name, 0.0) + value.detach().double() for name, value in statistics.items()}
    gradient = {name: p.grad for name, p in policy.named_weights().items() if p.grad is not None}
    return Found(float(told.pop("loss")), gradient, told)


def difference(found: Found, wanted: Found) -> float:
    """Of the losses, in mean |advantage|s; of the gradients, in the largest entry of the tensor: the worst."""
    assert found.gradient.keys() == wanted.gradient.keys()
    off = [(found.gradient[name] - value).abs().max() / value.abs().max() for name, value in wanted.gradient.items()]
    scale = float(np.abs(group_advantages(rewards(), "no_std")).mean())
    return max(abs(found.loss - wanted.loss) / scale, *map(float, off))


# -- what is the same -----------------------------------------------------------------------------


@pytest.mark.parametrize("case", SAME)
def test_loss_and_gradient_are_trls(
    case: str, models: Models, sequences: list[Sequence], trl: dict[str, Found]
) -> None:
    assert difference(ours(models, sequences, STEPS[case]), trl[case]) <= LIMIT


def test_kl_entropy_and_clip_fraction_are_trls(
    models: Models, sequences: list[Sequence], trl: dict[str, Found]
) -> None:
    statistics, metrics = ours(models, sequences, STEPS["grpo, KL"]).others, trl["grpo, KL"].others
    for name, metric in {"kl": "kl", "entropy": "entropy", "clipped": "clip_ratio/region_mean"}.items():
        assert float(statistics[name] / statistics["tokens"]) == pytest.approx(float(metrics[metric]), rel=1e-5), name


@pytest.mark.parametrize("name", PLAIN)
def test_every_option_of_the_comparison_matters(name: str, trl: dict[str, Found]) -> None:
    plain = trl[f"{name}, as it is"]
    same = {case for case in settings(name) if difference(trl[case], plain) <= FAULT}
    assert same == {f"{name}, as it is", f"{name}, four micro-batches"}


SWAPPED = {name: {"clip_low": PLAIN[name].clip_high, "clip_high": PLAIN[name].clip_low} for name in PLAIN}


@pytest.mark.parametrize(
    ("case", "fault"),
    [
        *((f"{name}, as it is", SWAPPED[name]) for name in ("grpo", "dr_grpo", "dapo", "gspo")),
        ("grpo, KL", {"kl_coefficient": -KL["kl_coefficient"]}),
        ("grpo, KL", {"kl_estimator": "k2"}),
        ("grpo, as it is", {"objective": "dapo"}),
        ("gspo, as it is", {"objective": "grpo"}),
        ("cispo, as it is", {"ratio_cap": 2.3}),
        ("grpo, two-sided clip", {"ratio_cap": None}),
        ("grpo, token correction", {"importance_correction": "off"}),
        ("grpo, sequence correction", {"importance_correction": "token"}),
        ("dapo, entropy bonus", {"entropy_coefficient": -BONUS}),
    ],
    ids=str,
)
def test_the_comparison_sees_a_wrong_loss(
    case: str, fault: dict[str, Any], models: Models, sequences: list[Sequence], trl: dict[str, Found]
) -> None:
    wrong = replace(STEPS[case], options=replace(STEPS[case].options, **fault))
    assert difference(ours(models, sequences, wrong), trl[case]) > FAULT


def test_the_comparison_sees_wrong_log_probs_and_lengths(
    models: Models, sequences: list[Sequence], trl: dict[str, Found]
) -> None:
    step, masked = STEPS["dapo, as it is"], STEPS["dapo, truncated left out"]
    hot = ours(models, sequences, step, sampled_from=SampledFrom(1.0))
    assert difference(hot, trl["dapo, as it is"]) > FAULT
    assert difference(ours(models, sequences, replace(step, on_policy=True)), trl["dapo, as it is"]) > FAULT
    counted = [0.0 if s.truncated else 1.0 / sum(len(t.completion_ids) for t in sequences) for s in sequences]
    assert difference(ours(models, sequences, masked, counted), trl["dapo, truncated left out"]) > FAULT


# -- what is not ----------------------------------------------------------------------------------


def test_trls_kl_is_multiplied_by_the_ratio_unless_told_otherwise(
    models: Models, sequences: list[Sequence], trl: dict[str, Found]
) -> None:
    """use_bias_correction_kl, on by default, is a ratio that carries a gradient: on-policy the loss is still k3's, but
    the gradient is k2's, that of the reverse KL. We say kl_estimator=k2 for it, and by default mean k3 throughout."""
    case = "corrected KL"
    k3 = ours(models, sequences, STEPS[case])
    k2 = ours(models, sequences, replace(STEPS[case], options=replace(STEPS[case].options, kl_estimator="k2")))
    assert difference(replace(k3, gradient=k2.gradient), trl[case]) <= LIMIT
    assert difference(k3, trl[case]) > FAULT and abs(k2.loss - trl[case].loss) > FAULT


@pytest.mark.parametrize(("case", "cut"), [("top_k", {"top_k": 5}), ("top_p", {"top_p": 0.8})])
def test_trls_log_probs_do_not_know_of_top_k_and_top_p(
    case: str, cut: dict[str, Any], models: Models, sequences: list[Sequence], trl: dict[str, Found]
) -> None:
    """Both divide logits by the temperature; only ours are then cut as the sampler cut them."""
    assert difference(ours(models, sequences, STEPS[case]), trl[case]) <= LIMIT
    as_sampled = replace(SAMPLED_FROM, **cut)
    assert difference(ours(models, sequences, STEPS[case], sampled_from=as_sampled), trl[case]) > FAULT


@pytest.mark.parametrize("name", ["grpo", "dr_grpo"])
def test_trls_mean_over_completions_is_one_of_micro_batches(
    name: str, models: Models, sequences: list[Sequence], trl: dict[str, Found]
) -> None:
    """The mean of the means of its micro-batches, each by its own number of completions. TRL's sampler makes all
    equal, and then it is ours ("four micro-batches"); of unequal ones each completion of a small one weighs more."""
    step = STEPS[f"{name}, uneven"]
    weights: list[float] = []
    for size in step.sizes:
        lengths = [len(s.completion_ids) for s in sequences[len(weights) : len(weights) + size]]
        weights += [1.0 / ((n if name == "grpo" else MAX_COMPLETION) * size * len(step.sizes)) for n in lengths]
    assert difference(ours(models, sequences, step, weights), trl[f"{name}, uneven"]) <= LIMIT
    assert difference(ours(models, sequences, step), trl[f"{name}, uneven"]) > FAULT


def test_trls_mean_over_tokens_is_one_of_the_sampling_batch(
    models: Models, sequences: list[Sequence], trl: dict[str, Found]
) -> None:
    """With several optimizer steps a sampling batch, dapo and cispo divide each step's sum by the mean number of tokens
    of all; we divide by the tokens of the step's own update batch, so it does not matter what the others hold."""
    half = sequences[: COUNT // 2]
    tokens = sum(len(s.completion_ids) for s in sequences)
    weights = [1.0 / (tokens / 2)] * len(half)
    assert difference(ours(models, half, STEPS["half"], weights), trl["half"]) <= LIMIT
    assert difference(ours(models, half, STEPS["half"]), trl["half"]) > FAULT


def test_trls_entropy_bonus_is_a_mean_over_the_tokens_of_each_micro_batch(
    models: Models, sequences: list[Sequence], trl: dict[str, Found]
) -> None:
    """Whatever the objective; ours has the weights of the objective, like the KL of both. For dapo and cispo they
    are the same mean while there is one micro-batch ("entropy bonus")."""
    size = COUNT // STEPS["bonus"].micro_batches
    weights: list[float] = []
    for start in range(0, COUNT, size):
        tokens = sum(len(s.completion_ids) for s in sequences[start : start + size])
        weights += [1.0 / (tokens * STEPS["bonus"].micro_batches)] * size
    alone = Step(LossOptions("dapo", entropy_coefficient=BONUS))
    bonus = ours(models, [replace(s, advantage=0.0) for s in sequences], alone, weights)
    plain = ours(models, sequences, STEPS["grpo, as it is"])
    both = {name: plain.gradient[name] + value for name, value in bonus.gradient.items()}
    assert difference(Found(plain.loss + bonus.loss, both, {}), trl["bonus"]) <= LIMIT
    assert difference(ours(models, sequences, STEPS["bonus"]), trl["bonus"]) > FAULT


@pytest.mark.parametrize("kind", ["group_std", "batch_std"])
def test_trls_standard_deviation_has_a_larger_epsilon(kind: Kind, trl: dict[str, Found]) -> None:
    """1e-4, for our 1e-6; rewards that differ by as little as that are told apart by ours."""
    given = rewards()
    deviation = given.std(axis=1 if kind == "group_std" else None, ddof=1, keepdims=True)
    wanted = group_advantages(given, kind) * (deviation + EPSILON) / (deviation + 1e-4)
    found = trl[kind].others["advantages"].numpy().reshape(GROUPS, GROUP)
    np.testing.assert_allclose(found, wanted, rtol=2e-6)
    assert not np.allclose(found, group_advantages(given, kind), rtol=2e-5)


# -- the environment ------------------------------------------------------------------------------


def test_trl_is_in_its_own_environment_only_in_the_version_of_its_lock() -> None:
    lock = (ROOT / "requirements-trl.lock").read_text().splitlines()
    code = "import importlib.metadata as m; print('trl==' + m.version('trl'))"
    version = subprocess.run([TRL_PYTHON, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert [line for line in lock if not line.startswith("#")] == [version]
    assert importlib.util.find_spec("trl") is None
