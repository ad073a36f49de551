"""The policy's whole weights, as they are sent and written: gathered under ZeRO-3, adapters merged."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

from learner.collectives import group_of_a_thread, joined_on_rank_0
from learner.deepspeed_engine import gathered, own_slice, whole_shape
from learner.policy import Policy

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]
Copy = Callable[[torch.Tensor], torch.Tensor]  # to the CPU's memory
NamedTensors = list[tuple[str, torch.Tensor]]


def in_new_memory(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in the CPU's memory."""
    return tensor.to("cpu", copy=True)


class WholeWeights:
    """Every weight under its name in the model's own files. To walk through them is a collective.

    rank: this process's; all ranks walk alike, and rank 0 alone does something with what it sees. Copies may be made
    in a thread of every rank while the ranks train, up to the step that changes the weights: under ZeRO-3 they have a
    process group of their own. deadline_seconds: the longest wait in it.
    """

    def __init__(self, policy: Policy, zero_stage: int, rank: int, deadline_seconds: float) -> None:
        self.rank = rank
        self._policy = policy
        self._zero_stage = zero_stage
        self._copying = group_of_a_thread(deadline_seconds) if zero_stage == 3 else None

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
                yield [(name, adapters.merged(name, weights[name].data, adapters.parts(name))) for name in names]

    def copies(self, copy: Copy = in_new_memory) -> dict[str, torch.Tensor]:
        """A copy, made by `copy`, of the whole model on rank 0; empty on the others, which take part in the gather."""
        adapters, copies = self._policy.adapters, {}
        for name, weight in self._policy.named_weights().items():
            whole, *parts = map(self._whole, (weight, *adapters.parts(name)))
            if self.rank == 0:
                copies[name] = copy(adapters.merged(name, whole, parts))
        return copies

    def adapter_copies(self) -> dict[str, torch.Tensor]:
        """The same of the adapters, named as in peft's files."""
        parts = self._policy.adapters.named_parameters()
        wholes = {name: self._whole(part) for name, part in parts.items()}
        return {name: in_new_memory(whole) for name, whole in wholes.items()} if self.rank == 0 else {}

    def _whole(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """The live parameter or, under ZeRO-3, one joined from its slices; there it is whole on rank 0 alone."""
        if self._copying is None:
            return parameter.detach()
        joined = joined_on_rank_0(own_slice(parameter), self._copying)
        if joined is None:
            return own_slice(parameter)
        shape = whole_shape(parameter)
        return joined[: math.prod(shape)].view(shape)
