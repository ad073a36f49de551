"""The small built-in model: a Llama of about one million parameters, taught the answer format by supervision."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from configs.schema import Data, Model, WarmStart
from data.arithmetic import GENERATOR_VERSION, count_distinct, generate, structured_answer
from data.hashing import stable_hash
from data.prompts import render
from data.tokenizer import build_tokenizer
from learner.model_cache import ModelError, cached_folder, quiet_transformers

RECIPE_VERSION = 1  # part of the cache key: count it up when the model or its training below changes
MLP_RATIO = 3
MAX_POSITIONS = 1024
GUESSED_SHARE = 0.6  # of the supervised answers come without working
IGNORED = -100  # label of the tokens that carry no loss

OnStep = Callable[[int, float], None]


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

    The problems come from our generator with `data`'s operands, digits and operators; none has an
    id in `avoid_ids` (training and held-out problems). `on_step(step, loss)` hears of each
    supervised step, from 1; `on_note(text)` of a cache that had to be built again.
    Raises ModelError if no problems are left or the cache cannot be written.
    """
    key = {
        "recipe": RECIPE_VERSION,
        "guessed_share": GUESSED_SHARE,
        "generator": GENERATOR_VERSION,
        "warm_start": model.warm_start.model_dump(),
        "dtype": model.dtype,
        "problems": [data.operands, data.digits, data.operators],
        "prompts": [data.system_prompt, data.user_prompt],
        "tags": [reasoning_tag, answer_tag],
        "avoid": hashlib.sha256("\n".join(sorted(avoid_ids)).encode()).hexdigest(),
    }

    def build(folder: Path) -> None:
        tokenizer = build_tokenizer(reasoning_tag, answer_tag)
        examples = _examples(tokenizer, model.warm_start, data, (reasoning_tag, answer_tag), avoid_ids)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(model.warm_start.seed)
            llama = build_llama(model.warm_start, tokenizer)
            train(llama, examples, model.warm_start, on_step)
        with quiet_transformers():
            llama.to(getattr(torch, model.dtype)).save_pretrained(folder)
            tokenizer.save_pretrained(folder)

    return cached_folder(model.cache_dir, "tiny-arithmetic", key, build, on_note)


def build_llama(options: WarmStart, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained Llama in float32; its config keeps `use_cache` on, or generation crawls."""
    config = LlamaConfig(
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
    return LlamaForCausalLM(config)


def train(
    llama: LlamaForCausalLM,
    examples: list[tuple[torch.Tensor, torch.Tensor]],
    options: WarmStart,
    on_step: OnStep | None = None,
) -> None:
    """Trains on (token ids, labels) pairs [length] with AdamW; the rate warms up, then falls linearly to 0."""
    optimizer = torch.optim.AdamW(llama.parameters(), lr=options.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    warmup = max(1, options.steps // 20)
    llama.train()
    for step, (token_ids, labels) in enumerate(_batches(examples, options), start=1):
        rate = min(step / warmup, (options.steps + 1 - step) / (options.steps + 1 - warmup))
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * rate
        loss = llama(input_ids=token_ids, labels=labels, use_cache=False).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(llama.parameters(), 1.0)
        optimizer.step()
        if on_step is not None:
            on_step(step, loss.item())
    llama.eval()


def _examples(
    tokenizer: PreTrainedTokenizerFast,
    options: WarmStart,
    data: Data,
    tags: tuple[str, str],
    avoid_ids: Collection[str],
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(token ids, labels) [length] of each supervised problem; the loss is on the answer and EOS."""
    left = count_distinct(data.operands, data.digits, data.operators) - len(set(avoid_ids))
    if left < 1:
        raise ModelError(
            f"No arithmetic problem is left for the warm start: training and held-out problems take all those with "
            f"data.operands={data.operands}, data.digits={data.digits} and data.operators={data.operators!r}. "
            "Lower data.train_problems, or raise data.digits or data.operands."
        )
    wanted = min(options.steps * options.batch_size, left)
    examples = []
    for problem in generate(
        wanted, stable_hash("warm start", options.seed), data.operands, data.digits, data.operators, avoid_ids
    ):
        prompt = render(tokenizer, problem.question, data.system_prompt, data.user_prompt)
        guessed = stable_hash("guessed", problem.id) < GUESSED_SHARE * 2**64
        answer = tokenizer.encode(structured_answer(problem, *tags, worked=not guessed), add_special_tokens=False)
        answer.append(tokenizer.eos_token_id)
        examples.append((torch.tensor([*prompt, *answer]), torch.tensor([IGNORED] * len(prompt) + answer)))
    return examples


def _batches(
    examples: list[tuple[torch.Tensor, torch.Tensor]], options: WarmStart
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """`steps` batches of (token ids, labels) [batch_size, longest], padded right, epoch after epoch."""
    order: list[int] = []
    for _ in range(options.steps):
        while len(order) < options.batch_size:
            order += torch.randperm(len(examples)).tolist()
        chosen, order = order[: options.batch_size], order[options.batch_size :]
        pairs = [examples[place] for place in chosen]
        pad = torch.nn.utils.rnn.pad_sequence
        # padding stands right of every real token, so the causal mask hides it: no attention mask
        token_ids = pad([ids for ids, _ in pairs], batch_first=True, padding_value=0)
        labels = pad([labels for _, labels in pairs], batch_first=True, padding_value=IGNORED)
        yield token_ids, labels
