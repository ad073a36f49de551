"""Loss weights of an update batch, what is filtered from it, and how the rest is packed into micro-batches."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate, pairwise, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.advantages import flat_groups, group_advantages
from learner.batching import (
    ATTENTION_TOKENS,
    MICRO_BATCH_SHARE,
    MicroBatch,
    Rows,
    Sequence,
    build,
    kept,
    micro_batches,
    plan_rows,
    share_of_rank,
    token_weights,
)
from tests.tiny import tiny_completions

SEEDS = st.integers(0, 2**31)
LENGTHS = st.lists(st.integers(2, 30), min_size=1, max_size=25)
BUDGETS = st.integers(1, 150)


def of_lengths(lengths: list[int], truncated: tuple[int, ...] = ()) -> list[Sequence]:
    """Sequences with completions so long."""
    return [
        Sequence(np.ones(2, np.int32), np.ones(n, np.int32), np.zeros(n, np.float32), 1.0, None, i in truncated)
        for i, n in enumerate(lengths)
    ]


# -- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("denominator", "constant", "weights"),
    [
        ("sequence", 0, [1 / (3 * 2), 0.0, 1 / (3 * 5)]),
        ("token", 0, [1 / 7, 0.0, 1 / 7]),
        ("token", 50, [1 / 50, 0.0, 1 / 50]),
        ("constant", 8, [1 / (3 * 8), 0.0, 1 / (3 * 8)]),
    ],
)
def test_a_masked_completion_weighs_nothing_and_is_a_sequence_but_no_tokens(
    denominator: str, constant: float, weights: list[float]
) -> None:
    sequences = of_lengths([2, 4, 5], truncated=(1,))
    assert token_weights(sequences, denominator, constant, mask_truncated=True) == pytest.approx(weights)
    assert all(token_weights(sequences, denominator, constant, mask_truncated=False))


def test_an_update_batch_of_masked_completions_weighs_nothing() -> None:
    for denominator in ("sequence", "token", "constant"):
        assert token_weights(of_lengths([3, 4], truncated=(0, 1)), denominator, 8.0, True) == [0.0, 0.0]


# -- filtering ------------------------------------------------------------------------------------


@given(st.integers(1, 6), st.integers(2, 64), SEEDS, st.booleans())
@settings(max_examples=60, deadline=None)
def test_filtering_drops_just_the_flat_groups_with_binary_rewards_up_to_a_tenth(
    prompts: int, completions: int, seed: int, binary: bool
) -> None:
    random = np.random.default_rng(seed)
    shape = (prompts, completions)
    rewards = random.integers(0, 2, shape).astype(float) if binary else random.normal(size=shape)
    rewards[random.random(prompts) < 0.5] = 1.0
    advantages = group_advantages(rewards).ravel()
    sequences = [
        replace(s, advantage=float(a)) for s, a in zip(of_lengths([1] * len(advantages)), advantages, strict=True)
    ]
    weights = token_weights(sequences, "sequence", 0.0, False)
    spread = np.flatnonzero(~np.repeat(flat_groups(rewards), completions)).tolist()
    for threshold in (0.0, 0.01, 0.1) if binary else (0.0,):
        assert kept(sequences, weights, threshold) == spread
    assert kept(sequences, weights, None) == list(range(len(sequences)))
    assert kept(sequences, weights, 100.0) == []


def test_masked_completions_are_filtered_at_every_threshold() -> None:
    sequences = of_lengths([2, 4, 5], truncated=(1,))
    weights = token_weights(sequences, "token", 0.0, True)
    assert kept(sequences, weights, None) == kept(sequences, weights, 0.0) == [0, 2]


# -- rows -----------------------------------------------------------------------------------------


def cost(plan: list[Rows], lengths: list[int], budget: int) -> float:
    """In tokens: rows with padding and attention, and a share of the budget for every micro-batch."""
    longest = [max(sum(lengths[i] for i in row) for row in rows) for rows in plan]
    each = [len(rows) * long * (1 + long / ATTENTION_TOKENS) for rows, long in zip(plan, longest, strict=True)]
    return sum(each) + len(plan) * budget * MICRO_BATCH_SHARE


def every_cut(lengths: list[int], budget: int) -> list[list[Rows]]:
    """Every plan of a row for each sequence, longest first, that keeps to the budget."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True)
    plans = []
    for cuts in product((False, True), repeat=len(order) - 1):
        ends = [place for place, cut in enumerate(cuts, start=1) if cut] + [len(order)]
        plan = [[[i] for i in order[begin:end]] for begin, end in pairwise([0, *ends])]
        if all(len(rows) == 1 or len(rows) * lengths[rows[0][0]] <= budget for rows in plan):
            plans.append(plan)
    return plans


