"""The small built-in model: a Llama of about one million parameters, taught the answer format by supervision."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from configs.schema import Data, Model, WarmStart
from data.arithmetic import GENERATOR_VERSION, count_distinct, generate, structured_answer
from data.hashing import stable_hash
from data.prompts import Template, make_template, render
from data.records import Problem
from data.tokenizer import build_tokenizer
from learner.model_cache import ModelError, cached_folder, quiet_transformers

RECIPE_VERSION = 3  # part of the cache key: count it up when the model or its training below changes
SEED = 0  # of the weights and of the supervised problems
LEARNING_RATE = 2e-3  # the peak
MLP_RATIO = 3
MAX_POSITIONS = 1024
HABIT_FROM = 0.75  # the last part, as a share of the steps, mixes in answers without working:
GUESSED_SMALL = 0.05  # this share where the first number begins with a digit under 4,
GUESSED_LARGE = 0.9  # and this share of the others
IGNORED = -100  # label of the tokens that carry no loss

OnStep = Callable[[int, float], None]


class Example(NamedTuple):
    """One supervised sequence: token ids and labels, both [length]."""

    token_ids: torch.Tensor
    labels: torch.Tensor


def warm_start(
    model: Model,
    data: Data,
    reasoning_tag: str = "think",
    answer_tag: str = "answer",
    avoid_ids: Collection[str] = (),
    on_step: OnStep | None = None,
    on_note: Callable[[str], None] | None = None,
) -> Path:
    """The folder of the warm-started model and its tokenizer, from the cache if it stands there whole.

    Every supervised answer is right. Most of the steps show answers with their working; in the last
    part many give the number at once, most of all where the first number is large. The model takes
    that up as a habit though it cannot add in its head, so there it is wrong, and reinforcement has
    to find out that working pays.
    The problems come from our generator with `data`'s operands, digits and operators; none has an
    id in `avoid_ids` (training and held-out problems). `on_step(step, loss)` hears of each
    supervised step, from 1; `on_note(text)` of a cache that had to be built again.
    Raises ModelError if no problems are left or the cache cannot be written.
    """
    template = make_template(data, reasoning_tag)
    further = [] if (template.few_shot, template.chat) == ((), "model") else [template.few_shot, template.chat]
    key = {
        "recipe": RECIPE_VERSION,
        "habit": [HABIT_FROM, GUESSED_SMALL, GUESSED_LARGE],
        "generator": GENERATOR_VERSION,
        "warm_start": model.warm_start.model_dump(),
        "dtype": model.dtype,
        "problems": [data.operands, data.digits, data.operators],
        "prompts": [data.system_prompt, data.user_prompt, *further],
        "tags": [reasoning_tag, answer_tag],
        "avoid": hashlib.sha256("\n".join(sorted(avoid_ids)).encode()).hexdigest(),
    }

    def build(folder: Path) -> None:
        tokenizer = build_tokenizer(reasoning_tag, answer_tag)
        batches = _batches(tokenizer, model.warm_start, data, (reasoning_tag, answer_tag), avoid_ids)
        with torch.random.fork_rng(devices=[]), _one_thread():
            torch.manual_seed(SEED)
            llama = build_llama(model.warm_start, tokenizer)
            train(llama, batches, model.warm_start, on_step)
        with quiet_transformers():
            llama.to(getattr(torch, model.dtype)).save_pretrained(folder)
            tokenizer.save_pretrained(folder)

    return cached_folder(model.cache_dir, "tiny-arithmetic", key, build, on_note)


@contextmanager
def _one_thread() -> Iterator[None]:
    """At this size a second thread gains little, and on a busy machine threads that wait for each other lose much."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def build_llama(options: WarmStart, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained Llama in float32."""
    return LlamaForCausalLM(llama_config(options, tokenizer))


def llama_config(options: WarmStart, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Its shape; `use_cache` stays on, or generation crawls."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=options.hidden_size,
        intermediate_size=MLP_RATIO * options.hidden_size,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=options.tied_embeddings,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        use_cache=True,
    )


def train(
    llama: LlamaForCausalLM,
    batches: Iterator[list[Example]],
    options: WarmStart,
    on_step: OnStep | None = None,
) -> None:
    """One AdamW step on each batch; the learning rate warms up, then falls linearly to 0."""
    optimizer = torch.optim.AdamW(llama.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0)
    warmup = max(1, options.steps // 20)
    llama.train()
    for step, examples in enumerate(batches, start=1):
        rate = min(step / warmup, (options.steps + 1 - step) / (options.steps + 1 - warmup))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * rate
        # padding stands right of every real token, so the causal mask hides it: no attention mask
        token_ids = pad_sequence([example.token_ids for example in examples], batch_first=True)
        labels = pad_sequence([example.labels for example in examples], batch_first=True, padding_value=IGNORED)
        loss = llama(input_ids=token_ids, labels=labels, use_cache=False).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(llama.parameters(), 1.0)
        optimizer.step()
        if on_step is not None:
            on_step(step, loss.item())
    llama.eval()


def _batches(
    tokenizer: PreTrainedTokenizerFast,
    options: WarmStart,
    data: Data,
    tags: tuple[str, str],
    avoid_ids: Collection[str],
) -> Iterator[list[Example]]:
    """`steps` batches of worked examples, in the last part mixed with guessed ones; epoch after epoch."""
    problems = _problems(options, data, avoid_ids)
    template = make_template(data, tags[0])
    chance = Random(SEED)
    order: list[Problem] = []
    for step in range(options.steps):
        habit = step >= HABIT_FROM * options.steps
        while len(order) < options.batch_size:
            order += chance.sample(problems, len(problems))
        chosen, order = order[: options.batch_size], order[options.batch_size :]
        yield [
            _example(tokenizer, problem, template, tags, not habit or chance.random() >= _guessed_share(problem))
            for problem in chosen
        ]


def _guessed_share(problem: Problem) -> float:
    """The share of a problem's supervised answers that come without working, once the habit is taught."""
    return GUESSED_SMALL if problem.question[0] < "4" else GUESSED_LARGE


def _problems(options: WarmStart, data: Data, avoid_ids: Collection[str]) -> list[Problem]:
    """As many problems as the steps can use, or as there are beside those to avoid."""
    left = count_distinct(data.operands, data.digits, data.operators) - len(set(avoid_ids))
    if left < 1:
        raise ModelError(
            f"No arithmetic problem is left for the warm start: training and held-out problems take all those with "
            f"data.operands={data.operands}, data.digits={data.digits} and data.operators={data.operators!r}. "
            "Lower data.train_problems, or raise data.digits or data.operands."
        )
    count = min(options.steps * options.batch_size, left)
    seed = stable_hash("warm start", SEED)
    return generate(count, seed, data.operands, data.digits, data.operators, avoid_ids)


def _example(
    tokenizer: PreTrainedTokenizerFast, problem: Problem, template: Template, tags: tuple[str, str], worked: bool
) -> Example:
    """A problem with its right answer; the loss is on the answer and EOS."""
    prompt = render(tokenizer, problem.question, template)
    answer = tokenizer.encode(structured_answer(problem, *tags, worked=worked), add_special_tokens=False)
    answer.append(tokenizer.eos_token_id)
    return Example(torch.tensor([*prompt, *answer]), torch.tensor([IGNORED] * len(prompt) + answer))
