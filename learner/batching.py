"""Update batches, and how they are cut into micro-batches by a token budget.

Loss denominators are fixed here, over the whole update batch, before anything is split: the
gradient is then the same for every budget and every number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence as ListOf
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Sequence:
    """One completion as the learner sees it.

    prompt_ids int [P], completion_ids int [C], sampler_logprobs and old_logprobs float32 [C]
    (old_logprobs None: pi_old is the current policy), advantage a scalar.
    """

    prompt_ids: np.ndarray
    completion_ids: np.ndarray
    sampler_logprobs: np.ndarray
    advantage: float
    old_logprobs: np.ndarray | None = None

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Tensors of one forward/backward: padded rows, and flat arrays over their completion tokens.

    `weights` sum to 1 over the whole update batch. `sequence` says which sequence a token is of.
    """

    input_ids: Int[Tensor, "rows length"]
    rows: Int[Tensor, " tokens"]
    positions: Int[Tensor, " tokens"]
    targets: Int[Tensor, " tokens"]
    sequence: Int[Tensor, " tokens"]
    sampler_logprobs: Float[Tensor, " tokens"]
    old_logprobs: Float[Tensor, " tokens"] | None
    advantages: Float[Tensor, " tokens"]
    weights: Float[Tensor, " tokens"]


def sequence_mean_weights(sequences: ListOf[Sequence]) -> list[float]:
    """Weight of each token of each sequence under GRPO: 1 / (its length x number of sequences)."""
    return [1.0 / (len(s.completion_ids) * len(sequences)) for s in sequences]


def plan_rows(lengths: ListOf[int], budget: int) -> list[list[int]]:
    """Indices, longest first, cut so that rows x longest <= budget in every micro-batch (one row at least)."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    micro_batches: list[list[int]] = []
    for index in order:
        if micro_batches and (len(micro_batches[-1]) + 1) * lengths[micro_batches[-1][0]] <= budget:
            micro_batches[-1].append(index)
        else:
            micro_batches.append([index])
    return micro_batches


def share_of_rank(micro_batches: list[list[int]], rank: int, ranks: int) -> list[list[int]]:
    """The micro-batches of one rank; all ranks get equally many, the last perhaps empty (a dummy)."""
    rounds = -(-len(micro_batches) // ranks)
    padded = micro_batches + [[]] * (rounds * ranks - len(micro_batches))
    return padded[rank::ranks]


def build(sequences: ListOf[Sequence], indices: list[int], weights: ListOf[float]) -> MicroBatch:
    """Tensors of the micro-batch of these sequences; no indices give a dummy that weighs nothing."""
    if not indices:
        return _dummy()
    chosen = [sequences[i] for i in indices]
    input_ids = torch.zeros(len(chosen), max(s.length for s in chosen), dtype=torch.long)
    for row, s in enumerate(chosen):
        input_ids[row, : s.length] = torch.from_numpy(np.concatenate([s.prompt_ids, s.completion_ids]))
    counts = torch.tensor([len(s.completion_ids) for s in chosen])
    positions = [np.arange(len(s.prompt_ids) - 1, s.length - 1) for s in chosen]
    rows = torch.repeat_interleave(torch.arange(len(chosen)), counts)
    positions_t = torch.from_numpy(np.concatenate(positions))
    old = [s.old_logprobs for s in chosen if s.old_logprobs is not None]
    return MicroBatch(
        input_ids=input_ids,
        rows=rows,
        positions=positions_t,
        targets=input_ids[rows, positions_t + 1],
        sequence=torch.repeat_interleave(torch.tensor(indices), counts),
        sampler_logprobs=torch.from_numpy(np.concatenate([s.sampler_logprobs for s in chosen])),
        old_logprobs=torch.from_numpy(np.concatenate(old)) if old else None,
        advantages=torch.repeat_interleave(torch.tensor([s.advantage for s in chosen], dtype=torch.float32), counts),
        weights=torch.repeat_interleave(torch.tensor([weights[i] for i in indices], dtype=torch.float32), counts),
    )


def _dummy() -> MicroBatch:
    """One token that weighs nothing: ZeRO-2 and 3 communicate in every pass, so all ranks make as many."""
    one = torch.zeros(1, dtype=torch.long)
    nothing = torch.zeros(1)
    return MicroBatch(
        input_ids=torch.zeros(1, 2, dtype=torch.long),
        rows=one,
        positions=one,
        targets=one,
        sequence=one - 1,
        sampler_logprobs=nothing,
        old_logprobs=None,
        advantages=nothing,
        weights=nothing,
    )


def micro_batches(sequences: ListOf[Sequence], budget: int, rank: int, ranks: int) -> list[MicroBatch]:
    """This rank's micro-batches of one update batch."""
    weights = sequence_mean_weights(sequences)
    plan = plan_rows([s.length for s in sequences], budget)
    return [build(sequences, indices, weights) for indices in share_of_rank(plan, rank, ranks)]
