"""Planted faults that a run must notice."""

from __future__ import annotations

from cluster.weight_receiver import SharedMemoryEngine, SharedMemoryUpdate
from cluster.weight_transport import TRANSPORT


class DeafEngine(SharedMemoryEngine):
    """Takes every update and loads none: the worker goes on with its first weights."""

    def start_weight_update(self) -> None:
        pass

    def receive_weights(self, update_info: SharedMemoryUpdate) -> None:
        pass

    def finish_weight_update(self) -> None:
        pass


def register_deaf_transport() -> None:
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    WeightTransferEngineFactory.register_engine(TRANSPORT, DeafEngine)
