"""LoRA: adapters beside the frozen linear layers of a model, and the weights that both make together.

The only file that knows peft, which it imports lazily.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from learner.checkpoint_writer import write_tensors

FOLDER = "adapter"  # in a checkpoint
CONFIG_FILE, TENSORS_FILE = "adapter_config.json", "adapter_model.safetensors"  # as peft names them
NAME = "default"  # of the one adapter that a layer has


class Adapters:
    """The adapters of a model, each by the name of the weight it is added to; none without LoRA.

    layers: peft's layer of each such weight; description: what peft must know to load them again.
    """

    def __init__(self, layers: dict[str, Any] | None = None, description: dict[str, Any] | None = None) -> None:
        self._layers = layers or {}
        self._description = description or {}

    def __len__(self) -> int:
        return len(self._layers)

    def parts(self, name: str) -> list[nn.Parameter]:
        """A [rank, in] and B [out, rank], for `merged`; none for a weight without an adapter."""
        layer = self._layers.get(name)
        return [] if layer is None else [layer.lora_A[NAME].weight, layer.lora_B[NAME].weight]

    def merged(self, name: str, weight: Tensor, parts: Sequence[Tensor]) -> Tensor:
        """W + scale x B A, of W's type, computed in float32: a new tensor. W itself if it has no adapter.

        weight, parts: W and, as `parts` gives them, A and B, all of them whole.
        """
        layer = self._layers.get(name)
        if layer is None:
            return weight
        a, b = (part.detach().float() for part in parts)
        product = (b @ a).T if layer.fan_in_fan_out else b @ a
        return (weight.float() + layer.scaling[NAME] * product).to(weight.dtype)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within, a forward of the model is one of the base."""
        for layer in self._layers.values():
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self._layers.values():
                layer.enable_adapters(True)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Every A and B under its name in peft's files."""
        return {
            f"base_model.model.{name.removesuffix('.weight')}.lora_{letter}.weight": part
            for name in self._layers
            for letter, part in zip("AB", self.parts(name), strict=True)
        }

    def write(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        """Write tensors, named as `named_parameters` names them, for PeftModel to load on the base."""
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(tensors, folder / TENSORS_FILE)
        (folder / CONFIG_FILE).write_text(json.dumps(self._description, indent=2, sort_keys=True))

    def load(self, folder: Path) -> None:
        """Take over, bit for bit, what `write` wrote. ValueError if it is not for just these layers."""
        saved, own = load_file(folder / TENSORS_FILE), self.named_parameters()
        if {name: tensor.shape for name, tensor in saved.items()} != {name: part.shape for name, part in own.items()}:
            raise ValueError(
                f"the adapters in {folder} are not those of this model with this model.lora_rank; resume the run "
                "with the model and the options it began with"
            )
        with torch.no_grad():
            for name, part in own.items():
                part.copy_(saved[name])


def add_adapters(model: Any, rank: int, alpha: float, seed: int, base: Path) -> Adapters:
    """Freeze a Hugging Face model and put adapters beside its linear layers, all but the output head.

    They change nothing yet: A is drawn from the seed, B is 0. Without dropout, as the ratio of two
    forwards must be exact. base: the model's folder, to which peft's files will point.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(base),
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        bias="none",
        target_modules="all-linear",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, NAME)
    layers = {f"{path}.weight": layer for path, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    return Adapters(layers, {**config.to_dict(), "target_modules": sorted(config.target_modules)})


def base_weights(model: Any) -> dict[str, nn.Parameter]:
    """The parameters of a model with adapters but for theirs, under the names they have without."""
    return {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in model.named_parameters()
        if ".lora_" not in name
    }
