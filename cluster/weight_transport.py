"""The weight transports, by the names under which vLLM knows their receiving ends, and which one is used."""

from __future__ import annotations

from typing import Literal

SHARED_MEMORY = "pocketgrpo_shared_memory"
CUDA_IPC = "pocketgrpo_cuda_ipc"
NCCL = "pocketgrpo_nccl"

# vLLM imports this class in each of its worker processes; its module registers the transports there.
WORKER_EXTENSION = "cluster.weight_receiver.UpdateSeconds"


def transport_of(device: Literal["cpu", "cuda"], placement: Literal["colocated", "disaggregated"]) -> str:
    """How weights get to rollout workers that compute on `device`.

    CUDA IPC needs learner and worker on the same GPU, and NCCL needs them on different ones.
    """
    if device == "cpu":
        return SHARED_MEMORY
    return CUDA_IPC if placement == "colocated" else NCCL
