"""Weights through shared memory, where the rollout workers compute on a CPU.

The memory is a file in /dev/shm that every worker process maps when the sender opens it; its name
is then removed at once, so nothing is left behind however a process dies. It has two halves: while the
workers load a bucket out of one, the learner fills the other.
"""

from __future__ import annotations

import mmap
import os
import uuid
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from cluster.weight_sender import Call, WeightSender, aligned_bytes, largest_bucket, plan_buckets
from configs.errors import RunError
from learner.whole_weights import NamedTensors, Shapes

SHARED_MEMORY = "/dev/shm"
HALVES = 2

Entry = tuple[str, str, tuple[int, ...], int]


def shared_bytes(shapes: Shapes, bucket_bytes: int) -> int:
    """Bytes of shared memory that these weights take on their way."""
    plan = plan_buckets(shapes, bucket_bytes // HALVES)
    return largest_bucket(shapes, plan) * min(HALVES, len(plan))


class SharedMemorySender(WeightSender):
    """Copies each bucket into the shared memory and has the workers load it from there.

    processes: how many load at the same time. Beside its own core each has its share of the learner's, which waits.
    """

    def __init__(self, call: Call, bucket_bytes: int, processes: int = 1) -> None:
        super().__init__(call, bucket_bytes // HALVES)
        self._processes = processes

    def _open(self) -> None:
        if not self._leads:
            return
        self._half = self._largest
        size = shared_bytes(self._weights.shapes, HALVES * self._bucket_bytes)
        path = f"{SHARED_MEMORY}/pocketgrpo-{uuid.uuid4().hex}"
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, size)
            self._memory = mmap.mmap(descriptor, size)
            threads = 1 + torch.get_num_threads() // self._processes
            self._updates.init_weight_transfer_engine({"path": path, "size": size, "threads": threads})
        except OSError as error:
            raise RunError(
                f"The weight sync needs {size / 2**20:.0f} MiB of shared memory in {SHARED_MEMORY} and got "
                f"'{error}'. Free some, give the container more (docker run --shm-size), "
                "or lower cluster.sync_bucket_mb."
            ) from error
        finally:
            os.close(descriptor)
            os.unlink(path)

    def _send(self) -> None:
        if not self._leads:
            for _ in self._gathered():
                pass
            return
        with ThreadPoolExecutor(1) as caller:
            under_way: Future[None] = caller.submit(self._updates.start_weight_update)
            for number, tensors in enumerate(self._gathered()):
                with self._watch.part("copy"):
                    entries = self._fill(tensors, number % HALVES * self._half)
                under_way.result()
                under_way = caller.submit(self._updates.update_weights, {"entries": entries})
            under_way.result()
        self._updates.finish_weight_update()

    def _fill(self, tensors: NamedTensors, offset: int) -> list[Entry]:
        """Copy tensors to `offset`, in bytes, and on; returns (name, dtype, shape, offset) of each."""
        entries = []
        for name, tensor in tensors:
            numel, dtype = tensor.numel(), tensor.dtype
            target = torch.frombuffer(self._memory, dtype=dtype, count=numel, offset=offset)
            target.view(tensor.shape).copy_(tensor.detach())
            entries.append((name, str(dtype).removeprefix("torch."), tuple(tensor.shape), offset))
            offset += aligned_bytes(numel, dtype)
        return entries
