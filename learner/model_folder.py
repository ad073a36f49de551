"""A Hugging Face model folder, opened and checked by its headers before anything loads it: no weight is read."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.escaping import escaped
from learner.model_cache import ModelError, quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
JSON_FILES = (
    *("config.json", "generation_config.json", INDEX, "tokenizer.json", "vocab.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json"),
)
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class ModelFolder:
    """What a folder holds besides its weights. config: of the text model, where the model has other parts."""

    path: Path
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of one tensor; dtype as it stands there, such as F32."""

    shape: tuple[int, ...]
    dtype: str


def open_model_folder(folder: Path) -> ModelFolder:
    """The config and the tokenizer of a folder whose parts are there, whole, and fit each other.

    Raises ModelError, one paragraph, naming the file and what is wrong with it. Numbers that are no
    numbers are found where the weights are read, see `load_policy`.
    """
    names = _names(folder)
    for name in sorted(names.intersection(JSON_FILES)):
        _read_json(folder / name)
    tensors = {key: header for file in _weight_files(folder, names) for key, header in read_headers(file).items()}
    config = _read_config(folder)
    _check_special_tokens(folder, names, config.get_text_config().vocab_size)
    _check_weights(folder, config, tensors)
    tokenizer = _read_tokenizer(folder, names)
    _check_vocabulary(folder, config, tokenizer)
    _check_end(folder, config, tokenizer)
    return ModelFolder(folder, config.get_text_config(), tokenizer)


