"""Tiny random models in a folder, completions for them, and their log-probs by plain transformers. No network."""

from __future__ import annotations

from collections.abc import Sequence as ListOf
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from configs.schema import WarmStart
from data.tokenizer import build_tokenizer
from learner.batching import Sequence
from learner.model_cache import quiet_transformers
from learner.warm_start import build_llama

MAX_PROMPT, MAX_COMPLETION = 9, 12
VOCABULARY = len(build_tokenizer())


def tiny_llama(folder: Path, tied: bool = False, seed: int = 0, hidden_size: int = 64, layers: int = 2) -> Path:
    """Writes a random Llama (float32) and the small tokenizer into `folder`, which it returns.

    The weights are spread wider than transformers' initial ones, norms included: log-probs then differ
    clearly between tokens, and no norm hides a fault by being all ones.
    """
    tokenizer = build_tokenizer()
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(seed)
        llama = build_llama(WarmStart(hidden_size=hidden_size, layers=layers, tied_embeddings=tied), tokenizer)
        with torch.no_grad():
            for parameter in llama.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        llama.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def tiny_sliding(folder: Path, window: int) -> Path:
    """Writes a random Mistral whose tokens see `window` tokens, themselves included, and whose key heads are shared."""
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(0)
        mistral = MistralForCausalLM(
            MistralConfig(
                vocab_size=VOCABULARY,
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                sliding_window=window,
            )
        )
        with torch.no_grad():
            for parameter in mistral.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        mistral.save_pretrained(folder)
    return folder


def tiny_completions(seed: int, count: int = 8, vocabulary: int = VOCABULARY) -> list[Sequence]:
    """Random completions of different lengths, with advantages; the sampler's log-probs are zeros."""
    random = np.random.default_rng(seed)
    sequences = []
    for _ in range(count):
        prompt, completion = random.integers(1, MAX_PROMPT + 1), random.integers(1, MAX_COMPLETION + 1)
        sequences.append(
            Sequence(
                prompt_ids=random.integers(0, vocabulary, prompt).astype(np.int32),
                completion_ids=random.integers(0, vocabulary, completion).astype(np.int32),
                sampler_logprobs=np.zeros(completion, dtype=np.float32),
                advantage=float(random.normal()),
            )
        )
    return sequences


def plain_logprobs(model: torch.nn.Module, sequence: Sequence, temperature: float) -> Tensor:
    """Log-prob of each completion token, one sequence at a time: logits / temperature, log_softmax, pick."""
    ids = torch.tensor([[*sequence.prompt_ids.tolist(), *sequence.completion_ids.tolist()]])
    logits = model(input_ids=ids).logits[0] / temperature
    by_token = [
        logits[place - 1].log_softmax(dim=-1)[ids[0, place]]
        for place in range(len(sequence.prompt_ids), sequence.length)
    ]
    return torch.stack(by_token)


def open_plain(folder: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The folder's model by plain transformers."""
    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def as_sampled(sequences: ListOf[Sequence], folder: Path, temperature: float) -> list[Sequence]:
    """The sequences with the log-probs that the folder's model gives them, as if it had sampled them."""
    model = open_plain(folder)
    with torch.no_grad():
        return [replace(s, sampler_logprobs=plain_logprobs(model, s, temperature).numpy()) for s in sequences]


def with_old(sequences: ListOf[Sequence], seed: int, spread: float) -> list[Sequence]:
    """The sequences with a pi_old `spread` away from the sampler's log-probs; with 0.3 some pass any clip."""
    random = np.random.default_rng(seed)
    return [
        replace(
            s,
            old_logprobs=(s.sampler_logprobs + spread * random.normal(size=len(s.completion_ids))).astype(np.float32),
        )
        for s in sequences
    ]
