"""Planted faults that a run must notice. vLLM's worker processes import this file for its `UpdateSeconds`."""

from __future__ import annotations

from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from cluster.weight_receiver import SharedMemoryEngine, SharedMemoryUpdate, UpdateSeconds

__all__ = ["UpdateSeconds"]


class DeafEngine(SharedMemoryEngine):
    """Takes every update and loads none: the worker goes on with its first weights."""

    def start_weight_update(self) -> None:
        pass

    def receive_weights(self, update_info: SharedMemoryUpdate) -> None:
        pass

    def finish_weight_update(self) -> None:
        pass


WeightTransferEngineFactory.register_engine("deaf", DeafEngine)