@given(st.lists(st.integers(2, 30), min_size=1, max_size=8), BUDGETS)
@settings(deadline=None)
def test_of_all_cuts_into_micro_batches_the_plan_is_the_one_that_costs_least(lengths: list[int], budget: int) -> None:
    least = min(cost(plan, lengths, budget) for plan in every_cut(lengths, budget))
    assert cost(plan_rows(lengths, budget, False), lengths, budget) == pytest.approx(least)
    assert cost(plan_rows(lengths, budget, True), lengths, budget) <= least * (1 + 1e-9)


@given(LENGTHS, BUDGETS)
@settings(deadline=None)
def test_the_plan_holds_every_sequence_once_within_the_budget(lengths: list[int], budget: int) -> None:
    packed, padded = plan_rows(lengths, budget, True), plan_rows(lengths, budget, False)
    assert all(len(row) == 1 for rows in padded for row in rows)
    for plan in (packed, padded):
        assert sorted(index for rows in plan for row in rows for index in row) == list(range(len(lengths)))
        for rows in plan:
            longest = max(sum(lengths[index] for index in row) for row in rows)
            assert longest <= max(lengths)
            assert len(rows) * longest <= budget or rows == [[rows[0][0]]]
            assert longest <= budget or rows == [[rows[0][0]]]


def test_packing_fills_the_room_that_padding_leaves_empty() -> None:
    lengths = [8, 5, 3, 4, 4, 2, 2, 4]
    assert plan_rows(lengths, 16, True) == [[[0], [1, 2]], [[3, 4], [7, 5, 6]]]
    assert plan_rows(lengths, 16, False) == [[[0]], [[1]], [[3], [4], [7]], [[2]], [[5], [6]]]


@pytest.mark.parametrize("spread", [0.1, 0.3, 0.7])
def test_of_a_ragged_update_batch_less_than_a_twentieth_is_padding(spread: float) -> None:
    random = np.random.default_rng(0)
    lengths = [min(512, 40 + int(n)) for n in random.lognormal(4.6, spread, 256)]
    plan = plan_rows(lengths, 4096, True)
    assert sum(lengths) > 0.95 * sum(len(rows) * max(sum(lengths[i] for i in row) for row in rows) for rows in plan)


