"""The rollout worker's end of the weight sync: a weight-transfer backend for vLLM over shared memory."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload


@dataclass
class SharedMemoryInit(WeightTransferInitInfo):
    """path and size (bytes) of the bucket; names: every parameter a whole update must bring."""

    path: str
    size: int
    names: list[str]


@dataclass
class SharedMemoryUpdate(WeightTransferUpdateInfo):
    """entries: (name, dtype, shape, offset in bytes) of each tensor in the bucket."""

    entries: list[tuple[str, str, tuple[int, ...], int]] = field(default_factory=list)


class SharedMemoryEngine(WeightTransferEngine[SharedMemoryInit, SharedMemoryUpdate]):
    """Loads whole models bucket by bucket; an update that lacks a parameter is an error."""

    init_info_cls = SharedMemoryInit
    update_info_cls = SharedMemoryUpdate

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._own_names = {name for name, _ in self.model.named_parameters()}
        self._memory: mmap.mmap | None = None
        self._expected: set[str] = set()
        self._received: set[str] = set()
        self._loaded: set[str] = set()

    def init_transfer_engine(self, init_info: SharedMemoryInit) -> None:
        descriptor = os.open(init_info.path, os.O_RDWR)
        try:
            self._memory = mmap.mmap(descriptor, init_info.size)
        finally:
            os.close(descriptor)
        self._expected = set(init_info.names)

    def start_weight_update(self) -> None:
        self._received.clear()
        self._loaded.clear()
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: SharedMemoryUpdate) -> None:
        """Copy the tensors out of the bucket and load them. vLLM keeps references to what it is given
        until the layer is complete, perhaps into the next bucket: hence the copy."""
        if self._memory is None:
            raise RuntimeError("weights came before init_weight_transfer_engine")
        weights = []
        for name, dtype, shape, offset in update_info.entries:
            view = torch.frombuffer(
                self._memory, dtype=getattr(torch, dtype), count=torch.Size(shape).numel(), offset=offset
            )
            weights.append((name, view.view(shape).clone()))
            self._received.add(name)
        self._loaded |= self.model.load_weights(weights)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        self._refresh_tied_head()
        missing = sorted(self._expected - self._received) + sorted(self._own_names - self._loaded)
        if missing:
            raise RuntimeError(
                f"the weight update lacked {len(missing)} parameters: {', '.join(missing[:5])}; "
                "vLLM would go on with their old values. Every parameter must be sent."
            )

    def _refresh_tied_head(self) -> None:
        """With tied embeddings vLLM's CPU head keeps its packed copy of the old embedding: pack again."""
        head = getattr(self.model, "lm_head", None)
        if head is not None and getattr(self.model.config, "tie_word_embeddings", False):
            head.quant_method.process_weights_after_loading(head)

    def shutdown(self) -> None:
        self._memory = None
