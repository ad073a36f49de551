"""vLLM's senders between GPUs, in the versions that are tested: 0.32 has objects that drive an update, 0.26 functions.

Either way there is something whose `send_weights` every learner rank calls, and which makes the calls of the update on
rank 0 itself. Nothing of this has run yet (docs/gpu.md).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

from cluster.weight_sender import Arguments, WorkerUpdates

if TYPE_CHECKING:
    from vllm.distributed.weight_transfer.base import WeightSource

BUFFERS = 2  # of NCCL: one is packed while the other travels


class VllmSender(Protocol):
    """What vLLM 0.32 has and `_FunctionSender` makes of what 0.26 has."""

    def send_weights(self) -> None: ...


@dataclass(frozen=True)
class Meeting:
    """Where learner rank 0 and the worker processes, `world_size` in all, meet for NCCL."""

    address: str
    port: int
    world_size: int


def ipc_sender(rank: int, buffer_bytes: int, updates: WorkerUpdates, source: WeightSource) -> VllmSender:
    """Through a buffer of so many bytes on the GPU; the workers are met on the way."""
    from vllm.distributed.weight_transfer import ipc_engine as vllm

    if hasattr(vllm, "IPCTrainerWeightTransferEngine"):
        info = vllm.IPCTrainerInitInfo(rank=rank, packed=True, packed_buffer_size_bytes=buffer_bytes)
        return vllm.IPCTrainerWeightTransferEngine.trainer_init(info, client=updates, source=source)

    arguments = vllm.IPCTrainerSendWeightsArgs(
        send_mode=lambda info: updates.update_weights(asdict(info)), packed=True, packed_buffer_size_bytes=buffer_bytes
    )
    if rank == 0:
        updates.init_weight_transfer_engine({})
    return _FunctionSender(
        rank, updates, lambda: vllm.IPCWeightTransferEngine.trainer_send_weights(iter(source), arguments)
    )


def nccl_sender(
    rank: int, buffer_bytes: int, meeting: Meeting, updates: WorkerUpdates, source: WeightSource
) -> VllmSender:
    """By broadcasts of so many bytes from learner rank 0; the workers are met on the way."""
    from vllm.distributed.weight_transfer import nccl_engine as vllm

    where = {"master_address": meeting.address, "master_port": meeting.port, "world_size": meeting.world_size}
    packed = {"packed": True, "packed_buffer_size_bytes": buffer_bytes, "packed_num_buffers": BUFFERS}
    if hasattr(vllm, "NCCLTrainerWeightTransferEngine"):
        info = vllm.NCCLTrainerInitInfo(rank=rank, **where, **packed)
        return vllm.NCCLTrainerWeightTransferEngine.trainer_init(info, client=updates, source=source)

    if rank != 0:
        return _FunctionSender(rank, updates, lambda: _walk(source))
    group = _while(
        lambda: updates.init_weight_transfer_engine({**where, "rank_offset": 1}),
        lambda: vllm.NCCLWeightTransferEngine.trainer_init(where),
    )
    arguments = vllm.NCCLTrainerSendWeightsArgs(group=group, **packed)
    told = _described(source) | packed

    def send() -> None:
        _while(
            lambda: updates.update_weights(told),
            lambda: vllm.NCCLWeightTransferEngine.trainer_send_weights(iter(source), arguments),
        )

    return _FunctionSender(rank, updates, send)


class _FunctionSender:
    """Makes the start and the finish of an update around a function of vLLM 0.26 that sends."""

    def __init__(self, rank: int, updates: WorkerUpdates, send: Callable[[], None]) -> None:
        self._leads = rank == 0
        self._updates = updates
        self._send = send

    def send_weights(self) -> None:
        if self._leads:
            self._updates.start_weight_update()
        self._send()
        if self._leads:
            self._updates.finish_weight_update()


def _described(source: WeightSource) -> Arguments:
    """What the workers are told of the weights that will come."""
    told = source.metadata()
    return {
        "names": [each.name for each in told],
        "dtype_names": [str(each.dtype).removeprefix("torch.") for each in told],
        "shapes": [list(each.shape) for each in told],
    }


def _walk(source: WeightSource) -> None:
    for _ in source:
        pass


def _while(call: Callable[[], Any], own: Callable[[], Any]) -> Any:
    """What `own` returns, which the workers' side of `call` waits for: both are under way at once.

    If `own` fails the call may never return, so nobody waits for it then.
    """
    caller = ThreadPoolExecutor(1)
    try:
        under_way = caller.submit(call)
        answer = own()
        under_way.result()
        return answer
    finally:
        caller.shutdown(wait=False)