@given(LENGTHS, BUDGETS, st.integers(1, 4))
@settings(max_examples=50, deadline=None)
def test_ranks_get_equally_many_micro_batches_and_share_all_of_them(
    lengths: list[int], budget: int, ranks: int
) -> None:
    plan = plan_rows(lengths, budget, True)
    shares = [share_of_rank(plan, rank, ranks) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(rows for share in shares for rows in share if rows) == sorted(plan)
    assert sum(rows == [] for share in shares for rows in share) < ranks


# -- tensors --------------------------------------------------------------------------------------


def with_random_logprobs(sequences: list[Sequence], seed: int, old: bool) -> list[Sequence]:
    random = np.random.default_rng(seed)

    def draw(s: Sequence) -> np.ndarray:
        return random.normal(size=len(s.completion_ids)).astype(np.float32)

    return [replace(s, sampler_logprobs=draw(s), old_logprobs=draw(s) if old else None) for s in sequences]


@given(st.integers(1, 10), SEEDS, st.booleans())
@settings(max_examples=60, deadline=None)
def test_every_token_of_a_micro_batch_is_where_a_naive_walk_finds_it(count: int, seed: int, old: bool) -> None:
    random = np.random.default_rng(seed)
    sequences = with_random_logprobs(tiny_completions(seed, count), seed, old)
    chosen = random.permutation(count)[: random.integers(1, count + 1)]
    cuts = np.flatnonzero(random.random(len(chosen) - 1) < 0.5) + 1
    rows = [part.tolist() for part in np.split(chosen, cuts)]
    weights = random.random(count).astype(np.float32).tolist()
    batch = build(sequences, rows, weights)
    width = max(sum(sequences[i].length for i in row) for row in rows)
    assert batch.input_ids.shape == batch.position_ids.shape == (len(rows), width)
    place = 0
    for number, row in enumerate(rows):
        ids = [int(token) for i in row for token in (*sequences[i].prompt_ids, *sequences[i].completion_ids)]
        assert batch.input_ids[number].tolist() == ids + [0] * (width - len(ids))
        positions = [position for i in row for position in range(sequences[i].length)]
        assert batch.position_ids[number, : len(ids)].tolist() == positions
        starts = accumulate([sequences[i].length for i in row], initial=0)
        for index, start in zip(row, starts, strict=False):
            s = sequences[index]
            for t, token in enumerate(s.completion_ids.tolist()):
                column = start + len(s.prompt_ids) + t - 1
                assert (int(batch.rows[place]), int(batch.columns[place])) == (number, column)
                assert (int(batch.targets[place]), int(batch.sequence[place])) == (token, index)
                assert float(batch.sampler_logprobs[place]) == s.sampler_logprobs[t]
                assert batch.old_logprobs is None or float(batch.old_logprobs[place]) == s.old_logprobs[t]  # type: ignore[index]
                assert float(batch.advantages[place]) == np.float32(s.advantage)
                assert float(batch.weights[place]) == weights[index]
                place += 1
    assert place == len(batch.targets)
    assert (batch.old_logprobs is not None) is old


@given(st.integers(1, 20), SEEDS, BUDGETS, st.integers(1, 4), st.booleans())
@settings(max_examples=60, deadline=None)
def test_every_kept_sequence_is_in_one_micro_batch_of_one_rank_within_the_budget(
    count: int, seed: int, budget: int, ranks: int, packing: bool
) -> None:
    sequences = tiny_completions(seed, count)
    weights = token_weights(sequences, "sequence", 0.0, False)
    indices = [i for i in range(count) if i % 3 != seed % 3] or [0]
    batches = [
        batch
        for rank in range(ranks)
        for batch in micro_batches(sequences, weights, indices, budget, packing, rank, ranks)
    ]
    held = [sorted(set(batch.sequence.tolist()) - {-1}) for batch in batches]
    assert sorted(index for inside in held for index in inside) == indices
    for batch, inside in zip(batches, held, strict=True):
        assert len(inside) <= 1 or batch.input_ids.numel() <= budget
    total = sum(float(batch.weights.double().sum()) for batch in batches)
    assert total == pytest.approx(len(indices) / count, rel=1e-6)


def test_a_rank_without_a_share_gets_a_dummy_that_weighs_nothing_and_is_no_sequence() -> None:
    def batches(rank: int) -> list[MicroBatch]:
        return micro_batches(of_lengths([9, 8, 7]), [1 / 3] * 3, [0, 1, 2], 1, True, rank, 2)

    assert [len(batches(rank)) for rank in (0, 1)] == [2, 2]
    dummy = batches(1)[-1]
    assert dummy.weights.tolist() == [0.0] and dummy.sequence.tolist() == [-1]
    assert dummy.advantages.tolist() == [0.0] and dummy.old_logprobs is None
    assert torch.equal(dummy.position_ids, torch.tensor([[0, 1]]))
