"""Advantages: what a reward is worth beside its group's others, and beside A*-PO's optimal value."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from learner.advantages import Kind, flat_groups, group_advantages
from learner.optimal_values import optimal_value

KINDS: tuple[Kind, ...] = get_args(Kind)
PROMPTS, COMPLETIONS, SEEDS = st.integers(1, 5), st.integers(2, 8), st.integers(0, 2**31)


def rewards_of(prompts: int, completions: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(3.0, 2.0, (prompts, completions))


def plain_deviation(values: list[float]) -> float:
    """The sample's standard deviation, n - 1."""
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))


# -- every kind -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@given(PROMPTS, COMPLETIONS, st.sampled_from([0.1 + 0.2, 1 / 3, 1.2, 0.0, -1e9, 1e-12]))
@settings(max_examples=50, deadline=None)
def test_equal_rewards_give_exact_zeros(kind: Kind, prompts: int, completions: int, reward: float) -> None:
    rewards = np.full((prompts, completions), reward)
    assert not group_advantages(rewards, kind).any()
    beside = np.concatenate([rewards, rewards_of(1, completions, 0)])
    assert not group_advantages(beside, kind)[:-1].any()
    assert group_advantages(beside, kind)[-1].all()


@pytest.mark.parametrize("kind", ["group_std", "no_std", "leave_one_out"])
def test_groups_do_not_touch_each_other_and_equality_is_exact(kind: Kind) -> None:
    rewards = np.array([[0.3, 0.3, 0.1 + 0.2], [1.0, 1.0, 1.0], [0.0, 1.0, 0.0]])
    assert flat_groups(rewards).tolist() == [False, True, False]
    advantages = group_advantages(rewards, kind)
    assert advantages[0].any()  # 0.1 + 0.2 is not 0.3
    assert not advantages[1].any()
    assert advantages[2].tolist() == group_advantages(rewards[2:], kind)[0].tolist()


@pytest.mark.parametrize("kind", KINDS)
@given(PROMPTS, COMPLETIONS, SEEDS)
@settings(max_examples=50, deadline=None)
def test_advantages_add_up_to_zero_in_each_group(kind: Kind, prompts: int, completions: int, seed: int) -> None:
    rewards = rewards_of(prompts, completions, seed)
    advantages = group_advantages(rewards, kind)
    assert advantages.dtype == np.float32 and advantages.shape == rewards.shape
    np.testing.assert_allclose(advantages.sum(axis=1), 0.0, atol=1e-5)


# -- each kind beside a naive loop ----------------------------------------------------------------


def naive(rewards: list[list[float]], kind: Kind) -> list[list[float]]:
    batch = plain_deviation([r for group in rewards for r in group])
    rows = []
    for group in rewards:
        mean = sum(group) / len(group)
        row = []
        for place, reward in enumerate(group):
            others = group[:place] + group[place + 1 :]
            row.append(
                {
                    "group_std": (reward - mean) / (plain_deviation(group) or 1.0),
                    "batch_std": (reward - mean) / (batch or 1.0),
                    "no_std": reward - mean,
                    "leave_one_out": reward - sum(others) / len(others),
                }[kind]
            )
        rows.append(row)
    return rows


@pytest.mark.parametrize("kind", KINDS)
@given(PROMPTS, COMPLETIONS, SEEDS)
@settings(max_examples=50, deadline=None)
def test_the_advantage_is_that_of_a_naive_loop(kind: Kind, prompts: int, completions: int, seed: int) -> None:
    rewards = rewards_of(prompts, completions, seed)
    assume(min(map(plain_deviation, rewards.tolist())) > 0.1)  # below it the epsilon in the denominator shows
    found = group_advantages(rewards, kind)
    np.testing.assert_allclose(found, naive(rewards.tolist(), kind), rtol=2e-5, atol=1e-6)


def test_the_naive_loop_tells_the_kinds_apart() -> None:
    rewards = rewards_of(3, 4, 0)
    found = {kind: group_advantages(rewards, kind) for kind in KINDS}
    for kind in KINDS:
        plain = np.array(naive(rewards.tolist(), kind))
        assert [other for other in KINDS if np.abs(found[other] - plain).max() < 1e-3] == [kind]


@given(st.integers(2, 64), st.data())
@settings(max_examples=50, deadline=None)
def test_no_binary_reward_has_an_advantage_between_zero_and_one_over_the_root_of_its_group(
    completions: int, data: st.DataObject
) -> None:
    correct = data.draw(st.integers(0, completions))
    rewards = np.array([[1.0] * correct + [0.0] * (completions - correct)])
    sizes = np.abs(group_advantages(rewards))
    assert not sizes.any() if correct in (0, completions) else sizes.min() >= 0.999 / math.sqrt(completions)


# -- optimal values -------------------------------------------------------------------------------

REWARDS = st.lists(st.floats(-2.0, 2.0), min_size=1, max_size=12)


@given(REWARDS, st.floats(0.05, 100.0))
@settings(deadline=None)
def test_the_optimal_value_is_beta_times_the_log_of_a_mean_of_exponentials(rewards: list[float], beta: float) -> None:
    mean = sum(math.exp(r / beta) for r in rewards) / len(rewards)
    assert optimal_value(np.array(rewards), beta) == pytest.approx(beta * math.log(mean), rel=1e-9, abs=1e-9 * beta)


@given(REWARDS, st.floats(1e-3, 1e3))
@settings(deadline=None)
def test_the_optimal_value_lies_between_the_mean_and_the_maximum(rewards: list[float], beta: float) -> None:
    value = optimal_value(np.array(rewards), beta)
    rounding = 1e-12 * max(1.0, beta)
    assert sum(rewards) / len(rewards) - rounding <= value <= max(rewards) + rounding


def test_a_small_beta_gives_the_best_of_the_samples_without_overflow_and_a_large_one_the_mean() -> None:
    rewards = np.array([0.0, 1.0, 1.0, 0.0, 0.25, 1.0, 0.0, 0.0])
    with np.errstate(over="raise", invalid="raise"):
        assert optimal_value(rewards, 1e-3) == pytest.approx(1.0 + 1e-3 * math.log(3 / 8), abs=1e-12)
        assert optimal_value(1000.0 * rewards, 1e-3) == pytest.approx(1000.0, abs=1e-2)
    assert optimal_value(rewards, 1e6) == pytest.approx(float(rewards.mean()), abs=1e-6)
