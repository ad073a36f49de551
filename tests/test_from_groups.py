"""Groups with verdicts into sequences, and sampling batches into update batches."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import Learner
from data.records import Completion, Group, Problem, Prompt, Verdict
from learner.advantages import group_advantages
from learner.from_groups import sequences_of, update_batches
from tests.tiny import tiny_completions

REWARDS = [[0.0, 1.0, 1.0], [0.5, 0.5, 0.5], [1.0, 0.25, 0.0]]


def completion(index: int, length: int) -> Completion:
    return Completion(
        index=index,
        seed=index,
        token_ids=np.arange(length, dtype=np.int32),
        logprobs=-np.arange(length, dtype=np.float32),
        versions=np.zeros(length, dtype=np.int32),
        text="",
        finish_reason="length" if index == 1 else "stop",
    )


def groups_of(rewards: list[list[float]]) -> list[Group]:
    return [
        Group(
            Prompt(visit, Problem(f"p{visit}", "?", "1"), (7, visit)),
            tuple(completion(index, 2 + visit + index) for index in range(len(row))),
            tuple(Verdict({"correct": reward}, reward, "correct", "1") for reward in row),
        )
        for visit, row in enumerate(rewards)
    ]


def learner(**options: object) -> Learner:
    return Learner.model_validate(options)


def test_every_completion_becomes_a_sequence_in_order() -> None:
    groups = groups_of(REWARDS)
    sequences = sequences_of(groups, learner())
    pairs = [(group, c) for group in groups for c in group.completions]
    for s, (group, c) in zip(sequences, pairs, strict=True):
        assert s.prompt_ids.tolist() == list(group.prompt.token_ids)
        assert s.completion_ids.tolist() == c.token_ids.tolist()
        assert s.sampler_logprobs.tolist() == c.logprobs.tolist()
        assert (s.truncated, s.old_logprobs) == (c.index == 1, None)


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, "group_std"),
        ({"objective": "dr_grpo"}, "no_std"),
        ({"advantage": "batch_std"}, "batch_std"),
        ({"objective": "dr_grpo", "advantage": "leave_one_out"}, "leave_one_out"),
    ],
)
def test_the_advantages_are_of_the_kind_that_the_config_says(options: dict[str, object], kind: str) -> None:
    found = [s.advantage for s in sequences_of(groups_of(REWARDS), learner(**options))]
    assert found == group_advantages(np.array(REWARDS), kind).ravel().tolist()  # type: ignore[arg-type]


def test_the_advantage_of_a_star_po_is_the_reward_minus_the_value_of_its_problem() -> None:
    values = {"p2": 0.75, "p0": 0.9, "p1": 0.5}
    sequences = sequences_of(groups_of(REWARDS), learner(objective="a_star_po"), values)
    assert [s.advantage for s in sequences] == pytest.approx([-0.9, 0.1, 0.1, 0.0, 0.0, 0.0, 0.25, -0.5, -0.75])


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_update_batches_are_a_sampling_batch_cut_in_order(count: int, size: int, seed: int) -> None:
    sequences = tiny_completions(seed, count)
    batches = update_batches(sequences, size, None)
    assert [s for batch in batches for s in batch] == sequences
    assert all(len(batch) == size for batch in batches[:-1]) and 1 <= len(batches[-1]) <= size


@given(st.integers(1, 12), st.integers(1, 80), st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_a_token_budget_takes_the_first_completions_that_fit_and_at_least_one(
    count: int, budget: int, seed: int
) -> None:
    sequences = tiny_completions(seed, count)
    (batch,) = update_batches(sequences, 1, budget)
    assert batch == sequences[: len(batch)]
    tokens = [len(s.completion_ids) for s in sequences]
    assert len(batch) == 1 or sum(tokens[: len(batch)]) <= budget
    assert len(batch) == count or sum(tokens[: len(batch) + 1]) > budget
