"""What the ranks tell each other besides gradients."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist


def sum_over_ranks(sums: dict[str, float]) -> dict[str, float]:
    """The same sums, over all ranks; every rank must bring the same names."""
    names = sorted(sums)
    values = torch.tensor([sums[name] for name in names], dtype=torch.float64, device=_device())
    dist.all_reduce(values)
    return dict(zip(names, values.tolist(), strict=True))


def max_over_ranks(value: float) -> float:
    """The largest over all ranks. What is no number counts as infinite, over every limit."""
    worst = torch.tensor(value if math.isfinite(value) else math.inf, dtype=torch.float64, device=_device())
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return float(worst)


def from_rank_0(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _device() -> str:
    """NCCL moves what is on a GPU, gloo what is in the CPU's memory."""
    return "cuda" if dist.get_backend() == "nccl" else "cpu"
