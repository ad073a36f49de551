"""Whole learner ranks through DeepSpeed, each in a process of its own: the gradient and the step are the plain ones
whatever the micro-batches, the packing, the ZeRO stage and the number of ranks; the planted faults that this comparison
catches; what filtering leaves; saving and restoring."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

from learner.batching import plan_rows
from learner.checkpoint_writer import flush_to_disk
from tests.learner_cases import ALL, MEDIUM, RATE, TINY, Batch, Case, Job, Overrides, run_all, tiny_models, update
from tests.plain_step import (
    GRADIENT_LIMIT,
    UPDATE_LIMIT,
    WEIGHTS_LIMIT,
    Difference,
    difference,
    minus,
    norm,
    relative,
)
from tests.tiny import open_plain

BATCH = Batch(old=0.4)  # where some ratios are clipped on either side, and some corrections cut
OTHER_BATCH = Batch(seed=4, count=6, old=0.4)
TRUNCATED = Batch(old=0.4, truncated=3)
HALF_FLAT = Batch(old=0.4, flat=5)
NOTHING = Batch(old=0.4, advantage=0.0)
FILTER_LIMIT = 1e-6  # |difference| / |gradient|

NO_KL: Overrides = (("kl_coefficient", 0.0),)
FILTER: Overrides = (*NO_KL, ("filter_threshold", 0.0))
WARMED = (*FILTER, ("warmup", 4.0))
SCHEDULE = (("schedule", "cosine"), ("warmup", 1.0))

# -- what is run in every test run ----------------------------------------------------------------

STEPS = [  # every pair of values of two options occurs
    Case(zero=0, ranks=2, budget=TINY, packing=True, checkpointing=True),
    Case(zero=0, ranks=1, budget=MEDIUM, packing=False, tied=True),
    Case(zero=0, ranks=2, budget=ALL, packing=False, checkpointing=True, tied=True),
    Case(zero=1, ranks=1, budget=TINY, packing=False),
    Case(zero=1, ranks=2, budget=MEDIUM, packing=True, checkpointing=True, tied=True),
    Case(zero=1, ranks=1, budget=ALL, packing=True),
    Case(zero=2, ranks=2, budget=TINY, packing=False, tied=True),
    Case(zero=2, ranks=1, budget=MEDIUM, packing=True, checkpointing=True),
    Case(zero=2, ranks=2, budget=ALL, packing=False),
    Case(zero=3, ranks=2, budget=TINY, packing=True, tied=True),
    Case(zero=3, ranks=1, budget=MEDIUM, packing=False, checkpointing=True),
    Case(zero=3, ranks=1, budget=ALL, packing=True, tied=True),
    *(Case(zero=zero, ranks=ranks, budget=MEDIUM, optimizer="adamw_cpu") for zero, ranks in ((1, 1), (2, 2), (3, 1))),
]
OBJECTIVES = [
    Case(ranks=1, use="objective", learner=(("objective", "dr_grpo"), ("mask_truncated", True))),
    Case(ranks=2, use="objective", learner=(("objective", "dapo"), ("mask_truncated", True))),
    Case(ranks=1, use="objective", learner=(("objective", "dapo"), ("tokens_per_update", 60))),
    Case(ranks=2, use="objective", budget=TINY, learner=(("objective", "gspo"),)),
    Case(ranks=1, use="objective", budget=MEDIUM, learner=(("objective", "cispo"),)),
    Case(ranks=2, use="objective", learner=(("objective", "a_star_po"), *NO_KL)),
    Case(ranks=1, use="objective", learner=(("objective", "sft"),)),
]
FAULTY = [
    *(
        Case(zero=2, budget=budget, mutant=name)
        for budget, name in [
            (TINY, "loss normalised per micro-batch"),
            (ALL, "temperature left out"),
            (ALL, "positions that go on in a packed row"),
            (ALL, "mask of ones"),
            (ALL, "cache in use"),
            (ALL, "clip bounds swapped"),
            (ALL, "KL with the wrong sign"),
            (ALL, "KL the wrong way round"),
            (ALL, "no importance correction"),
        ]
    ),
    Case(zero=2, ranks=2, budget=TINY, mutant="gradient averaged over ranks"),
]
FILTERED = [
    Case(zero=zero, ranks=ranks, budget=budget, use="filter", learner=(*FILTER, ("objective", objective)))
    for zero, ranks, budget, objective in [
        (2, 1, TINY, "grpo"),
        (3, 2, MEDIUM, "grpo"),
        (0, 1, ALL, "dapo"),
        (2, 2, TINY, "dr_grpo"),
    ]
]
RENORMALISED = [
    Case(use="filter", mutant="loss normalised by what is left", learner=(*FILTER, ("objective", objective)))
    for objective in ("grpo", "dapo", "dr_grpo")
]
EMPTIED = [
    Case(zero=0, budget=TINY, use="empty", learner=WARMED),
    Case(zero=2, budget=TINY, optimizer="adamw_8bit", use="empty", learner=WARMED),
    Case(zero=1, dtype="bfloat16", use="empty", learner=WARMED),
    Case(zero=2, dtype="bfloat16", optimizer="adamw_cpu", use="empty", learner=WARMED),
    Case(zero=2, ranks=2, budget=TINY, use="empty", learner=WARMED),
    Case(zero=3, ranks=2, budget=TINY, dtype="bfloat16", use="empty", learner=WARMED),
]
STEP_ON_NOTHING = Case(use="empty", mutant="a step on nothing", learner=WARMED)
EIGHT_BIT = [
    *(Case(zero=zero, optimizer="adamw_8bit", use="eight_bit") for zero in (0, 2, 3)),
    Case(zero=0, optimizer="paged_adamw_8bit", use="eight_bit"),
]
BF16 = [  # at a rate that moves a norm's weight of 1 by more than a bfloat16
    Case(zero, ranks=ranks, dtype="bfloat16", optimizer=o, use="train", learner=(("learning_rate", 5e-3),))
    for zero, ranks, o in [*product(range(4), (1,), ("adamw", "adamw_8bit")), (1, 2, "adamw_8bit"), (3, 2, "adamw")]
] + [
    Case(zero, dtype="bfloat16", optimizer="adamw_cpu", use="train", learner=(("learning_rate", 5e-3),))
    for zero in (1, 2, 3)
]
IMPATIENCE = "no waiting for copies"
SLEEPS = [  # between two updates the optimizer's tensors lie elsewhere
    *(Case(z, optimizer=o, use="sleep", learner=SCHEDULE) for z in range(4) for o in ("adamw", "adamw_8bit")),
    *(Case(z, dtype="bfloat16", optimizer="adamw_8bit", use="sleep", learner=SCHEDULE) for z in range(4)),
    Case(2, ranks=2, optimizer="adamw_cpu", dtype="bfloat16", use="sleep", learner=SCHEDULE),
    Case(3, ranks=2, optimizer="adamw_8bit", use="sleep", learner=SCHEDULE),
]
HASTY = Case(2, use="sleep", mutant=IMPATIENCE, learner=SCHEDULE)
FORGETFUL = Case(2, use="sleep", mutant="moments lost in sleep", learner=SCHEDULE)
DECAYS = [
    Case(z, optimizer=o, use="decay", learner=(("weight_decay", 0.1), ("learning_rate", 0.1), *NO_KL))
    for z, o in ((0, "adamw"), (1, "adamw_8bit"), (2, "adamw_8bit"), (3, "adamw"))
]
REFUSALS = [
    Case(0, use="refuse"),
    Case(2, use="refuse"),
    Case(3, ranks=2, budget=TINY, use="refuse"),
]
OVERFLOWS = [
    Case(0, use="overflow"),
    Case(3, ranks=2, budget=TINY, use="overflow"),
    *(Case(zero, dtype="bfloat16", use="overflow") for zero in range(4)),
    *(Case(zero, dtype="bfloat16", optimizer="adamw_cpu", use="overflow") for zero in (2, 3)),
]
SAVES = [
    *(Case(z, use="save", optimizer=o, learner=SCHEDULE) for z in (0, 2, 3) for o in ("adamw", "adamw_8bit")),
    *(Case(z, use="save", dtype="bfloat16", optimizer="adamw_8bit", tied=True, learner=SCHEDULE) for z in (0, 1, 2)),
    Case(2, ranks=2, use="save", optimizer="adamw_8bit", learner=SCHEDULE),
    Case(3, ranks=2, use="save", dtype="bfloat16", optimizer="adamw", learner=SCHEDULE),
    *(Case(z, use="save", dtype="bfloat16", optimizer="adamw_cpu", learner=SCHEDULE) for z in (2, 3)),
]
IMPATIENT = [
    Case(z, ranks=r, use="save", mutant=IMPATIENCE, dtype=d, optimizer=o, learner=SCHEDULE)
    for z, r, d, o in (
        (0, 1, "float32", "adamw"),
        (2, 1, "float32", "adamw_8bit"),
        (3, 1, "float32", "adamw"),
        (3, 2, "bfloat16", "adamw"),
    )
]
RESETS = [Case(2, use="reset", mutant=mutant, learner=(("reset_optimizer", True),)) for mutant in (None, IMPATIENCE)]


def unfiltered(case: Case) -> Case:
    """The same without filtering and without a fault."""
    options = tuple(option for option in case.learner if option[0] != "filter_threshold")
    return replace(case, use="unfiltered", mutant=None, learner=options)


UNFILTERED = list(dict.fromkeys(map(unfiltered, [*FILTERED, *RENORMALISED])))


@dataclass(frozen=True)
class Outcomes:
    """Where gradients, weights and checkpoints lie, and what every action answered."""

    folder: Path
    models: dict[str, Path]
    answers: dict[str, list[Any]]

    def weights(self, name: str) -> dict[str, Tensor]:
        return load_file(self.folder / f"{name}.safetensors")

    def gradient(self, case: Case) -> dict[str, Tensor]:
        return load_file(self.folder / f"{case.name}-gradient.safetensors")

    def checkpoint(self, name: str) -> Path:
        return self.folder / f"{name}-checkpoint"

    def initial(self, case: Case) -> dict[str, Tensor]:
        return load_file(self.models[case.model] / "model.safetensors")

    def difference(self, case: Case, batch: Batch = BATCH) -> Difference:
        """From the plain step, of a case that made one."""
        files = (self.folder / f"{case.name}-gradient.safetensors", self.folder / f"{case.name}.safetensors")
        return difference(case, batch, self.answers[case.name][0], files, self.models)


class Jobs:
    """The jobs of every use, with their files in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def weights(self, name: str) -> list[Any]:
        return ["weights", str(self.folder / f"{name}.safetensors")]

    def save(self, name: str) -> list[Any]:
        return ["save", str(self.folder / f"{name}-checkpoint")]

    def save_late(self, name: str) -> list[Any]:
        return ["late save", str(self.folder / f"{name}-checkpoint")]

    def step(self, case: Case, batch: Batch = BATCH) -> Job:
        gradient = self.folder / f"{case.name}-gradient.safetensors"
        return Job(case, [update(batch, gradient=gradient), self.weights(case.name)])

    def empty(self, case: Case) -> list[Job]:
        """An update that filtering leaves nothing of between two others, and the two without it."""
        first, last = update(BATCH), [update(OTHER_BATCH), self.weights(case.name)]
        between = [self.save(f"{case.name}-before"), update(NOTHING), self.save(f"{case.name}-after")]
        return [Job(case, [first, *between, *last]), self.without(case)]

    def without(self, case: Case) -> Job:
        return Job(case, [update(BATCH), update(OTHER_BATCH), self.weights(f"{case.name}-without")], suffix="-without")

    def train(self, case: Case) -> Job:
        return Job(case, [update(Batch(old=0.0, advantage=1.0))] * 3 + [self.weights(case.name)])

    def decay(self, case: Case) -> Job:
        return Job(case, [update(Batch(advantage=0.0)), self.weights(case.name)])

    def refuse(self, case: Case) -> list[Job]:
        refused = [update(Batch(shift=0.5), on_policy=True), update(Batch(advantage=math.nan))]
        accepted = [update(Batch(), on_policy=True), update(Batch(shift=0.5))]
        return [
            Job(case, [*refused, self.weights(f"{case.name}-refused")], suffix="-refused"),
            Job(case, accepted, suffix="-accepted"),
        ]

    def overflow(self, case: Case) -> Job:
        return Job(case, [update(Batch(advantage=1e38)), self.weights(case.name)])

    def saved(self, case: Case) -> Job:
        before = [update(BATCH), update(OTHER_BATCH), self.weights(f"{case.name}-saved"), self.save_late(case.name)]
        return Job(case, [*before, update(BATCH), self.weights(case.name)])

    def sleep(self, case: Case) -> list[Job]:
        """Two updates with a save and a sleep between, and the two without them."""
        slept = [update(BATCH), self.save_late(case.name), ["sleep", None], update(OTHER_BATCH)]
        slept.append(self.weights(case.name))
        return [Job(case, slept), self.without(case)]

    def reset(self, case: Case) -> Job:
        """Saved twice with the same moments, and then they are forgotten."""
        reset = ["reset", str(self.folder / f"{case.name}-reference")]
        return Job(case, [update(BATCH), self.save(f"{case.name}-before"), self.save_late(case.name), reset])

    def resumed(self, case: Case) -> Job:
        checkpoint = self.folder / f"{case.name}-checkpoint"
        return Job(case, [update(BATCH), self.weights(f"{case.name}-resumed")], resume=checkpoint, suffix="-resumed")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Everything of this file, in as few processes as can be: they take seconds to start."""
    folder = tmp_path_factory.mktemp("outcomes")
    models = tiny_models(folder / "models")
    make = Jobs(folder)
    jobs = [make.step(case) for case in [*STEPS, *FAULTY, *EIGHT_BIT]]
    jobs += [make.step(case, TRUNCATED) for case in OBJECTIVES]
    jobs += [make.step(case, HALF_FLAT) for case in [*FILTERED, *RENORMALISED, *UNFILTERED]]
    jobs += [job for case in EMPTIED for job in make.empty(case)] + make.empty(STEP_ON_NOTHING)[:1]
    jobs += [job for case in [*SLEEPS, HASTY, FORGETFUL] for job in make.sleep(case)]
    jobs += [*map(make.train, BF16), *map(make.decay, DECAYS), *map(make.overflow, OVERFLOWS)]
    jobs += [job for case in REFUSALS for job in make.refuse(case)]
    jobs += [*map(make.saved, [*SAVES, *IMPATIENT]), *map(make.reset, RESETS)]
    # One rank resumes in a fresh process; for two it would cost two more, so a fresh LearnerRank must do.
    jobs += [make.resumed(case) for case in SAVES if case.ranks == 2]
    alone = [make.resumed(case) for case in SAVES if case.ranks == 1]
    return Outcomes(folder, models, run_all(folder / "runs", models, jobs, alone))


def ids(cases: Iterable[Case]) -> list[str]:
    return [case.name for case in cases]


# -- one step is the plain step -------------------------------------------------------------------


@pytest.mark.parametrize("case", STEPS, ids=ids(STEPS))
def test_the_gradient_and_the_step_are_the_plain_ones(case: Case, outcomes: Outcomes) -> None:
    found = outcomes.difference(case)
    assert found.same, found


def test_every_pair_of_options_is_stepped_with() -> None:
    names = ("zero", "ranks", "budget", "packing", "checkpointing", "tied")
    rows = [[(name, getattr(case, name)) for name in names] for case in STEPS]
    values = [sorted({row[place] for row in rows}) for place in range(len(names))]
    assert [len(found) for found in values] == [4, 2, 3, 2, 2, 2]
    for one, other in combinations(values, 2):
        assert set(product(one, other)) <= {pair for row in rows for pair in product(row, row)}


def test_the_update_batch_is_cut_otherwise_by_every_budget_and_packs_rows_at_each(outcomes: Outcomes) -> None:
    lengths = [s.length for s in BATCH.sequences(outcomes.models["untied"])]
    plans = {budget: plan_rows(lengths, budget, packing=True) for budget in (TINY, MEDIUM, ALL)}
    assert [len(plan) for plan in plans.values()] == [6, 3, 1]
    assert all(any(len(row) > 1 for rows in plan for row in rows) for plan in plans.values())


def test_one_step_logs_what_the_sampler_would_say(outcomes: Outcomes) -> None:
    for case in STEPS:
        metrics = outcomes.answers[case.name][0]
        assert metrics["rollout/logprob_diff"] < 1e-6 and metrics["rollout/logprob_diff_max"] < 1e-5


@pytest.mark.parametrize("case", OBJECTIVES, ids=ids(OBJECTIVES))
def test_with_every_objective_the_gradient_is_the_plain_one(case: Case, outcomes: Outcomes) -> None:
    found = outcomes.difference(case, TRUNCATED)
    assert found.same, found


@pytest.mark.parametrize("case", FAULTY, ids=[case.mutant for case in FAULTY])
def test_the_comparison_sees_a_planted_fault(case: Case, outcomes: Outcomes) -> None:
    found = outcomes.difference(case)
    assert found.gradient > 100 * GRADIENT_LIMIT, found
    if case.mutant != "gradient averaged over ranks":  # which clipping to the norm hides from the weights
        assert found.weights > 2 * WEIGHTS_LIMIT and found.step > 2 * UPDATE_LIMIT, found


@pytest.mark.parametrize("case", EIGHT_BIT, ids=ids(EIGHT_BIT))
def test_the_first_step_in_8_bits_is_that_of_32(case: Case, outcomes: Outcomes) -> None:
    found = outcomes.difference(case)
    assert found.same, found


# -- filtering ------------------------------------------------------------------------------------


def filtering_difference(case: Case, outcomes: Outcomes) -> float:
    """|difference| / |gradient| of a case from the same without filtering."""
    return relative(outcomes.gradient(case), outcomes.gradient(unfiltered(case)))


@pytest.mark.parametrize("case", FILTERED, ids=ids(FILTERED))
def test_what_is_filtered_at_0_changes_no_gradient(case: Case, outcomes: Outcomes) -> None:
    metrics, *_ = outcomes.answers[case.name]
    assert metrics["policy/filtered"] == pytest.approx(HALF_FLAT.flat / HALF_FLAT.count)
    assert metrics["tokens/trained"] < outcomes.answers[unfiltered(case).name][0]["tokens/trained"]
    assert filtering_difference(case, outcomes) <= FILTER_LIMIT


@pytest.mark.parametrize("case", RENORMALISED, ids=ids(RENORMALISED))
def test_the_comparison_sees_a_loss_normalised_by_what_is_left(case: Case, outcomes: Outcomes) -> None:
    assert filtering_difference(case, outcomes) > 0.1


@pytest.mark.parametrize("case", EMPTIED, ids=ids(EMPTIED))
def test_nothing_left_makes_no_step(case: Case, outcomes: Outcomes) -> None:
    _, _, nothing, _, after, version, _ = outcomes.answers[case.name]
    assert nothing == {"policy/filtered": 1.0, "policy/updates": 0.0}
    assert changed(case, outcomes) == []
    _, alone, version_alone, _ = outcomes.answers[case.name + "-without"]
    assert (after, version) == (alone, version_alone) and version == 2
    assert after["policy/updates"] == 1.0 and after["policy/learning_rate"] == RATE / 2
    weights, without = outcomes.weights(case.name), outcomes.weights(f"{case.name}-without")
    assert all(torch.equal(weights[name], without[name]) for name in without)


def test_the_comparison_sees_a_step_on_nothing(outcomes: Outcomes) -> None:
    assert changed(STEP_ON_NOTHING, outcomes) == ["model.safetensors", "rank_0.json", "rank_0.safetensors"]


def changed(case: Case, outcomes: Outcomes) -> list[str]:
    """Files with weights, optimizer state or version that the update without completions has changed."""
    before, after = outcomes.checkpoint(f"{case.name}-before"), outcomes.checkpoint(f"{case.name}-after")
    files = [path.relative_to(before) for path in before.rglob("*") if path.is_file()]
    assert len([path for path in files if path.parent.name == "trainer"]) == 2 * case.ranks
    return sorted(path.name for path in files if (before / path).read_bytes() != (after / path).read_bytes())


# -- bfloat16, weight decay -----------------------------------------------------------------------


@pytest.mark.parametrize("case", BF16, ids=ids(BF16))
def test_bfloat16_trains(case: Case, outcomes: Outcomes) -> None:
    *updates, version, _ = outcomes.answers[case.name]
    losses = [metrics["policy/loss"] for metrics in updates]
    assert version == 3 and all(math.isfinite(loss) for loss in losses)
    assert all(0 < metrics["policy/grad_norm"] < math.inf for metrics in updates)
    assert losses[2] < losses[0]  # the same completions, all wanted, become likelier
    weights, before = outcomes.weights(case.name), outcomes.initial(case)
    for name, tensor in weights.items():
        assert tensor.dtype == torch.bfloat16
        assert not torch.equal(tensor, before[name].bfloat16()), name


@pytest.mark.parametrize("case", DECAYS, ids=ids(DECAYS))
def test_without_a_gradient_matrices_decay_and_norms_stay(case: Case, outcomes: Outcomes) -> None:
    assert outcomes.answers[case.name][0]["policy/grad_norm"] == 0.0
    before = outcomes.initial(case)
    for name, tensor in outcomes.weights(case.name).items():
        if tensor.ndim >= 2:
            torch.testing.assert_close(tensor, before[name] * (1 - 0.1 * 0.1), rtol=1e-6, atol=0)
        else:
            assert torch.equal(tensor, before[name]), name


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", REFUSALS, ids=ids(REFUSALS))
def test_log_probs_that_are_not_the_samplers_stop_an_on_policy_update_before_the_step(
    case: Case, outcomes: Outcomes
) -> None:
    wrong, nan, version, _ = outcomes.answers[case.name + "-refused"]
    assert "rollout.logprob_diff=0.001" in wrong["error"] and "100 times that" in wrong["error"]
    assert "5.00e-01 on average" in wrong["error"]
    assert "The loss of policy version 0 is nan" in nan["error"]
    assert version == 0
    before = outcomes.initial(case)
    for name, tensor in outcomes.weights(case.name + "-refused").items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("case", REFUSALS, ids=ids(REFUSALS))
def test_the_right_log_probs_pass_on_policy_and_any_pass_off_policy(case: Case, outcomes: Outcomes) -> None:
    on_policy, off_policy, _ = outcomes.answers[case.name + "-accepted"]
    assert on_policy["rollout/logprob_diff_max"] < 1e-5
    assert off_policy["rollout/logprob_diff"] > 0.4


@pytest.mark.parametrize("case", OVERFLOWS, ids=ids(OVERFLOWS))
def test_a_gradient_that_overflows_under_a_finite_loss_stops_the_run(case: Case, outcomes: Outcomes) -> None:
    answer, version, _ = outcomes.answers[case.name]
    assert "The gradient of policy version 0 overflowed" in answer["error"]
    assert version == 0


# -- sleep ----------------------------------------------------------------------------------------


def asleep_and_not(case: Case, outcomes: Outcomes) -> bool:
    """Whether metrics and weights after a sleep are, to the last bit, those without one."""
    *_, after, version, _ = outcomes.answers[case.name]
    alone = outcomes.answers[case.name + "-without"]
    weights, without = outcomes.weights(case.name), outcomes.weights(f"{case.name}-without")
    return (after, version) == (alone[1], alone[2]) and all(torch.equal(weights[n], without[n]) for n in without)


@pytest.mark.parametrize("case", SLEEPS, ids=ids(SLEEPS))
def test_an_optimizer_that_slept_goes_on_bit_for_bit(case: Case, outcomes: Outcomes) -> None:
    assert asleep_and_not(case, outcomes)


def test_moments_lost_in_sleep_would_be_seen(outcomes: Outcomes) -> None:
    assert not asleep_and_not(FORGETFUL, outcomes)


@pytest.mark.parametrize("case", [*SLEEPS, HASTY], ids=ids([*SLEEPS, HASTY]))
def test_moments_are_copied_before_they_sleep_or_it_would_be_seen(case: Case, outcomes: Outcomes) -> None:
    _, _, copied, *_ = outcomes.answers[case.name]
    assert copied == (case.mutant is None)


# -- save and restore -----------------------------------------------------------------------------


@pytest.mark.parametrize("case", SAVES, ids=ids(SAVES))
def test_a_restored_rank_goes_on_bit_for_bit(case: Case, outcomes: Outcomes) -> None:
    *_, metrics, version, _ = outcomes.answers[case.name]
    resumed_metrics, resumed_version, _ = outcomes.answers[case.name + "-resumed"]
    assert (metrics, version) == (resumed_metrics, resumed_version)
    assert version == 3 and metrics["policy/learning_rate"] < RATE
    left_alone, resumed = outcomes.weights(case.name), outcomes.weights(case.name + "-resumed")
    assert left_alone.keys() == resumed.keys()
    assert all(torch.equal(left_alone[name], resumed[name]) for name in left_alone)
    saved = outcomes.weights(case.name + "-saved")
    assert norm(minus(left_alone, saved)) > 1e-4 * norm(saved)  # and it goes on indeed


@pytest.mark.parametrize("case", IMPATIENT, ids=ids(IMPATIENT))
def test_a_step_made_before_the_copies_would_be_seen(case: Case, outcomes: Outcomes) -> None:
    for file in ("model.safetensors", "trainer/rank_0.safetensors"):
        right, wrong = (
            load_file(outcomes.checkpoint(name) / file) for name in (replace(case, mutant=None).name, case.name)
        )
        assert right.keys() == wrong.keys() and not all(torch.equal(right[name], wrong[name]) for name in right)


@pytest.mark.parametrize("case", RESETS, ids=ids(RESETS))
def test_moments_are_copied_before_a_reset_forgets_them_or_it_would_be_seen(case: Case, outcomes: Outcomes) -> None:
    before, late = (
        (outcomes.checkpoint(name) / "trainer" / "rank_0.safetensors").read_bytes()
        for name in (f"{case.name}-before", case.name)
    )
    assert (before == late) == (case.mutant is None)


@pytest.mark.parametrize("case", SAVES, ids=ids(SAVES))
def test_a_checkpoint_opens_with_transformers_and_holds_no_pickle(case: Case, outcomes: Outcomes) -> None:
    folder = outcomes.checkpoint(case.name)
    files = {path for path in folder.rglob("*") if path.is_file()}
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jinja", ".txt", ".model"}
    assert {path.name for path in (folder / "trainer").iterdir()} == {
        f"rank_{rank}.{suffix}" for rank in range(case.ranks) for suffix in ("json", "safetensors")
    }
    saved = outcomes.weights(case.name + "-saved")
    opened = dict(open_plain(folder, getattr(torch, case.dtype)).named_parameters())
    assert opened.keys() == saved.keys()
    assert all(torch.equal(opened[name], saved[name]) for name in saved)
    assert json.loads((folder / "config.json").read_text())["use_cache"] is True
    assert AutoTokenizer.from_pretrained(folder).chat_template


@pytest.mark.parametrize("case", [c for c in SAVES if c.optimizer == "adamw_8bit"], ids=lambda case: case.name)
def test_8_bit_state_is_saved_in_8_bits(case: Case, outcomes: Outcomes) -> None:
    tensors = load_file(outcomes.checkpoint(case.name) / "trainer" / "rank_0.safetensors")
    held = {name: tensor for name, tensor in tensors.items() if name.endswith((".state1", ".state2"))}
    assert any(tensor.dtype == torch.uint8 and tensor.any() for tensor in held.values())


def test_flushing_passes_over_the_draft_of_another_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"whole")
    draft = tmp_path / ".tmp0"
    draft.write_bytes(b"draft")
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    listed = [*tmp_path.rglob("*")]
    draft.rename(tmp_path / "rank_1.safetensors")
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: iter(listed))
    flush_to_disk(tmp_path)
    assert sorted(flushed) == [str(tmp_path), str(tmp_path / "model.safetensors")]
