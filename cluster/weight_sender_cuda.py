"""Weights between GPUs, by vLLM's own senders: CUDA IPC on the same GPU, NCCL from one to another.

Nothing of this has run yet (docs/gpu.md).
"""

from __future__ import annotations

import socket
from abc import abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from cluster.weight_sender import Arguments, Call, WeightSender
from cluster.weight_sender_vllm import Meeting, VllmSender, ipc_sender, nccl_sender

if TYPE_CHECKING:
    from vllm.distributed.weight_transfer.base import WeightSource


class _CudaSender(WeightSender):
    """Drives the sender of vLLM's that `_vllm_sender` makes; it makes the calls of an update itself."""

    def _open(self) -> None:
        self._sender = self._vllm_sender(self._source())

    def _send(self) -> None:
        torch.cuda.synchronize()  # vLLM packs on streams of its own, which wait for no optimizer step
        with self._watch.part("copy"):  # what is neither gathering nor the workers' is in here, waiting included
            self._sender.send_weights()

    @abstractmethod
    def _vllm_sender(self, source: WeightSource) -> VllmSender: ...

    def _source(self) -> WeightSource:
        """Our buckets as vLLM walks through them: tensor by tensor, each a fresh pass, on every rank."""
        from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

        sender = self

        class Source(WeightSource):
            def metadata(self) -> list[ParamMeta]:
                shapes = sender._weights.shapes
                return [ParamMeta(name, dtype, shape) for name, (shape, dtype) in shapes.items()]

            def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
                for bucket in sender._gathered():
                    yield from bucket

        return Source()


class CudaIpcSender(_CudaSender):
    """Through a buffer on the GPU that learner rank and rollout worker share; every rank brings its GPU's."""

    def _vllm_sender(self, source: WeightSource) -> VllmSender:
        return ipc_sender(self._weights.rank, max(self._bucket_bytes, self._largest), self._updates, source)


class NcclSender(_CudaSender):
    """Broadcasts from learner rank 0 to every process of every rollout worker.

    workers: how many rollout workers; tensor_parallel: processes of each.
    """

    def __init__(self, call: Call, bucket_bytes: int, workers: int, tensor_parallel: int) -> None:
        super().__init__(call, bucket_bytes)
        self._workers = workers
        self._tensor_parallel = tensor_parallel

    def _vllm_sender(self, source: WeightSource) -> VllmSender:
        self._updates.of_worker = self._ranks_of
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = int(probe.getsockname()[1])
        meeting = Meeting(_address(), port, 1 + self._workers * self._tensor_parallel)
        return nccl_sender(self._weights.rank, self._bucket_bytes, meeting, self._updates, source)

    def _ranks_of(self, init_info: Arguments) -> list[Arguments]:
        """vLLM counts ranks within one engine; ours are several, one after another behind the learner's rank 0."""
        return [{**init_info, "rank_offset": 1 + worker * self._tensor_parallel} for worker in range(self._workers)]


def _address() -> str:
    """This node's, as the workers' nodes reach it."""
    import ray

    return str(ray.util.get_node_ip_address())
