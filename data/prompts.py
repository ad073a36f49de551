"""Prompts: a question put into the user's template and the model's chat template, as token ids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from jinja2 import TemplateSyntaxError

from data.errors import DatasetError
from data.escaping import excerpt
from data.records import Problem, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUESTION = "{question}"
PROBE = "What is 2 + 2?"


@dataclass(frozen=True)
class Template:
    """What a question is put into.

    user_prompt: `{question}` stands for the question. few_shot: (question, answer) pairs that go before
    it. chat: "model", the tokenizer's own chat template; "none", plain text; or a chat template (Jinja).
    reasoning_tag: looked for at the prompt's end, see `prefill`.
    """

    system_prompt: str | None = None
    user_prompt: str = QUESTION
    few_shot: tuple[tuple[str, str], ...] = ()
    chat: str = "model"
    reasoning_tag: str = "think"


class FewShot(Protocol):
    """A worked example among the options."""

    @property
    def question(self) -> str: ...
    @property
    def answer(self) -> str: ...


class TemplateOptions(Protocol):
    """The options that make a template, as the config's section `data` has them."""

    @property
    def system_prompt(self) -> str | None: ...
    @property
    def user_prompt(self) -> str: ...
    @property
    def few_shot(self) -> Sequence[FewShot]: ...
    @property
    def chat_template(self) -> str: ...


def make_template(options: TemplateOptions, reasoning_tag: str) -> Template:
    """The template of these options; a chat template of its own is read from its file.

    Raises DatasetError if that cannot be read.
    """
    chat = options.chat_template
    if chat not in ("model", "none"):
        path = Path(chat).expanduser()
        try:
            chat = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DatasetError(
                f"The chat template {path} cannot be read ({error}). Set data.chat_template to model, to none, or to a "
                "Jinja file; a relative path counts from the folder the command is started in."
            ) from error
    examples = tuple((example.question, example.answer) for example in options.few_shot)
    return Template(options.system_prompt, options.user_prompt, examples, chat, reasoning_tag)


def check_template(tokenizer: PreTrainedTokenizerBase, template: Template) -> None:
    """A chat template must take the messages that the options make, and put the question into the text.

    Raises DatasetError with what it does instead.
    """
    text = render_text(tokenizer, PROBE, template)
    if PROBE not in text:
        raise DatasetError(
            f"The chat template drops the question: asked {excerpt(PROBE)}, its prompt is {excerpt(text)}. Correct "
            "its loop over messages, or set data.chat_template to another."
        )


def render(tokenizer: PreTrainedTokenizerBase, question: str, template: Template) -> tuple[int, ...]:
    """Token ids [length] of the conversation up to where the assistant begins to answer.

    A chat template alone decides on BOS: the text it gives is tokenised without special tokens
    added, so BOS never stands twice. Plain text gets the BOS that the tokenizer itself puts first.
    Raises DatasetError where the chat template refuses the messages.
    """
    return _token_ids(tokenizer, render_text(tokenizer, question, template), template)


def render_text(tokenizer: PreTrainedTokenizerBase, question: str, template: Template) -> str:
    """What `render` tokenises."""
    if template.chat == "none":
        return _plain(question, template)
    messages = _messages(question, template)
    own = None if template.chat == "model" else template.chat
    if own is None and tokenizer.chat_template is None:
        raise DatasetError(
            "The model's tokenizer has no chat template, which prompts are rendered by. Choose an instruction-tuned "
            "model, set data.chat_template to none for a base model, or to a Jinja file."
        )
    try:
        return str(
            tokenizer.apply_chat_template(messages, chat_template=own, tokenize=False, add_generation_prompt=True)
        )
    except TemplateSyntaxError as error:
        raise DatasetError(
            f"The chat template is not readable as Jinja: line {error.lineno}, {excerpt(str(error.message), 300)}. "
            f"Correct it ({'that of the tokenizer' if own is None else 'the file of data.chat_template'})."
        ) from error
    except Exception as error:  # a template is a program, which may fail with anything
        roles = " and a ".join(dict.fromkeys(message["role"] for message in messages))
        raise DatasetError(
            f"The chat template cannot render a {roles} message: {excerpt(str(error), 300)}. Set data.system_prompt to "
            "null if the model takes no system message, or data.chat_template to none for a base model or to a Jinja "
            "file that renders these messages."
        ) from error


def render_all(
    tokenizer: PreTrainedTokenizerBase, problems: Iterable[Problem], template: Template, max_prompt_tokens: int
) -> tuple[list[Prompt], int]:
    """The prompts of at most `max_prompt_tokens` tokens, in order, and how many were dropped.

    A prompt's visit is its place among those kept; the sampler puts the run's own there.
    Raises DatasetError where the chat template is of no use, see `check_template`.
    """
    check_template(tokenizer, template)
    kept: list[Prompt] = []
    dropped = 0
    for problem in problems:
        text = render_text(tokenizer, problem.question, template)
        token_ids = _token_ids(tokenizer, text, template)
        if len(token_ids) > max_prompt_tokens:
            dropped += 1
        else:
            kept.append(Prompt(len(kept), problem, token_ids, prefill=prefill(text, template.reasoning_tag)))
    return kept, dropped


def prefill(text: str, reasoning_tag: str) -> str:
    """The opening reasoning tag, if a prompt ends with it and white space at most; else empty."""
    tag = f"<{reasoning_tag}>"
    return tag if text.rstrip().endswith(tag) else ""


def _messages(question: str, template: Template) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": template.system_prompt}] if template.system_prompt else []
    for asked, answer in template.few_shot:
        messages.append({"role": "user", "content": template.user_prompt.replace(QUESTION, asked)})
        messages.append({"role": "assistant", "content": answer})
    messages.append({"role": "user", "content": template.user_prompt.replace(QUESTION, question)})
    return messages


def _plain(question: str, template: Template) -> str:
    """The system prompt, each example with its answer, and the question, with a blank line between.

    An answer follows on a line of its own, unless white space stands there already.
    """
    parts = [template.system_prompt] if template.system_prompt else []
    for asked, answer in template.few_shot:
        shown = template.user_prompt.replace(QUESTION, asked)
        apart = shown[-1:].isspace() or answer[:1].isspace()
        parts.append(f"{shown}{'' if apart else chr(10)}{answer}")
    parts.append(template.user_prompt.replace(QUESTION, question))
    return "\n\n".join(parts)


def _token_ids(tokenizer: PreTrainedTokenizerBase, text: str, template: Template) -> tuple[int, ...]:
    token_ids: Sequence[int] = tokenizer.encode(text, add_special_tokens=False)
    if template.chat == "none" and tokenizer.bos_token_id in tokenizer.encode("")[:1]:
        token_ids = [tokenizer.bos_token_id, *token_ids]
    return tuple(token_ids)
