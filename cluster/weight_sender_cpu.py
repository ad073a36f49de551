"""Weights through shared memory, where the rollout workers compute on a CPU.

The bucket is a file in /dev/shm that every worker process maps when the sender opens it; its name
is then removed at once, so nothing is left behind however a process dies.
"""

from __future__ import annotations

import mmap
import os
import uuid

import torch

from cluster.weight_sender import WeightSender, aligned_bytes
from configs.errors import RunError
from learner.whole_weights import NamedTensors

SHARED_MEMORY = "/dev/shm"

Entry = tuple[str, str, tuple[int, ...], int]


class SharedMemorySender(WeightSender):
    """Copies each bucket into the shared memory and has the workers load it from there."""

    def _open(self) -> None:
        if not self._leads:
            return
        size = self._largest
        path = f"{SHARED_MEMORY}/pocketgrpo-{uuid.uuid4().hex}"
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, size)
            self._memory = mmap.mmap(descriptor, size)
            self._updates.init_weight_transfer_engine({"path": path, "size": size})
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
        self._updates.start_weight_update()
        for tensors in self._gathered():
            with self._watch.part("copy"):
                entries = self._fill(tensors)
            self._updates.update_weights({"entries": entries})
        self._updates.finish_weight_update()

    def _fill(self, tensors: NamedTensors) -> list[Entry]:
        """Copy tensors into the bucket; returns (name, dtype, shape, offset in bytes) of each."""
        entries, offset = [], 0
        for name, tensor in tensors:
            numel, dtype = tensor.numel(), tensor.dtype
            target = torch.frombuffer(self._memory, dtype=dtype, count=numel, offset=offset)
            target.view(tensor.shape).copy_(tensor.detach())
            entries.append((name, str(dtype).removeprefix("torch."), tuple(tensor.shape), offset))
            offset += aligned_bytes(numel, dtype)
        return entries
