"""Claims about what benchmarks/learner_speed.py times; the seconds themselves are measured by command, not in tests."""

from __future__ import annotations

import pytest

from benchmarks.learner_speed import GROUP, SIZES, row, with_half_flat
from learner.batching import MicroBatch, Sequence, kept, micro_batches, token_weights


def cut(completions: list[Sequence], budget: int, threshold: float | None) -> list[MicroBatch]:
    """The micro-batches of an update."""
    weights = token_weights(completions, "sequence", 0.0, mask_truncated=False)
    indices = kept(completions, weights, threshold)
    return micro_batches(completions, weights, indices, budget, packing=True, rank=0, ranks=1)


def tokens(batches: list[MicroBatch]) -> int:
    return sum(batch.input_ids.numel() for batch in batches)


@pytest.mark.parametrize("name", SIZES)
def test_the_learner_computes_few_more_tokens_than_there_are(name: str) -> None:
    size = SIZES[name]
    completions = size.completions()
    assert max(c.length for c in completions) <= size.longest
    assert tokens(cut(completions, size.budget, None)) <= 1.06 * sum(c.length for c in completions)


def test_with_half_of_the_groups_flat_the_learner_computes_half_of_the_tokens() -> None:
    size = SIZES["small"]
    completions = with_half_flat(size.completions())
    flat = [all(c.advantage == 0 for c in completions[i : i + GROUP]) for i in range(0, len(completions), GROUP)]
    assert sum(flat) == len(flat) // 2
    whole, filtered = (cut(completions, size.budget, threshold) for threshold in (None, 0.0))
    assert 0.4 <= tokens(filtered) / tokens(whole) <= 0.55


def test_a_row_shows_medians_and_the_range_of_the_ratio() -> None:
    figures = {"median": 0.9512, "min": 0.9, "max": 1.1}
    assert row("small", {"median": 9421.3}, figures) == "| small | 9.42e+03 | 0.95 (0.90 to 1.10) |"
