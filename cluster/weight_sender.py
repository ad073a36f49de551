"""The learner's end of the weight sync: gathered tensors into shared-memory buckets.

The bucket is a file in /dev/shm that every rollout worker maps when the sender opens it; its name
is then removed at once, so nothing is left behind however a process dies.
"""

from __future__ import annotations

import mmap
import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from configs.errors import RunError

ALIGNMENT = 64
SHARED_MEMORY = "/dev/shm"

Parameters = dict[str, tuple[tuple[int, ...], torch.dtype]]
NamedTensors = Iterable[tuple[str, torch.Tensor]]


def aligned_bytes(numel: int, dtype: torch.dtype) -> int:
    """Bytes a tensor takes in a bucket, rounded up to the alignment."""
    return -(-numel * dtype.itemsize // ALIGNMENT) * ALIGNMENT


def plan_buckets(parameters: Parameters, bucket_bytes: int) -> list[list[str]]:
    """Names in order, cut into buckets of at most `bucket_bytes`; a larger tensor gets one of its own."""
    buckets: list[list[str]] = []
    used = bucket_bytes + 1
    for name, (shape, dtype) in parameters.items():
        size = aligned_bytes(torch.Size(shape).numel(), dtype)
        if used + size > bucket_bytes:
            buckets.append([])
            used = 0
        buckets[-1].append(name)
        used += size
    return buckets


class WeightSender:
    """Drives one weight update after another over vLLM's weight-transfer calls.

    call: `call(method, arguments)` runs that method on every rollout worker and returns when all
    have answered, or raises after its deadline. bucket_bytes: shared memory for one bucket.
    """

    def __init__(self, call: Callable[[str, dict[str, Any]], None], bucket_bytes: int) -> None:
        self._call = call
        self._bucket_bytes = bucket_bytes
        self._memory: mmap.mmap | None = None
        self._buckets: list[list[str]] = []

    def open(self, parameters: Parameters) -> list[list[str]]:
        """Make the bucket, have every worker map it, and return the buckets' names in sending order."""
        self._buckets = plan_buckets(parameters, self._bucket_bytes)
        size = max(
            sum(aligned_bytes(torch.Size(parameters[n][0]).numel(), parameters[n][1]) for n in bucket)
            for bucket in self._buckets
        )
        path = f"{SHARED_MEMORY}/pocketgrpo-{uuid.uuid4().hex}"
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, size)
            self._memory = mmap.mmap(descriptor, size)
            arguments = {"path": path, "size": size, "names": list(parameters)}
            self._call("init_weight_transfer_engine", {"init_info": arguments})
        except OSError as error:
            raise RunError(
                f"The weight sync needs {size / 2**20:.0f} MiB of shared memory in {SHARED_MEMORY} and got "
                f"'{error}'. Free some, give the container more (docker run --shm-size), "
                "or lower cluster.sync_bucket_mb."
            ) from error
        finally:
            os.close(descriptor)
            os.unlink(path)
        return self._buckets

    def send(self, buckets: Iterator[NamedTensors], version: int) -> None:
        """Send every bucket, in the order `open` returned them; the workers then sample as `version`."""
        self._call("start_weight_update", {})
        for tensors in buckets:
            self._call("update_weights", {"update_info": {"entries": self._fill(tensors)}})
        self._call("finish_weight_update", {"version": version})

    def _fill(self, tensors: NamedTensors) -> list[tuple[str, str, tuple[int, ...], int]]:
        """Copy tensors into the bucket; returns (name, dtype, shape, offset in bytes) of each."""
        if self._memory is None:
            raise RuntimeError("WeightSender.send was called before open")
        entries, offset = [], 0
        for name, tensor in tensors:
            numel, dtype = tensor.numel(), tensor.dtype
            target = torch.frombuffer(self._memory, dtype=dtype, count=numel, offset=offset)
            target.view(tensor.shape).copy_(tensor.detach())
            entries.append((name, str(dtype).removeprefix("torch."), tuple(tensor.shape), offset))
            offset += aligned_bytes(numel, dtype)
        return entries
