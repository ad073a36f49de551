"""Models with random weights at real shapes: a GPU machine without network has no others."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from benchmarks.gpu_stages.part import Setting
from cluster.model_shape import KNOWN, Shape
from data.tokenizer import build_tokenizer
from learner.checkpoint_writer import write_model

SHAPES = {
    "0.1B": KNOWN["smollm2-135m"],
    "0.5B": KNOWN["qwen2.5-0.5b"],
    "1.5B": KNOWN["qwen2.5-1.5b"],
    "3B": KNOWN["qwen2.5-3b"],
    "tiny": Shape(128, 64, 192, 2, 2, 1, 32, tied=True, query_bias=True),
}
SPREAD = 0.02  # standard deviation of embeddings and biases
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LOGIT_SPREAD = 0.5  # of the logits, about as transformers' first weights give them: 0.02 x sqrt(width)


def base_shape(setting: Setting) -> str:
    """The shape of the stages that take one only."""
    return setting.size("0.5B", "tiny")


def random_model(setting: Setting, shape: str, dtype: str = "bfloat16", seed: int = 0) -> Path:
    """A folder with random weights of a shape in `SHAPES` and the project's own small tokenizer."""

    def write(folder: Path) -> None:
        config = model_config(SHAPES[shape], dtype)
        weights = random_weights(config, dtype, setting.device, seed)
        ends = GenerationConfig(bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id)
        write_model(folder, weights, [config, ends], build_tokenizer())

    return kept(setting.models / f"{shape}-{dtype}-{seed}", write)


def kept(folder: Path, write: Callable[[Path], None]) -> Path:
    """The folder, filled by `write` if it is not there yet."""
    if not folder.exists():
        draft = folder.with_name(f"{folder.name}.draft")
        shutil.rmtree(draft, ignore_errors=True)
        write(draft)
        draft.rename(folder)
    return folder


def model_config(shape: Shape, dtype: str) -> Qwen2Config | LlamaConfig:
    """As transformers has it: Qwen2 where queries have biases, else Llama."""
    tokenizer = build_tokenizer()
    kind = Qwen2Config if shape.query_bias else LlamaConfig
    return kind(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.mlp_width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=8192,
        tie_word_embeddings=shape.tied,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        architectures=["Qwen2ForCausalLM" if shape.query_bias else "LlamaForCausalLM"],
        dtype=dtype,
    )


def random_weights(config: Qwen2Config | LlamaConfig, dtype: str, device: str, seed: int) -> dict[str, torch.Tensor]:
    """Every weight under its name, in the CPU's memory; drawn on the device, where that is faster.

    Layers give as much as they get, so that little of a token's own embedding is left at the end, which would make a
    tied head repeat it. The last norm spreads the logits. EOS has the logit 0, which is next to never sampled:
    completions are as long as they may be.
    """
    with torch.device("meta"):
        model = (Qwen2ForCausalLM if isinstance(config, Qwen2Config) else LlamaForCausalLM)(config)
    random = torch.Generator(device).manual_seed(seed)
    weights = {}
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            last = LOGIT_SPREAD / (SPREAD * math.sqrt(config.hidden_size)) if name == "model.norm.weight" else 1.0
            weight = torch.full(parameter.shape, last)
        else:
            inner = parameter.ndim == 2 and name not in (EMBEDDING, HEAD)
            spread = parameter.shape[-1] ** -0.5 if inner else SPREAD
            weight = torch.empty(parameter.shape, dtype=torch.float32, device=device)
            weight.normal_(0.0, spread, generator=random)
        weights[name] = weight.to("cpu", getattr(torch, dtype))
    weights[EMBEDDING if config.tie_word_embeddings else HEAD][config.eos_token_id] = 0.0
    return weights
