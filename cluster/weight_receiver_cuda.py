"""The receiving ends of vLLM's own transports between GPUs, with our checks of what came.

Nothing of this has run yet (docs/gpu.md).
"""

from __future__ import annotations

from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

from cluster.weight_receiver import WholeUpdates


class CudaIpcEngine(WholeUpdates, IPCWeightTransferEngine):
    """Copies out of the learner's buffer on the same GPU."""

    def finish_weight_update(self) -> None:
        super().finish_weight_update()
        # The learner can then have its buffer's memory back; vLLM 0.26 keeps none of it open between two calls.
        if hasattr(self, "_packed_importer"):
            self._packed_importer.close()


class NcclEngine(WholeUpdates, NCCLWeightTransferEngine):
    """Takes the learner's broadcasts."""
