"""The rollout worker's end of the weight sync, in each of vLLM's worker processes.

vLLM imports this file there because it is told of `UpdateSeconds`; that registers the transports.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from actors.shared_memory import unname_mapped
from cluster.stopwatch import Stopwatch
from cluster.weight_loading import NamedTensors, StraightLoad, VllmReload, WeightLoading
from cluster.weight_transport import CUDA_IPC, NCCL, SHARED_MEMORY


class WholeUpdates(WeightTransferEngine[Any, Any]):
    """What all transports share: whole models, bucket by bucket; an update that lacks a parameter is an error.

    A transport's `receive_weights` gives tensors to `self.model.load_weights`. threads: to load with, None for as many
    as sample.
    """

    threads: int | None = None

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.watch = Stopwatch()
        self._own_names = {name for name, _ in self.model.named_parameters()}
        self._loading: WeightLoading = VllmReload(self.model, self.model_config)
        self._expected: set[str] = set()
        self._received: set[str] = set()
        self._loaded: set[str] = set()
        self._own_head = any(isinstance(layer, ParallelLMHead) for layer in self.model.modules())
        for layer in self.model.modules():
            method = getattr(layer, "quant_method", None)
            if method is not None and hasattr(method, "process_weights_after_loading"):
                method.process_weights_after_loading = self._repacking(layer, method.process_weights_after_loading)

    def parse_init_info(self, init_dict: dict[str, Any]) -> Any:
        """Beside what the transport needs comes `names`: every parameter that an update must bring."""
        own = dict(init_dict)
        self._expected = set(own.pop("names"))
        return super().parse_init_info(own)

    def start_weight_update(self) -> None:
        self.watch = Stopwatch()
        self._received.clear()
        self._loaded.clear()
        with self.watch.part("load"):
            self.model.load_weights = self._load
            self._loading.start()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        with self.watch.part("load"), _threads(self.threads):
            super().update_weights(update_info)

    def finish_weight_update(self) -> None:
        with self.watch.part("load"), _threads(self.threads):
            del self.model.load_weights
            self._loading.finish()
            self._refresh_tied_head()
        missing = sorted(self._expected - self._received) + sorted(self._own_names - self._loaded)
        if missing:
            raise RuntimeError(
                f"the weight update lacked {len(missing)} parameters: {', '.join(missing[:5])}; "
                "vLLM would go on with their old values. Every parameter must be sent."
            )

    def _load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        weights = list(weights)
        self._received.update(name for name, _ in weights)
        loaded = self._loading.load(weights)
        self._loaded |= loaded
        return loaded

    def _refresh_tied_head(self) -> None:
        """With tied embeddings vLLM's CPU head keeps its packed copy of the old embedding: pack again."""
        head = getattr(self.model, "lm_head", None)
        if head is not None and getattr(self.model.config, "tie_word_embeddings", False):
            head.quant_method.process_weights_after_loading(head)

    def _repacking(
        self, layer: torch.nn.Module, repack: Callable[[torch.nn.Module], None]
    ) -> Callable[[torch.nn.Module], None]:
        """`repack`, timed; nothing for an input embedding beside a head, which vLLM packs too but only looks up. vLLM
        0.26 has no head beside the tied embedding of a Qwen2 or Qwen3."""
        if self._own_head and isinstance(layer, VocabParallelEmbedding) and not isinstance(layer, ParallelLMHead):
            return lambda layer: None

        def timed(layer: torch.nn.Module) -> None:
            with self.watch.part("repack"):
                repack(layer)

        return timed


class UpdateSeconds:
    """What vLLM adds to its workers for us."""

    weight_transfer_engine: WholeUpdates

    def update_seconds(self) -> dict[str, float]:
        """Seconds of the last update in this process: load and repack."""
        return {"load": 0.0, "repack": 0.0} | self.weight_transfer_engine.watch.seconds

    def unname_shared_memory(self) -> None:
        """Remove the names of the memory through which processes on a CPU share activations and messages, once all have
        mapped it.

        vLLM removes them when a process ends in peace, so one that is killed would leave them.
        """
        for path in Path("/dev/shm").glob(f"{os.environ.get('VLLM_DIST_IDENT', 'none')}-*-cpushm_*"):
            path.unlink(missing_ok=True)
        unname_mapped()


@dataclass
class SharedMemoryInit(WeightTransferInitInfo):
    """path and size (bytes) of the bucket; threads to load it with."""

    path: str
    size: int
    threads: int


@dataclass
class SharedMemoryUpdate(WeightTransferUpdateInfo):
    """entries: (name, dtype, shape, offset in bytes) of each tensor in the bucket."""

    entries: list[tuple[str, str, tuple[int, ...], int]] = field(default_factory=list)


class SharedMemoryEngine(WholeUpdates):
    """Loads from the bucket that `SharedMemorySender` fills."""

    init_info_cls = SharedMemoryInit
    update_info_cls = SharedMemoryUpdate
    _memory: torch.Tensor | None = None

    def init_transfer_engine(self, init_info: SharedMemoryInit) -> None:
        descriptor = os.open(init_info.path, os.O_RDWR)
        try:
            self._memory = torch.frombuffer(mmap.mmap(descriptor, init_info.size), dtype=torch.uint8)
        finally:
            os.close(descriptor)
        self.threads = init_info.threads
        if StraightLoad.fits(self.model, self.model_config, self.parallel_config.world_size):
            self._loading = StraightLoad(self.model, self.model_config.dtype)

    def receive_weights(self, update_info: SharedMemoryUpdate) -> None:
        if self._memory is None:
            raise RuntimeError("weights came before init_weight_transfer_engine")
        weights: NamedTensors = []
        for name, dtype, shape, offset in update_info.entries:
            kind = getattr(torch, dtype)
            size = torch.Size(shape).numel() * kind.itemsize
            weights.append((name, self._memory[offset : offset + size].view(kind).view(shape)))
        self.model.load_weights(weights)
        self._loading.keep(weights)

    @staticmethod
    def trainer_send_weights(iterator: Any, trainer_args: Any) -> None:
        """vLLM 0.26 wants every engine to have it, and only the trainer calls it; ours is `SharedMemorySender`."""
        raise NotImplementedError

    def shutdown(self) -> None:
        self._memory = None


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Compute with so many, if given. vLLM makes `torch.set_num_threads` do nothing in its workers."""
    before = torch.get_num_threads()
    torch._C.set_num_threads(count or before)
    try:
        yield
    finally:
        torch._C.set_num_threads(before)


def _register(name: str, module: str, engine: str) -> None:
    if name not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(name, module, engine)


_register(SHARED_MEMORY, __name__, "SharedMemoryEngine")
_register(CUDA_IPC, "cluster.weight_receiver_cuda", "CudaIpcEngine")
_register(NCCL, "cluster.weight_receiver_cuda", "NcclEngine")
