"""How received weights get into vLLM's layers: by vLLM's own reload, which knows every model, or straight."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.platforms import current_platform

NamedTensors = list[tuple[str, torch.Tensor]]


class WeightLoading(ABC):
    """An update is a `start`, a `load` for each bucket and a `finish`."""

    @abstractmethod
    def start(self) -> None: ...

    @abstractmethod
    def load(self, weights: NamedTensors) -> set[str]:
        """Load these; the model's own names of the parameters that they belong to."""

    @abstractmethod
    def keep(self, weights: NamedTensors) -> None:
        """Copy those of `weights` that are still wanted: their memory is about to hold others."""

    @abstractmethod
    def finish(self) -> None: ...


class VllmReload(WeightLoading):
    """vLLM's own, a layer at a time: new tensors, the model's loaders, packing, and back into the old tensors."""

    def __init__(self, model: Any, model_config: Any) -> None:
        self._model = model
        self._model_config = model_config
        self._load_weights = model.load_weights
        self._layers = [layer for layer in model.modules() if layer._parameters]

    def start(self) -> None:
        initialize_layerwise_reload(self._model)

    def load(self, weights: NamedTensors) -> set[str]:
        loaded: set[str] = self._load_weights(weights)
        return loaded

    def keep(self, weights: NamedTensors) -> None:
        addresses = {tensor.data_ptr() for _, tensor in weights}
        for layer in self._layers:
            for _, arguments in get_layerwise_info(layer).loaded_weights:
                for name, value in arguments.arguments.items():
                    if isinstance(value, torch.Tensor) and value.data_ptr() in addresses:
                        arguments.arguments[name] = value.clone()

    def finish(self) -> None:
        finalize_layerwise_reload(self._model, self._model_config)


class StraightLoad(WeightLoading):
    """Packs each layer's weight out of the memory it came in; the rest is copied over the old.

    On a CPU vLLM keeps a linear layer's weight packed only. Its reload copies the weight to new memory, packs it from
    there, and spends longer than that on bookkeeping in Python; a sync takes a third less time without. This
    knows the models whose parameters vLLM holds as they are sent, or joined one below the other.
    """

    MODELS = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")

    @classmethod
    def fits(cls, model: Any, model_config: Any, processes: int) -> bool:
        """processes: those that share the model. vLLM's extension for Zen CPUs may keep what it was given to pack."""
        plain = model_config.quantization is None and processes == 1
        return plain and type(model).__name__ in cls.MODELS and not current_platform.is_zen_cpu()

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        """dtype: of the weights that vLLM keeps packed only; what it leaves in their place may have another."""
        self._model, self._dtype = model, dtype
        self._parts: dict[str, torch.Tensor] = {}  # by name, of layers that are not complete
        self._layer_of: dict[str, str] = {}
        self._sent: dict[str, dict[str, list[str]]] = {}  # by layer: for each of its parameters, what it is joined of
        for name, _ in model.named_parameters():
            layer, _, parameter = name.rpartition(".")
            above, _, own = layer.rpartition(".")
            joined = model.packed_modules_mapping.get(own)
            parts = [f"{above}.{part}.{parameter}" for part in joined] if joined else [name]
            self._sent.setdefault(layer, {})[parameter] = parts
            self._layer_of |= dict.fromkeys(parts, layer)

    def start(self) -> None:
        self._parts.clear()

    def load(self, weights: NamedTensors) -> set[str]:
        self._parts |= weights
        for layer in dict.fromkeys(self._layer_of[name] for name, _ in weights):
            if all(part in self._parts for parts in self._sent[layer].values() for part in parts):
                self._put(layer)
        return {f"{self._layer_of[name]}.{name.rpartition('.')[2]}" for name, _ in weights}

    def keep(self, weights: NamedTensors) -> None:
        for name, _ in weights:
            if name in self._parts:
                self._parts[name] = self._parts[name].clone()

    def finish(self) -> None:
        pass

    def _put(self, name: str) -> None:
        """Give the layer its parameters, and have it pack."""
        layer = self._model.get_submodule(name)
        for parameter, parts in self._sent[name].items():
            weight = _joined([self._parts.pop(part) for part in parts])
            old = getattr(layer, parameter)
            if old.numel():
                old.data[: len(weight)].copy_(weight)  # a vocabulary may be padded below
            else:
                setattr(layer, parameter, torch.nn.Parameter(weight.to(self._dtype), requires_grad=False))
        method = getattr(layer, "quant_method", None)
        if method is not None:
            method.process_weights_after_loading(layer)


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """The tensors one below the other; without a copy if they already lie so in memory."""
    first, end = parts[0], parts[0].data_ptr()
    for part in parts:
        if part.data_ptr() != end or part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return torch.cat(parts)
        end += part.nbytes
    return first.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())
