"""What the ranks tell each other besides gradients."""

from __future__ import annotations

import math
from datetime import timedelta
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


def group_of_a_thread(deadline_seconds: float) -> dist.ProcessGroup:
    """Gloo, for one thread of each rank to talk in while another trains. RuntimeError from a wait over the deadline."""
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=deadline_seconds))


def joined_on_rank_0(part: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor | None:
    """The parts of all ranks, each [n], one after another in the CPU's memory [ranks * n]; None but on rank 0."""
    part = part.cpu()
    if dist.get_rank() > 0:
        dist.gather(part, dst=0, group=group)
        return None
    joined = part.new_empty(dist.get_world_size(), len(part))
    dist.gather(part, list(joined), dst=0, group=group)
    return joined.flatten()


def _device() -> str:
    """NCCL moves what is on a GPU, gloo what is in the CPU's memory."""
    return "cuda" if dist.get_backend() == "nccl" else "cpu"
