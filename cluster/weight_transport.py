"""The name under which our shared-memory weight transport is known to vLLM, and its registration."""

from __future__ import annotations

TRANSPORT = "pocketgrpo_shared_memory"


def register_transport() -> None:
    """Make the backend known to vLLM in this process; harmless when done twice."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if TRANSPORT not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(TRANSPORT, "cluster.weight_receiver", "SharedMemoryEngine")
