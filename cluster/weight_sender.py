"""The learner's end of the weight sync: what all transports share.

A transport is a `WeightSender` here and a receiver in vLLM's worker processes (`weight_receiver.py`). They
differ only in how a bucket's bytes travel.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch

from cluster.stopwatch import Stopwatch
from learner.whole_weights import NamedTensors, Shapes, WholeWeights

ALIGNMENT = 64

Arguments = dict[str, Any]
# `call(method, arguments)` runs a method on every rollout worker and returns when all have answered, with what they
# did, or raises after its deadline. A list of arguments has an entry for each worker.
Call = Callable[[str, Arguments | list[Arguments]], list[Any]]


def aligned_bytes(numel: int, dtype: torch.dtype) -> int:
    """Bytes a tensor takes in a bucket, rounded up to the alignment."""
    return -(-numel * dtype.itemsize // ALIGNMENT) * ALIGNMENT


def tensor_bytes(shapes: Shapes, name: str) -> int:
    """Bytes this weight takes in a bucket."""
    shape, dtype = shapes[name]
    return aligned_bytes(torch.Size(shape).numel(), dtype)


def plan_buckets(shapes: Shapes, bucket_bytes: int) -> list[list[str]]:
    """Names in order, cut into buckets of at most `bucket_bytes`, or what the largest tensor takes if that is more."""
    room = max(bucket_bytes, *(tensor_bytes(shapes, name) for name in shapes))
    buckets: list[list[str]] = []
    used = room + 1
    for name in shapes:
        size = tensor_bytes(shapes, name)
        if used + size > room:
            buckets.append([])
            used = 0
        buckets[-1].append(name)
        used += size
    return buckets


def largest_bucket(shapes: Shapes, plan: list[list[str]]) -> int:
    """Its bytes."""
    return max(sum(tensor_bytes(shapes, name) for name in names) for names in plan)


class WorkerUpdates:
    """The four calls of vLLM's weight-transfer protocol, made on all rollout workers.

    It is the client that vLLM's own senders drive. An update is one start, one `update_weights` a bucket and one
    finish; the workers refuse one that lacks a name, and sample as `version` after the finish. seconds: the
    slowest worker's of the last update, by part. of_worker: what each worker is told when it is first met.
    """

    def __init__(self, call: Call, names: list[str]) -> None:
        self.version = 0
        self.seconds: dict[str, float] = {}
        self.of_worker: Callable[[Arguments], Arguments | list[Arguments]] = lambda init_info: init_info
        self._call = call
        self._names = names

    def init_weight_transfer_engine(self, init_info: Arguments) -> None:
        told = self.of_worker({**init_info, "names": self._names})
        each = [{"init_info": own} for own in told] if isinstance(told, list) else {"init_info": told}
        self._call("init_weight_transfer_engine", each)

    def start_weight_update(self) -> None:
        self._call("start_weight_update", {})

    def update_weights(self, update_info: Any) -> None:
        self._call("update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """vLLM's senders know of no version of ours: it is the one set before."""
        answers = self._call("finish_weight_update", {"version": self.version})
        self.seconds = {part: max(answer[part] for answer in answers) for part in answers[0]}


class WeightSender(ABC):
    """Sends one weight update after another. Every learner rank makes every call; rank 0 alone speaks to the workers.

    bucket_bytes: memory for tensors on their way.
    """

    def __init__(self, call: Call, bucket_bytes: int) -> None:
        self._call = call
        self._bucket_bytes = bucket_bytes
        self._watch = Stopwatch()
        self._walk: Iterator[NamedTensors] = iter(())

    def open(self, weights: WholeWeights) -> None:
        """Meet the workers. weights: what every `send` sends."""
        self._weights = weights
        self._plan = plan_buckets(weights.shapes, self._bucket_bytes)
        self._updates = WorkerUpdates(self._call, list(weights.shapes))
        self._open()

    def send(self, version: int) -> dict[str, float]:
        """Send every weight; the workers then sample as `version`. Seconds of the parts of it, on rank 0:
        gather (and merge adapters), copy, load (in the workers, the slowest of them), repack (the same)."""
        self._updates.version = version
        self._watch = Stopwatch()
        self._walk = iter(())
        try:
            self._send()
        except BaseException:  # whatever it was, the other ranks gather to the end, and would wait for this one
            for _ in self._walk:
                pass
            raise
        return {**self._watch.seconds, **self._updates.seconds}

    @property
    def _leads(self) -> bool:
        return self._weights.rank == 0

    @property
    def _largest(self) -> int:
        """Bytes of the largest bucket."""
        return largest_bucket(self._weights.shapes, self._plan)

    def _gathered(self) -> Iterator[NamedTensors]:
        """The buckets, on every rank."""
        self._walk = self._timed(self._weights.buckets(self._plan))
        return self._walk

    def _timed(self, buckets: Iterator[NamedTensors]) -> Iterator[NamedTensors]:
        while True:
            with self._watch.part("gather"):
                bucket = next(buckets, None)
            if bucket is None:
                return
            yield bucket

    @abstractmethod
    def _open(self) -> None: ...

    @abstractmethod
    def _send(self) -> None:
        """Walk through the buckets on every rank; on rank 0 make the calls of an update."""
