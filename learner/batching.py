"""Update batches, and how they are cut into micro-batches by a token budget.

Loss weights are fixed here, over the whole update batch, before anything is filtered or split: the
gradient is then the same for every budget, every packing and every number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence as ListOf
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Sequence:
    """One completion as the learner sees it.

    prompt_ids int [P], completion_ids int [C], sampler_logprobs and old_logprobs float32 [C]
    (old_logprobs None: pi_old is the current policy), advantage a scalar, truncated: it has no end.
    """

    prompt_ids: np.ndarray
    completion_ids: np.ndarray
    sampler_logprobs: np.ndarray
    advantage: float
    old_logprobs: np.ndarray | None = None
    truncated: bool = False

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Tensors of one forward/backward: rows of one or more sequences, and flat arrays over their completion tokens.

    position_ids start at 0 in every sequence, which is how the model tells those of a row apart; after
    the last sequence of a row comes padding. (rows, columns) point at the token before each target.
    `weights` are loss weights over the whole update batch. `sequence` says which one a token is of.
    """

    input_ids: Int[Tensor, "rows length"]
    position_ids: Int[Tensor, "rows length"]
    rows: Int[Tensor, " tokens"]
    columns: Int[Tensor, " tokens"]
    targets: Int[Tensor, " tokens"]
    sequence: Int[Tensor, " tokens"]
    sampler_logprobs: Float[Tensor, " tokens"]
    old_logprobs: Float[Tensor, " tokens"] | None
    advantages: Float[Tensor, " tokens"]
    weights: Float[Tensor, " tokens"]

    def to(self, device: torch.device) -> MicroBatch:
        """The same on a device; itself where it is already there."""
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {name: None if each is None else each.to(device) for name, each in held.items()}
        return MicroBatch(**moved)


Rows = list[list[int]]

ATTENTION_TOKENS = 4096  # length of a row at which attention costs as much as all else, at a width of about 600
MICRO_BATCH_SHARE = 1 / 32  # of a full micro-batch's time, what any costs beside its tokens


# -- weights --------------------------------------------------------------------------------------


def token_weights(sequences: ListOf[Sequence], denominator: str, constant: float, mask_truncated: bool) -> list[float]:
    """The loss weight of each token of each sequence, by its objective's denominator.

    sequence: 1 / (its length x sequences), GRPO's mean of means. token: 1 / tokens of the update batch, or
    1 / `constant` where that is above 0 (a token budget). constant: 1 / (`constant` x sequences), Dr. GRPO's.
    A masked sequence weighs 0 and its tokens are not counted as tokens.
    """
    masked = [mask_truncated and s.truncated for s in sequences]
    lengths = [len(s.completion_ids) for s in sequences]
    if denominator == "sequence":
        weights = [1.0 / (length * len(sequences)) for length in lengths]
    elif denominator == "token":
        counted = sum(length for length, out in zip(lengths, masked, strict=True) if not out)
        weights = [1.0 / (constant or max(counted, 1))] * len(sequences)
    else:
        weights = [1.0 / (constant * len(sequences))] * len(sequences)
    return [0.0 if out else weight for weight, out in zip(weights, masked, strict=True)]


def kept(sequences: ListOf[Sequence], weights: ListOf[float], threshold: float | None) -> list[int]:
    """Indices of what is trained on: not masked, and |advantage| above the threshold (DASH's gradient filtering)."""
    return [
        index
        for index, (s, weight) in enumerate(zip(sequences, weights, strict=True))
        if weight > 0.0 and (threshold is None or abs(s.advantage) > threshold)
    ]


# -- micro-batches --------------------------------------------------------------------------------


