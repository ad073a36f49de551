"""The policy's whole weights, as they are sent and written: gathered under ZeRO-3, adapters merged."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from learner.deepspeed_engine import gathered, whole_shape
from learner.policy import Policy

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]
Copy = Callable[[torch.Tensor], torch.Tensor]  # to the CPU's memory
NamedTensors = list[tuple[str, torch.Tensor]]


def in_new_memory(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in the CPU's memory."""
    return tensor.to("cpu", copy=True)


class WholeWeights:
    """Every weight under its name in the model's own files. To walk through them is a collective.

    rank: this process's; all ranks walk alike, and rank 0 alone does something with what it sees.
    """

    def __init__(self, policy: Policy, zero_stage: int, rank: int) -> None:
        self.rank = rank
        self._policy = policy
        self._zero_stage = zero_stage

    @property
    def shapes(self) -> Shapes:
        """Whole shape and type of every weight, in the order of the model; no collective."""
        return {name: (whole_shape(weight), weight.dtype) for name, weight in self._policy.named_weights().items()}

    def buckets(self, plan: list[list[str]]) -> Iterator[NamedTensors]:
        """Whole tensors, bucket by bucket; under ZeRO-3 gathered on every rank, then let go again."""
        weights, adapters = self._policy.named_weights(), self._policy.adapters
        for names in plan:
            held = [part for name in names for part in (weights[name], *adapters.parts(name))]
            with gathered(held, self._zero_stage):
                yield [(name, adapters.merged(name, weights[name].data)) for name in names]

    def copies(self, copy: Copy = in_new_memory) -> dict[str, torch.Tensor]:
        """A copy, made by `copy`, of the whole model on rank 0; empty on the others, which take part in the gather."""
        copies: dict[str, torch.Tensor] = {}
        for bucket in self.buckets([[name] for name in self._policy.named_weights()]):
            if self.rank == 0:
                copies |= {name: copy(tensor) for name, tensor in bucket}
        return copies
