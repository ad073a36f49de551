"""Whether the rollout workers' engines can hold this model and share it, from its config.json alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psutil

from actors.engine import BLOCK_SIZE
from configs.errors import UsageError
from configs.schema import Config

MIB = 2**20
BYTES = {"float32": 4, "bfloat16": 2}
VOCABULARY_PADDING = 64  # vLLM rounds the vocabulary up to a multiple


def check_tensor_parallel(config: Config, model_path: Path) -> None:
    """The processes of a rollout worker must each get the same share of the model. UsageError with what fits."""
    model = json.loads((model_path / "config.json").read_text())
    asked = config.rollout.tensor_parallel
    if _unshared(model, asked):
        fits = next(count for count in range(asked, 0, -1) if not _unshared(model, count))
        raise UsageError(
            f"rollout.tensor_parallel={asked} does not divide the model's {' and '.join(_unshared(model, asked))}, so "
            f"its processes could not share them evenly. The next smaller value that fits is {fits}."
        )


def _unshared(model: dict[str, Any], count: int) -> list[str]:
    """What of the model so many processes cannot share as vLLM does: KV heads may be repeated, and the vocabulary
    is padded."""
    heads, kv_heads = _heads(model)
    vocabulary = -(-model["vocab_size"] // VOCABULARY_PADDING) * VOCABULARY_PADDING
    shared = {
        f"{heads} attention heads": heads % count,
        f"{kv_heads} KV heads": kv_heads % count and count % kv_heads,
        f"inner width of {model['intermediate_size']}": model["intermediate_size"] % count,
        f"vocabulary of {vocabulary} (with padding)": vocabulary % count,
    }
    return [what for what, rest in shared.items() if rest]


def _heads(model: dict[str, Any]) -> tuple[int, int]:
    """Attention heads and KV heads of a model's config."""
    heads = model["num_attention_heads"]
    return heads, model.get("num_key_value_heads") or heads


def check_kv_cache(config: Config, model_path: Path, on_gpus: bool) -> None:
    """The KV cache must hold one longest sequence, and on a CPU the free memory must hold the caches of all workers.

    Bytes per token, in each tensor parallel process: 2 (key and value) x layers x its KV heads, at least one, x head
    size x bytes per number.
    """
    check_tensor_parallel(config, model_path)
    model = json.loads((model_path / "config.json").read_text())
    heads, kv_heads = _heads(model)
    parallel = config.rollout.tensor_parallel
    kv_heads = max(1, kv_heads // parallel)
    head_size = model.get("head_dim") or model["hidden_size"] // heads
    per_token = 2 * model["num_hidden_layers"] * kv_heads * head_size * BYTES[config.model.dtype]
    blocks = -(-config.max_tokens // BLOCK_SIZE) + 1
    needed = blocks * BLOCK_SIZE * per_token
    given = config.rollout.kv_cache_mb * MIB
    if given < needed:
        raise UsageError(
            f"rollout.kv_cache_mb={config.rollout.kv_cache_mb} cannot hold one sequence of {config.max_tokens} tokens "
            f"(data.max_prompt_tokens + rollout.max_completion_tokens), which takes {needed / MIB:.1f} MiB. "
            f"Raise it to at least {-(-needed // MIB)}, better {-(-needed * 16 // MIB)}, or shorten the sequences."
        )
    free = psutil.virtual_memory().available
    total = given * parallel * config.cluster.rollout_workers
    if total > free and not on_gpus:
        raise UsageError(
            f"The KV caches take {total / MIB:.0f} MiB (rollout.kv_cache_mb={config.rollout.kv_cache_mb} x "
            f"{config.cluster.rollout_workers} rollout workers) and only {free / MIB:.0f} MiB of memory are free. "
            "Lower rollout.kv_cache_mb."
        )
