"""Prompts: a question put into the user's template and the model's chat template, as token ids."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from data.errors import DatasetError
from data.records import Problem, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def render(
    tokenizer: PreTrainedTokenizerBase, question: str, system_prompt: str | None, user_prompt: str
) -> tuple[int, ...]:
    """Token ids [length] of the conversation up to where the assistant begins to answer.

    The chat template alone decides on BOS: the text it gives is tokenised without special tokens
    added, so BOS never stands twice. Raises DatasetError where the template refuses the messages.
    """
    messages = [{"role": "system", "content": system_prompt}] if system_prompt else []
    messages.append({"role": "user", "content": user_prompt.replace("{question}", question)})
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except (TemplateError, ValueError) as error:  # ValueError: the tokenizer has no template
        raise DatasetError(
            f"The model's chat template cannot render a {' and a '.join(m['role'] for m in messages)} message: "
            f"{error}. Set data.system_prompt to null if the model takes no system message, or choose an "
            "instruction-tuned model whose tokenizer has a chat template."
        ) from error
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def render_all(
    tokenizer: PreTrainedTokenizerBase,
    problems: Iterable[Problem],
    system_prompt: str | None,
    user_prompt: str,
    max_prompt_tokens: int,
) -> tuple[list[Prompt], int]:
    """The prompts of at most `max_prompt_tokens` tokens, in order, and how many were dropped.

    A prompt's visit is its place among those kept; the sampler puts the run's own there.
    """
    kept: list[Prompt] = []
    dropped = 0
    for problem in problems:
        token_ids = render(tokenizer, problem.question, system_prompt, user_prompt)
        if len(token_ids) > max_prompt_tokens:
            dropped += 1
        else:
            kept.append(Prompt(visit=len(kept), problem=problem, token_ids=token_ids))
    return kept, dropped