def plan_rows(lengths: ListOf[int], budget: int, packing: bool) -> list[Rows]:
    """Indices into rows into micro-batches: rows x longest row <= budget in each (one sequence at least).

    With packing, rows are filled up to the length at which the whole plan costs least: none, a part of the
    longest sequence's, or all of it. No row is longer, as attention in one long row costs more than in
    several short ones.
    """
    longest = min(max(lengths, default=0), budget)
    capacities = [0, longest // 4, longest // 2, longest] if packing else [0]
    plans = [_cut(_filled(lengths, capacity), lengths, budget) for capacity in capacities]
    return min(plans, key=lambda plan: plan[0])[1]


def _filled(lengths: ListOf[int], capacity: int) -> Rows:
    """Rows filled up to a capacity, first-fit-decreasing; a longer sequence has one of its own."""
    rows: Rows = []
    free = np.zeros(len(lengths), dtype=np.int64)
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = int(np.argmax(free >= lengths[index]))
        if free[place] < lengths[index]:
            place = len(rows)
            rows.append([])
            free[place] = max(capacity, lengths[index])
        rows[place].append(index)
        free[place] -= lengths[index]
    return rows


def _cut(rows: Rows, lengths: ListOf[int], budget: int) -> tuple[float, list[Rows]]:
    """The rows, longest first, cut into the micro-batches that cost least, and what they cost.

    In tokens: those of the rows, padding and attention included, and a share of the budget for each micro-batch.
    """
    rows = sorted(rows, key=lambda row: -sum(lengths[i] for i in row))
    filled = np.array([sum(lengths[i] for i in row) for row in rows], dtype=np.int64)
    one_row = filled * (1.0 + filled / ATTENTION_TOKENS)
    costs, begins = np.zeros(len(rows) + 1), np.zeros(len(rows) + 1, dtype=np.int64)  # of the best end with row n
    first = 0
    for end in range(1, len(rows) + 1):
        while first < end - 1 and (end - first) * filled[first] > budget:
            first += 1
        choices = costs[first:end] + np.arange(end - first, 0, -1) * one_row[first:end]
        begins[end] = first + np.argmin(choices)
        costs[end] = choices.min() + budget * MICRO_BATCH_SHARE
    plan: list[Rows] = []
    end = len(rows)
    while end:
        plan.insert(0, rows[begins[end] : end])
        end = int(begins[end])
    return float(costs[-1]), plan


def share_of_rank(plan: list[Rows], rank: int, ranks: int) -> list[Rows]:
    """The micro-batches of one rank; all ranks get equally many, the last perhaps empty (a dummy)."""
    rounds = -(-len(plan) // ranks)
    padded = plan + [[]] * (rounds * ranks - len(plan))
    return padded[rank::ranks]


def build(sequences: ListOf[Sequence], rows: Rows, weights: ListOf[float]) -> MicroBatch:
    """Tensors of the micro-batch with these rows of sequences; no rows give a dummy that weighs nothing."""
    if not rows:
        return _dummy()
    indices = [index for row in rows for index in row]
    chosen = [sequences[index] for index in indices]
    length = max(sum(sequences[index].length for index in row) for row in rows)
    input_ids = torch.zeros(len(rows), length, dtype=torch.long)
    position_ids = torch.arange(length).repeat(len(rows), 1)
    columns = []
    for number, row in enumerate(rows):
        start = 0
        for s in (sequences[index] for index in row):
            end = start + s.length
            input_ids[number, start:end] = torch.from_numpy(np.concatenate([s.prompt_ids, s.completion_ids]))
            position_ids[number, start:end] = torch.arange(s.length)
            columns.append(np.arange(start + len(s.prompt_ids) - 1, end - 1))
            start = end
    counts = torch.tensor([len(s.completion_ids) for s in chosen])
    row_of = torch.tensor([number for number, row in enumerate(rows) for _ in row])
    tokens_rows, tokens_columns = torch.repeat_interleave(row_of, counts), torch.from_numpy(np.concatenate(columns))
    old = [s.old_logprobs for s in chosen if s.old_logprobs is not None]
    return MicroBatch(
        input_ids=input_ids,
        position_ids=position_ids,
        rows=tokens_rows,
        columns=tokens_columns,
        targets=input_ids[tokens_rows, tokens_columns + 1],
        sequence=torch.repeat_interleave(torch.tensor(indices), counts),
        sampler_logprobs=torch.from_numpy(np.concatenate([s.sampler_logprobs for s in chosen])),
        old_logprobs=torch.from_numpy(np.concatenate(old)) if old else None,
        advantages=torch.repeat_interleave(torch.tensor([s.advantage for s in chosen], dtype=torch.float32), counts),
        weights=torch.repeat_interleave(torch.tensor([weights[i] for i in indices], dtype=torch.float32), counts),
    )


def _dummy() -> MicroBatch:
    """One token that weighs nothing: ZeRO-2 and 3 communicate in every pass, so all ranks make as many."""
    zero = torch.zeros(1, dtype=torch.long)
    nothing = torch.zeros(1)
    return MicroBatch(
        input_ids=torch.zeros(1, 2, dtype=torch.long),
        position_ids=torch.arange(2)[None],
        rows=zero,
        columns=zero,
        targets=zero,
        sequence=zero - 1,
        sampler_logprobs=nothing,
        old_logprobs=None,
        advantages=nothing,
        weights=nothing,
    )


def micro_batches(
    sequences: ListOf[Sequence],
    weights: ListOf[float],
    indices: ListOf[int],
    budget: int,
    packing: bool,
    rank: int,
    ranks: int,
) -> list[MicroBatch]:
    """This rank's micro-batches of the sequences at `indices` of an update batch."""
    plan = plan_rows([sequences[i].length for i in indices], budget, packing)
    chosen = [[[indices[place] for place in row] for row in rows] for rows in plan]
    return [build(sequences, rows, weights) for rows in share_of_rank(chosen, rank, ranks)]