def read_headers(file: Path) -> dict[str, Header]:
    """The tensors of a safetensors file by name. ModelError unless its header is sound and its length is as it says."""
    from safetensors import SafetensorError, safe_open

    try:
        file.open("rb").close()  # safetensors says of a file that may not be read that it is not there
        with safe_open(file, framework="np") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  no mapping
            return {name: Header(tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except OSError as error:
        raise ModelError(f"The weights {file} cannot be read ({_said(error)}). Give this user the right to.") from error
    except SafetensorError as error:
        raise ModelError(
            f"The weights {file} ({_size(file)}) are damaged or cut off: {_said(error)}. Fetch or save that file anew."
        ) from error


def _names(folder: Path) -> set[str]:
    """The files of the folder; ModelError if it cannot be read or lacks one without which no run can start."""
    try:
        names = set(os.listdir(folder))
    except OSError as error:
        raise ModelError(
            f"The model folder {folder} cannot be read ({_said(error)}). Give this user the right to read it, or set "
            "model.name to another."
        ) from error
    if "adapter_config.json" in names:
        raise ModelError(
            f"The model folder {folder} holds adapters (adapter_config.json), with which transformers would load the "
            "model that they name. Merge them into it, and give the merged model's folder."
        )
    if "config.json" not in names:
        raise ModelError(
            f"The model folder {folder} has no config.json, so it is no Hugging Face model folder. Give the folder "
            "that `save_pretrained` wrote (a checkpoint's folder is one)."
        )
    if not any(name.endswith(".safetensors") for name in names):
        raise ModelError(
            f"The model folder {folder} has no .safetensors file, and weights load from nothing else. Save them "
            "anew with `model.save_pretrained(folder)`."
        )
    if not names.intersection(TOKENIZER_FILES):
        raise ModelError(
            f"The model folder {folder} has no tokenizer ({', '.join(TOKENIZER_FILES)}: none is there). Write the "
            "model's tokenizer beside it with `tokenizer.save_pretrained(folder)`."
        )
    return names


def _read_json(file: Path) -> dict[str, Any]:
    """A file of the folder that must hold one JSON object."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, no JSON
        raise ModelError(
            f"The file {file} ({_size(file)}) cannot be read as JSON ({_said(error)}). Fetch or save it anew."
        ) from error
    if not isinstance(value, dict):
        raise ModelError(f"The file {file} holds no JSON object. Fetch or save it anew.")
    return value


def _weight_files(folder: Path, names: set[str]) -> list[Path]:
    """The files that transformers and vLLM read: the one, or those that the index names, all there."""
    if WEIGHTS in names:
        return [folder / WEIGHTS]
    if INDEX not in names:
        found = ", ".join(sorted(name for name in names if name.endswith(".safetensors")))
        raise ModelError(
            f"The model folder {folder} has weights in {found}, and neither {WEIGHTS} nor {INDEX}, which says what is "
            "where. Fetch the missing file, or save the model anew with `model.save_pretrained(folder)`."
        )
    places = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise ModelError(f"{folder / INDEX} has no weight_map from tensors to files. Fetch or save it anew.")
    for shard in sorted(set(places.values())):
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ModelError(
                f"The index {INDEX} of {folder} names {shard!r}, and weights load from .safetensors files in the same "
                "folder alone. Save the model anew with `model.save_pretrained(folder)`."
            )
    if absent := sorted(set(places.values()) - names):
        raise ModelError(
            f"The model folder {folder} lacks {absent[0]}, one of {len(set(places.values()))} files of weights that "
            f"{INDEX} names. Fetch it, or save the model anew."
        )
    return [folder / name for name in sorted(set(places.values()))]


def _read_config(folder: Path) -> PreTrainedConfig:
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    file = folder / "config.json"
    given = _read_json(file)
    family, classes = given.get("model_type"), given.get("architectures")
    fix = "Choose a decoder-only text model, such as a Llama or a Qwen"
    if not isinstance(family, str) or family not in CONFIG_MAPPING_NAMES:
        raise ModelError(
            f"{file} describes a model of type {_shown(family)}, which transformers does not know; code of the "
            f"model's own is never run. {fix}."
        )
    wanted = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(family)
    wanted = wanted if isinstance(wanted, str) or wanted is None else wanted[0]
    if wanted is None or classes != [wanted]:
        means = f"of which a language model would be {wanted}" if wanted else "which has no causal language model"
        raise ModelError(
            f"{file} names the architectures {_shown(classes)} of type {family}, {means}: it is no causal language "
            f"model that could be sampled. {fix}."
        )
    if "quantization_config" in given:
        raise ModelError(
            f"{file} has a quantization_config, and quantised weights cannot be trained. Choose the model's version "
            "in bfloat16 or float32."
        )
    try:
        with quiet_transformers():
            return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # each family checks its options in its own way
        raise _unfit(file, error) from error


def _check_special_tokens(folder: Path, names: set[str], rows: int) -> None:
    """A token that pads or ends must have a row in the embedding; -1 has long stood for none."""
    for file in (folder / name for name in ("config.json", "generation_config.json") if name in names):
        values = _read_json(file)
        for key in ("pad_token_id", "eos_token_id"):
            ids = values.get(key)
            for token in ids if isinstance(ids, list) else [ids]:
                if isinstance(token, int) and token >= rows:
                    raise ModelError(
                        f"{file} has the {key} {_shown(token)}, and the model's vocabulary has {rows} rows, so the "
                        f"last id is {rows - 1}. Correct it, or take it out where the model has no such token."
                    )


def _check_weights(folder: Path, config: PreTrainedConfig, tensors: dict[str, Header]) -> None:
    """The model that the config describes must take every tensor from the files, in the shape it has there.

    Asked of transformers itself, with tensors that have shapes and no memory, as it knows each
    family's older names, tied weights and buffers.
    """
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if layers > len(tensors):
        raise ModelError(
            f"{folder / 'config.json'} describes {layers} layers, and the weights are only {len(tensors)} tensors. "
            "Fetch config.json and the weights of the same model."
        )
    if strange := [name for name, header in tensors.items() if header.dtype not in FLOATS and _is_weight(name)]:
        raise ModelError(
            f"The tensor {strange[0]} in {folder} is of type {tensors[strange[0]].dtype}, and weights are trained in "
            f"{', '.join(FLOATS.values())}. Choose a version of the model that is not quantised."
        )
    info = _matched(folder, config, tensors)
    if wrong := sorted(info["mismatched_keys"]):
        name, here, described = wrong[0]
        raise ModelError(
            f"The tensor {name} in {folder} has the shape {list(here)}, and config.json describes {list(described)}"
            f"{_further(wrong)}. Fetch config.json and the weights of the same model."
        )
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"The weights in {folder} lack the tensor {missing[0]}{_further(missing)}, which the model of config.json "
            "has. Fetch or save the weights anew, all of them."
        )
    if extra := sorted(name for name in info["unexpected_keys"] if _is_weight(name)):
        raise ModelError(
            f"The weights in {folder} hold the tensor {extra[0]}{_further(extra)}, for which the model of config.json "
            "has no place. Fetch config.json and the weights of the same model."
        )


def _matched(folder: Path, config: PreTrainedConfig, tensors: dict[str, Header]) -> dict[str, Any]:
    """transformers' own account of the tensors: mismatched_keys (name, shape here, shape wanted), missing_keys and
    unexpected_keys."""
    import torch
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    empty = {
        name: torch.empty(header.shape, dtype=getattr(torch, FLOATS.get(header.dtype, "int64")), device="meta")
        for name, header in tensors.items()
    }
    try:
        with quiet_transformers():
            return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
                None,
                trust_remote_code=False,
                config=config,
                state_dict=empty,
                device_map="meta",
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )[1]
    except Exception as error:  # each family's own code reads its config here, and fails in its own way
        raise _unfit(folder / "config.json", error) from error


def _read_tokenizer(folder: Path, names: set[str]) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare Exceptions
        files = ", ".join(sorted(name for name in names if "token" in name or name in TOKENIZER_FILES))
        raise ModelError(
            f"The tokenizer in {folder} ({files}) cannot be loaded: {_said(error)}. Fetch it anew, or write it again "
            "with `tokenizer.save_pretrained(folder)`."
        ) from error


def _check_vocabulary(folder: Path, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Every token must have a row in the embedding; rows without a token, as padding, are usual."""
    vocabulary, rows = tokenizer.get_vocab(), config.get_text_config().vocab_size
    if not vocabulary:
        raise ModelError(f"The tokenizer in {folder} knows no token. Fetch the model's tokenizer anew.")
    last = max(vocabulary, key=lambda token: vocabulary[token])
    if vocabulary[last] >= rows:
        raise ModelError(
            f"The tokenizer in {folder} is another model's, or was added to: its token {_shown(last)} has the id "
            f"{vocabulary[last]}, and the model's vocabulary has {rows} rows. Put the model's own tokenizer there, or "
            "resize the embedding and save the model."
        )


def _check_end(folder: Path, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Something must end a completion, where vLLM looks for it."""
    if tokenizer.eos_token_id is not None:
        return
    file = folder / "generation_config.json"
    generation = _read_json(file) if file.exists() else {"eos_token_id": config.get_text_config().eos_token_id}
    if generation.get("eos_token_id") is None:
        raise ModelError(
            f"The tokenizer in {folder} has no EOS token and generation_config.json names none, so no completion would "
            "ever end. Set eos_token in tokenizer_config.json."
        )


def _is_weight(name: str) -> bool:
    """Old checkpoints hold whole numbers too, in buffers such as position_ids."""
    return name.endswith((".weight", ".bias"))


def _unfit(file: Path, error: Exception) -> ModelError:
    return ModelError(
        f"{file} describes no model that transformers can build: {_said(error)}. Fetch config.json anew, or correct "
        "that value."
    )


def _further(found: list[Any]) -> str:
    return f" (and {len(found) - 1} more)" if len(found) > 1 else ""


def _size(file: Path) -> str:
    return f"{os.path.getsize(file):,} bytes" if os.path.isfile(file) else "no file"


def _shown(value: object) -> str:
    text = json.dumps(value)  # ASCII: nothing that a terminal would take as a command
    return text if len(text) <= 80 else f"{text[:77]}..."


def _said(error: BaseException) -> str:
    """What a library says, on one line, cut to what a message bears."""
    text = " ".join(str(error).split()) or type(error).__name__
    return escaped(text if len(text) <= 200 else f"{text[:199]}…").rstrip(".")
