"""Demonstrations: completions to imitate, in the place of sampled ones, for supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from data.arithmetic import structured_answer
from data.errors import DatasetError
from data.records import Problem, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def work_out(problems: Sequence[Problem], reasoning_tag: str, answer_tag: str) -> list[Problem]:
    """Generated arithmetic problems with their demonstration: the working, then the answer, in the tags."""
    return [
        replace(problem, demonstration=structured_answer(problem, reasoning_tag, answer_tag)) for problem in problems
    ]


def with_demonstrations(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], max_completion_tokens: int
) -> tuple[list[Prompt], int]:
    """The prompts with their demonstration of at most so many tokens, in order, and how many were dropped.

    A demonstration ends with the tokenizer's EOS, where vLLM stops, and like a completion counts it.
    Raises DatasetError where the tokenizer has none, or none of the demonstrations is short enough.
    """
    if tokenizer.eos_token_id is None:
        raise DatasetError(
            "The model's tokenizer has no EOS token, so a demonstration could not teach where to stop. Set its "
            "eos_token, or choose an instruction-tuned model."
        )
    kept = []
    for prompt in prompts:
        assert prompt.problem.demonstration is not None  # loaded with the column, or worked out above
        text_ids = tokenizer.encode(prompt.problem.demonstration, add_special_tokens=False)
        if len(text_ids) < max_completion_tokens:
            kept.append(replace(prompt, demonstration_ids=(*text_ids, tokenizer.eos_token_id)))
    if not kept:
        raise DatasetError(
            f"All {len(prompts)} demonstrations are longer than rollout.max_completion_tokens="
            f"{max_completion_tokens}. Raise it (and learner.tokens_per_micro_batch with it)."
        )
    return kept, len(prompts) - len(kept)
