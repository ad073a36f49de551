"""DAPO's soft penalty for completions that come near the limit of their length (Yu et al. 2025, eq. 13)."""

from __future__ import annotations

from rewards.registry import Case, Judgement, reward


@reward("overlong")
def overlong(case: Case, judgement: Judgement) -> float:
    """0.0 up to the buffer before the limit, then falling by the same each token, to -1.0 at the limit.

    A truncated completion stands at the limit. ValueError for a case without its length.
    """
    if case.length is None:
        raise ValueError("the reward overlong wants the completion's length in tokens, and this case has none")
    left = case.length.limit - case.length.buffer - case.length.tokens
    return max(-1.0, min(0, left) / case.length.buffer)
