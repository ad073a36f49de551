"""Whether the rollout workers' engines can hold this model's sequences and share it, from its config alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from actors.engine import BLOCK_SIZE
from configs.errors import UsageError
from configs.schema import Config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

MIB = 2**20
BYTES = {"float32": 4, "bfloat16": 2}
VOCABULARY_PADDING = 64  # vLLM rounds the vocabulary up to a multiple
# vLLM takes the positions of a model as they stand in its config for these, and times `factor` for the others.
SCALED_ALREADY = ("su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling")


def check_engine(config: Config, model: PreTrainedConfig) -> None:
    """What no machine can make fit: processes that share unevenly, sequences beyond the model's positions, and a
    KV cache smaller than one sequence. UsageError."""
    check_tensor_parallel(config, model)
    check_positions(config, model)
    needed, given = one_sequence_bytes(config, model), config.rollout.kv_cache_mb * MIB
    if given < needed:
        raise UsageError(
            f"rollout.kv_cache_mb={config.rollout.kv_cache_mb} cannot hold one sequence of {config.max_tokens} tokens "
            f"(data.max_prompt_tokens + rollout.max_completion_tokens), which takes {needed / MIB:.1f} MiB. "
            f"Raise it to at least {-(-needed // MIB)}, better {-(-needed * 16 // MIB)}, or shorten the sequences."
        )


def check_tensor_parallel(config: Config, model: PreTrainedConfig) -> None:
    """The processes of a rollout worker must each get the same share of the model. UsageError with what fits."""
    asked = config.rollout.tensor_parallel
    if _unshared(model, asked):
        fits = next(count for count in range(asked, 0, -1) if not _unshared(model, count))
        raise UsageError(
            f"rollout.tensor_parallel={asked} does not divide the model's {' and '.join(_unshared(model, asked))}, so "
            f"its processes could not share them evenly. The next smaller value that fits is {fits}."
        )


def check_positions(config: Config, model: PreTrainedConfig) -> None:
    """The model must have been made for sequences as long as the config allows them. UsageError with what it takes."""
    limit = _positions(model)
    if limit is None or config.max_tokens <= limit:
        return
    raise UsageError(
        f"data.max_prompt_tokens={config.data.max_prompt_tokens} plus rollout.max_completion_tokens="
        f"{config.rollout.max_completion_tokens} are sequences of {config.max_tokens} tokens, and the model takes at "
        f"most {limit} (max_position_embeddings in its config.json). Lower the two to {limit} in all."
    )


def one_sequence_bytes(config: Config, model: PreTrainedConfig) -> int:
    """Bytes of KV cache, in each tensor parallel process, for one longest sequence.

    A token takes 2 (key and value) x layers x the process's KV heads, at least one, x head size x bytes per number.
    """
    heads, kv_heads = _heads(model)
    kv_heads = max(1, kv_heads // config.rollout.tensor_parallel)
    head_size = getattr(model, "head_dim", None) or model.hidden_size // heads
    per_token = 2 * model.num_hidden_layers * kv_heads * head_size * BYTES[config.model.dtype]
    blocks = -(-config.max_tokens // BLOCK_SIZE) + 1
    return blocks * BLOCK_SIZE * per_token


def _unshared(model: PreTrainedConfig, count: int) -> list[str]:
    """What of the model so many processes cannot share as vLLM does: KV heads may be repeated, and the vocabulary
    is padded."""
    heads, kv_heads = _heads(model)
    vocabulary = -(-model.vocab_size // VOCABULARY_PADDING) * VOCABULARY_PADDING
    inner = getattr(model, "intermediate_size", None)
    shared = {
        f"{heads} attention heads": heads % count,
        f"{kv_heads} KV heads": kv_heads % count and count % kv_heads,
        f"inner width of {inner}": inner % count if isinstance(inner, int) else 0,
        f"vocabulary of {vocabulary} (with padding)": vocabulary % count,
    }
    return [what for what, rest in shared.items() if rest]


def _heads(model: PreTrainedConfig) -> tuple[int, int]:
    """Attention heads and KV heads; transformers gives each family's names for them these."""
    heads = model.num_attention_heads
    return heads, getattr(model, "num_key_value_heads", None) or heads


def _positions(model: PreTrainedConfig) -> int | None:
    """Tokens of the longest sequence that vLLM lets this model have; None where its config names no limit."""
    limit = getattr(model, "max_position_embeddings", None)
    rope = getattr(model, "rope_parameters", None) or {}
    if limit is None or rope.get("rope_type") in SCALED_ALREADY:
        return limit
    return int(limit * (rope.get("factor") or 1))


def check_kv_cache(config: Config, model_path: Path, on_gpus: bool) -> None:
    """The engine must fit, and on a CPU the free memory must hold the KV caches of all workers. UsageError."""
    from transformers import AutoConfig

    check_engine(config, AutoConfig.from_pretrained(model_path, trust_remote_code=False).get_text_config())
    given = config.rollout.kv_cache_mb * MIB
    free = psutil.virtual_memory().available
    total = given * config.rollout.tensor_parallel * config.cluster.rollout_workers
    if total > free and not on_gpus:
        raise UsageError(
            f"The KV caches take {total / MIB:.0f} MiB (rollout.kv_cache_mb={config.rollout.kv_cache_mb} x "
            f"{config.cluster.rollout_workers} rollout workers) and only {free / MIB:.0f} MiB of memory are free. "
            "Lower rollout.kv_cache_mb."
        )
